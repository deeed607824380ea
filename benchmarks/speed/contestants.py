"""Contestants of the training benchmark; `benchmarks.speed.train` measures each in its own process.

Every contestant trains on the same sessions with the published sizes and batch, and reports trained prefixes per
second of whole epochs, interest discovery and optimiser included.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.release.compare import interaction
from benchmarks.release.loading import discover_release_interests, release_model, release_rows
from missrec_t4r.config import MISSRecConfig, Recipe, TrainConfig
from missrec_t4r.data.batching import TrainingBatch, collate, iterate, training_batches
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import KEPT_WITH_HISTORY_TERM, rank_catalogue
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.training.precision import resolve_precision
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Trainer

Result = dict[str, Any]
EPOCHS = 2
"""Whole epochs timed, after one to warm up."""
RELEASE_BATCHES = {"padded": 3, "unpadded": 11}
"""Batches of the release that are timed, after one to warm up; its rate does not depend on how many."""
EVALUATED = 1024
"""Users that the release ranks; ours ranks all."""


class Clock:
    """Wall and processor time of some work; the latter depends less on other programs of a shared machine."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.running = True
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.running, self.since = True, (time.perf_counter(), time.process_time())

    def stop(self, parts: float = 1.0) -> None:
        """Stop the clock; ``parts``: the measured work is repeated in so many parts."""
        self.wall += (time.perf_counter() - self.since[0]) / parts
        self.cpu += (time.process_time() - self.since[1]) / parts
        self.running = False

    def rates(self, prefixes: int) -> Result:
        """Return prefixes per second and per second of processor time, summed over the cores."""
        if self.running:
            self.stop()
        return {"prefixes_per_s": prefixes / self.wall, "prefixes_per_cpu_s": prefixes / self.cpu}


def ours(recipe: str, **settings: Any) -> Callable[[Catalogue, Sessions, Sessions, Path | None], Result]:
    """Return the measurement of a shipped recipe: epochs of `missrec train`, validation left out."""

    def measure(catalogue: Catalogue, train: Sessions, test: Sessions, _: Path | None) -> Result:
        resolved = Recipe.load(recipe, {f"train.{name}": value for name, value in settings.items()})
        with tempfile.TemporaryDirectory() as folder:
            data = TrainingData(catalogue, train, test.take(np.arange(8)))
            trainer = Trainer(resolved, data, Path(folder), "cpu")
            trainer._epoch()
            clock = Clock()
            lines = [trainer._epoch() for _ in range(EPOCHS)]
            prefixes = EPOCHS * int(np.maximum(train.lengths - 1, 0).sum())
            found = clock.rates(prefixes) | {"prefixes_per_s": float(np.mean([x["positions_per_s"] for x in lines]))}
            flops = _flops_per_prefix(trainer)
            model = trainer.model
        started = time.perf_counter()
        histories, targets = test.split_last()
        by_length = np.argsort(histories.lengths, kind="stable")
        scorer = ModelScorer.with_popularity(model, catalogue)
        rank_catalogue(
            scorer,
            histories.take(by_length),
            targets[by_length],
            catalogue.n_rows,
            protocols=[KEPT_WITH_HISTORY_TERM],
            top_k=50,
        )
        users = len(histories) / (time.perf_counter() - started)
        precision = resolve_precision(resolved.train.precision, trainer.device)
        return found | {"flops_per_prefix": flops, "users_per_s": users, "precision": precision}

    return measure


def release(padded: bool) -> Callable[[Catalogue, Sessions, Sessions, Path | None], Result]:
    """Return the measurement of the authors' release: its model, loss and optimiser, k-means on the CPU.

    ``padded``: random batches, every session padded to 50, as published. Otherwise batches of similar length, no wider
    than their longest session: the same release without its padding.
    """

    def measure(catalogue: Catalogue, train: Sessions, test: Sessions, path: Path | None) -> Result:
        assert path is not None
        torch.manual_seed(0)
        config = MISSRecConfig.paper()
        model = release_model(path, catalogue, config)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = list(_release_batches(train, config, padded))
        count = RELEASE_BATCHES["padded" if padded else "unpadded"]
        clock = Clock()
        discover_release_interests(model, seed=0)
        clock.stop(sum(len(batch.item_ids) for batch in batches) / sum(len(b.item_ids) for b in batches[1 : count + 1]))
        model.train()
        prefixes = 0
        for number, batch in enumerate(batches[: count + 1]):
            clock.start()
            optimiser.zero_grad()
            loss = model.calculate_loss(interaction(batch, config.max_sequence_length if padded else 0))
            loss.item()
            loss.backward()
            optimiser.step()
            if number:
                clock.stop()
                prefixes += len(batch.item_ids)
        found: Result = {**clock.rates(prefixes), "batches": count, "of": len(batches)}
        return found | ({"users_per_s": _release_users_per_s(model, test)} if padded else {})

    return measure


def t4r_xlnet(catalogue: Catalogue, train: Sessions, _test: Sessions, _path: Path | None) -> Result:
    """Train Transformers4Rec's XLNet (item ids only, all positions) on the batches of our default recipe.

    Its causal attention (``attn_type="uni"``) fails in transformers 4.30, so attention is bidirectional: the same work,
    though of no use as a model, since it sees its targets.
    """
    import transformers4rec.torch as tr
    from merlin.schema import ColumnSchema, Schema, Tags

    config, column = MISSRecConfig(), "item_id-list"
    properties = {"domain": {"min": 0, "max": catalogue.n_rows - 1, "name": "item_id"}}
    properties["value_count"] = {"min": 0, "max": config.max_sequence_length + 1}
    tags = [Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL, Tags.LIST]
    item = ColumnSchema(column, dtype="int64", is_list=True, is_ragged=True, tags=tags, properties=properties)
    inputs = tr.TabularSequenceFeatures.from_schema(
        Schema([item]),
        max_sequence_length=config.max_sequence_length + 1,
        d_output=config.d_model,
        embedding_dims={column: config.d_model},
        masking="clm",
    )
    body = tr.XLNetConfig.build(
        config.d_model, config.n_head, n_layer=2, total_seq_length=config.max_sequence_length + 1, attn_type="bi"
    )
    model = body.to_torch_model(inputs, tr.NextItemPredictionTask(weight_tying=True)).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    rng, settings = np.random.default_rng(0), TrainConfig.paper()
    clock, positions = Clock(), 0
    for epoch in range(EPOCHS + 1):
        if epoch == 1:
            clock, positions = Clock(), 0
        for examples, _ in training_batches(train, config, settings, rng):
            batch = collate(train, examples, 1, all_positions=True, backwards=False)
            positions += int((batch.targets > 0).sum())
            optimiser.zero_grad()
            model({column: _with_target(batch)}, training=True)["loss"].backward()
            optimiser.step()
    return clock.rates(positions)


CONTESTANTS: dict[str, Callable[[Catalogue, Sessions, Sessions, Path | None], Result]] = {
    "paper": ours("paper"),
    "default": ours("default"),
    "default_fp32": ours("default", precision="fp32"),
    "release": release(padded=True),
    "release_unpadded": release(padded=False),
    "t4r_xlnet": t4r_xlnet,
}


def _with_target(batch: TrainingBatch) -> Tensor:
    """Return whole sessions [batch, seq + 1]: T4R takes the targets from the row itself."""
    rows = torch.nn.functional.pad(batch.item_ids, (0, 1))
    last = (batch.item_ids > 0).sum(1, keepdim=True)
    return rows.scatter_(1, last, batch.targets[..., 0].gather(1, last - 1))


def _flops_per_prefix(trainer: Trainer) -> float:
    """Count the floating-point operations of the matrix products in some of the epoch's steps, per trained prefix."""
    recipe, prefixes = trainer.recipe, 0
    plan = training_batches(trainer.sessions, recipe.model, recipe.train, np.random.default_rng(0))[:6]
    trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        for batch in iterate(trainer.sessions, plan, recipe.model, recipe.train):
            trainer._step(batch, 0.5)
            prefixes += int((batch.targets[..., 0] > 0).sum())
    return counter.get_total_flops() / prefixes


def _release_batches(train: Sessions, config: MISSRecConfig, padded: bool) -> Iterator[TrainingBatch]:
    rng, settings = np.random.default_rng(0), TrainConfig.paper()
    plan = training_batches(train, config, settings, rng)
    if padded:  # the release shuffles prefixes and takes them as they come
        whole = type(plan[0][0])(*(np.concatenate([getattr(e, f) for e, _ in plan]) for f in plan[0][0]._fields))
        order = rng.permutation(len(whole.begin))
        cuts = range(0, len(order), settings.batch_size)
        plan = [(type(whole)(*(part[order[c : c + settings.batch_size]] for part in whole)), False) for c in cuts]
    yield from iterate(train, plan, dataclasses.replace(config), settings)


@torch.no_grad()
def _release_users_per_s(model: Any, test: Sessions) -> float:
    """Rank for some users as the release's trainer does: sessions padded to 50, the whole catalogue, the best 50."""
    histories, targets = test.split_last()
    chosen = np.random.default_rng(0).permutation(len(histories))[:EVALUATED]
    rows = torch.from_numpy(histories.padded(chosen, model.max_seq_length))
    rows = torch.nn.functional.pad(rows, (0, model.max_seq_length - rows.shape[1]))
    model.eval()
    started = time.perf_counter()
    scores = model.full_sort_predict({"item_id_list": release_rows(rows), "item_length": (rows > 0).sum(1)})
    scores[:, 0] = -torch.inf
    best = scores.topk(50, dim=1).indices
    (best == release_rows(torch.from_numpy(targets[chosen]))[:, None]).sum()
    return len(chosen) / (time.perf_counter() - started)
