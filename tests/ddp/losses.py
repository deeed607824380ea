"""Losses and gradients of one global batch, by any number of processes; a test starts it in one process or in two."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import MISSRecConfig, Recipe, TrainConfig
from missrec_t4r.data.batching import TrainingBatch, collate, training_batches
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.runs.run_folder import save_tensors
from missrec_t4r.training import distributed
from missrec_t4r.training.loss.chunked import ChunkedSoftmax
from missrec_t4r.training.loss.full import FullSoftmax, Softmax
from missrec_t4r.training.loss.sampled import SampledSoftmax
from missrec_t4r.training.pretrain import contrastive_loss
from missrec_t4r.training.step import batch_totals, training_loss
from tests import shop

TRAIN = TrainConfig.paper(batch_size=1000, next_items=2)
OURS = {"orthogonality_weight": 0.1, "dropout": 0.0}
CASES: dict[str, tuple[MISSRecConfig, Softmax]] = {
    "full": (shop.default(**OURS), FullSoftmax()),
    "prefixes, a number per item": (
        shop.ours_masked(candidate_fusion="dynamic_instance", orthogonality="cosine", **OURS),
        FullSoftmax(),
    ),
    "without interests": (shop.default(**OURS, interest_ratio=0.0), FullSoftmax()),
    "chunked": (shop.default(**OURS), ChunkedSoftmax(5)),
    "sampled, all drawn": (shop.default(**OURS), SampledSoftmax(torch.ones(15), 1000)),
}


def whole_batch(config: MISSRecConfig) -> TrainingBatch:
    """All sessions of the shop and their targets."""
    sessions = [shop.rows([*session, target]) for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)]
    data = Sessions.from_lists(sessions)
    [(examples, _)] = training_batches(data, config, TRAIN, np.random.default_rng(0))
    return collate(data, examples, 2, all_positions=config.attention == "causal", backwards=False)


def fine_tuning(name: str) -> tuple[MISSRec, Tensor]:
    """Return the model and this process's part of the loss."""
    config, softmax = CASES[name]
    model, batch, (rank, size, _) = shop.model(config).train(), whole_batch(config), distributed.world()
    totals = batch_totals(model, batch)
    return model, training_loss(model, batch.part(rank, size), TRAIN, totals=totals, softmax=softmax)


def contrast() -> tuple[MISSRec, Tensor]:
    """Return a loss against positives that are gathered with their gradients: four sessions here, two there."""
    model = shop.model(shop.default(**OURS))
    rank, size, _ = distributed.world()
    bounds = [0, 4, 6] if size == 2 else [0, 6]
    own = slice(bounds[rank], bounds[rank + 1])
    vectors = model(shop.batch()[own])
    positives = model.item_encoder(shop.targets()[own]).modality[0]
    everyone = distributed.gather_rows(positives)
    labels = distributed.rows_before(len(positives)) + torch.arange(len(positives))
    return model, torch.nn.functional.cross_entropy(vectors @ everyone.T, labels, reduction="sum") / len(everyone)


def pretraining() -> tuple[MISSRec, Tensor]:
    """Return this process's part of the pre-training loss; its views drop nothing, since drops are random."""
    config = shop.default(**OURS, item_ids=False, history_bias=False)
    views = {"sequence_sequence_weight": 0.5, "item_drop_probability": 0.0}
    recipe = Recipe.from_dict({"extends": "paper", "model": vars(config), "pretrain": views})
    model, (rank, size, _) = shop.model(config).train(), distributed.world()
    return model, contrastive_loss(model, whole_batch(config).part(rank, size), recipe)


def results() -> dict[str, Tensor]:
    """Return losses and gradients of all cases, summed over the processes."""
    found = {}
    for name in [*CASES, "contrast", "pretraining"]:
        others = {"contrast": contrast, "pretraining": pretraining}
        model, loss = others[name]() if name in others else fine_tuning(name)
        loss.backward()
        tables = model.item_encoder.id_tables if name.startswith("sampled") else []
        distributed.sum_gradients(model.parameters(), frozenset(tables))
        found[f"{name}/loss"] = distributed.sum_(loss.detach())
        for weight, value in model.named_parameters():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad.to_dense()
            found[f"{name}/{weight}"] = gradient
    return found


def collectives() -> dict[str, Tensor]:
    """Return the results of the collective functions in this process."""
    rank = distributed.world().rank
    weights = [torch.full((2,), float(rank))]
    distributed.broadcast_(weights)
    return {
        "share": torch.tensor(distributed.share([rank + 7])),
        "collect": torch.tensor(distributed.collect(rank * 10)),
        "broadcast": weights[0],
        "grouped": torch.tensor(distributed.is_grouped()),
    }


if __name__ == "__main__":
    with distributed.joined(torch.device("cpu")) as world:
        answer = results() | collectives()
        save_tensors(Path(sys.argv[1]) / f"{world.rank}.safetensors", answer)
