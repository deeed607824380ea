"""The authors' release against our `paper` recipe over seeds on the same files, paired over users.

    make bench-quality DATA=… SUBSET=interactions_mm_subset.parquet MODALITY=… RECIPE=paper      # ours first
    OMP_NUM_THREADS=1 python -m benchmarks.release.seeds --release path/to/MM23-MISSRec \
        --data work/bench/scientific_mm/data --ours work/bench/scientific_mm/paper

The release's own model, initialisation, loss and optimiser train on random batches of 512 prefixes until validation
NDCG@10 has not risen for ten epochs, as published; its CUDA k-means is replaced by a CPU one, started at random every
epoch. A batch's sessions are encoded in parts of similar length and scored together: the same loss without most of the
padding, on which only its regulariser depends (`padded_regulariser`). Scores are then computed by our model from the
release's weights, after a check on some users that both give the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import FIRST_SEED, spread
from benchmarks.quality.paired import paired
from benchmarks.release.compare import interaction
from benchmarks.release.loading import (
    copy_weights,
    discover_release_interests,
    release_model,
    release_rows,
    take_interests,
)
from missrec_t4r.arrays import Ints
from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import Examples, TrainingBatch, collate, prefix_examples
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import (
    FORMER_PROTOCOLS,
    KEPT_STRICT,
    KEPT_WITH_HISTORY_TERM,
    PROTOCOLS,
    quick_metrics,
    rank_catalogue,
)
from missrec_t4r.evaluation.metrics import metric_names, metric_values
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import track
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW

log = logging.getLogger(__name__)

KS = (10, 50)
CHECKED = 64
"""Test users whose scores by the release's own code are compared with ours."""
TOLERANCE = 1e-4
"""Of scores, which are cosines."""
LONGEST = (3, 6, 12, 50)
"""Longest session of each part of a batch."""
EMPTY = 2
"""Empty places of every set of interests that are encoded; the release's batches have up to a hundred."""


class Splits(NamedTuple):
    """A data folder in the form that both models read."""

    catalogue: Catalogue
    train: Sessions
    valid: Sessions
    test: Sessions

    @classmethod
    def load(cls, data: Path) -> Splits:
        """Read a folder written by ``missrec etl``."""
        sessions = (Sessions.load(data / split, []).known() for split in ("train", "valid", "test"))
        return cls(Catalogue.load(data / CATALOGUE_FOLDER), *sessions)


class ReleaseRun:
    """One training run of the release's model, and a model of ours that gets its weights for ranking."""

    def __init__(self, path: Path, splits: Splits, seed: int) -> None:
        torch.manual_seed(seed)
        self.splits, self.seed, self.rng = splits, seed, np.random.default_rng(seed)
        self.config, self.settings = MISSRecConfig.paper(), TrainConfig.paper()
        self.theirs = release_model(path, splits.catalogue, self.config)
        self.ours: MISSRec = build_missrec(self.config, splits.catalogue).eval()
        self.optimiser = torch.optim.Adam(self.theirs.parameters(), lr=self.settings.learning_rate)
        self.examples = prefix_examples(splits.train, self.config.max_sequence_length, 0, self.rng)

    def train(self) -> dict[str, Any]:
        """Train until validation stops improving; the best weights are in ``ours`` then."""
        curve: list[float] = []
        best: dict[str, Tensor] = {}
        started = time.perf_counter()
        difference = 0.0
        while len(curve) - 1 - (int(np.argmax(curve)) if curve else 0) < self.settings.patience:
            discover_release_interests(self.theirs, seed=1000 * self.seed + len(curve))
            self.theirs.train()
            batches = self._batches()
            for batch in track(batches, f"epoch {len(curve)}", len(batches)):
                self._step(batch)
            self._take_over()
            if not curve:
                difference = self._difference()
            found = quick_metrics(self._scorer(), self.splits.valid, self.splits.catalogue.n_rows)[KEPT_STRICT]
            curve.append(found["ndcg@10"] or 0.0)
            if curve[-1] == max(curve):
                best = {name: tensor.clone() for name, tensor in self.ours.state_dict().items()}
            log.info(f"seed {self.seed} epoch {len(curve) - 1}: valid ndcg@10 {curve[-1]:.4f}")
            if len(curve) == self.settings.epochs:
                break
        difference = max(difference, self._difference())
        self.ours.load_state_dict(best)
        return {
            "seed": self.seed,
            "valid_ndcg@10": max(curve),
            "best_epoch": int(np.argmax(curve)),
            "epochs": len(curve),
            "seconds": round(time.perf_counter() - started, 1),
            "largest_difference_of_scores": difference,
            "curve": [round(value, 5) for value in curve],
        }

    def ranks(self) -> dict[str, Ints]:
        """Rank the test split with the best weights."""
        return _ranks(self._scorer(), self.splits)

    def _scorer(self) -> ModelScorer:
        return ModelScorer.with_popularity(self.ours, self.splits.catalogue)

    def _batches(self) -> list[list[Examples]]:
        """Return random batches, each as parts of similar length."""
        order = self.rng.permutation(len(self.examples.begin))
        chunks = [order[at : at + self.settings.batch_size] for at in range(0, len(order), self.settings.batch_size)]
        return [list(self._parts(chunk)) for chunk in chunks]

    def _parts(self, rows: npt.NDArray[np.int64]) -> Iterator[Examples]:
        part = np.searchsorted(LONGEST, self.examples.lengths[rows])
        for number in np.unique(part):
            yield Examples(*(values[rows[part == number]] for values in self.examples))

    def _step(self, parts: list[Examples]) -> None:
        """Take a step as in the release's ``calculate_loss``: sessions part by part, the catalogue once."""
        self.optimiser.zero_grad()
        vectors, targets = [], []
        with watched_memory(self.theirs) as memories:
            for part in parts:
                batch = collate(self.splits.train, part, 1, all_positions=False, backwards=False)
                width = min(batch.item_ids.shape[1] + 1, self.config.max_sequence_length)  # shorter ones end in padding
                inputs = interaction(batch, width)
                vectors.append(self.theirs._compute_seq_embeddings(inputs["item_id_list"], inputs["item_length"])[0])
                targets.append(inputs["item_id"])
        texts = self.theirs.text_adaptor(self.theirs.plm_embedding.weight)
        images = self.theirs.img_adaptor(self.theirs.img_embedding.weight)
        logits = self.theirs._compute_dynamic_fused_logits(torch.cat(vectors), texts, images) / self.theirs.temperature
        loss = self.theirs.loss_fct(logits, torch.cat(targets)) + self.theirs.gamma * padded_regulariser(memories)
        loss.backward()
        self.optimiser.step()

    def _take_over(self) -> None:
        copy_weights(self.theirs, self.ours)
        take_interests(self.theirs, self.ours)

    @torch.no_grad()
    def _difference(self) -> float:
        """Return the largest difference of a test score by the release's code and by ours, for some users."""
        histories, targets = self.splits.test.split_last()
        chosen = histories.take(np.arange(CHECKED))
        rows = torch.from_numpy(chosen.padded(range(CHECKED), self.config.max_sequence_length))
        batch = TrainingBatch(rows, torch.from_numpy(targets[:CHECKED, None]))
        self.theirs.eval()
        logits = self.theirs.full_sort_predict(interaction(batch, self.config.max_sequence_length))
        theirs = logits * self.config.temperature
        items = torch.arange(FIRST_ITEM_ROW, self.splits.catalogue.n_rows)
        ours = self._scorer()(chosen)[:, items]
        found = float((ours - theirs[:, release_rows(items)]).abs().max())
        if found > TOLERANCE:
            raise SystemExit(f"scores differ by {found:.1e}; expected: at most {TOLERANCE}")
        return found


def release_seed(path: Path, splits: Splits, seed: int, out: Path) -> dict[str, Any]:
    """Train and rank the release with one seed, unless it is done; its ranks are stored."""
    finished = out / f"release-{seed}.json"
    if not finished.is_file():
        run = ReleaseRun(path, splits, seed)
        facts = run.train()
        ranks = run.ranks()
        out.mkdir(parents=True, exist_ok=True)
        np.savez(out / f"release-{seed}.npz", **ranks)  # type: ignore[arg-type]  # numpy types no keyword arrays
        finished.write_text(json.dumps(facts), encoding="utf-8")
    facts = json.loads(finished.read_text(encoding="utf-8"))
    stored = np.load(out / f"release-{seed}.npz")
    ranks = {FORMER_PROTOCOLS.get(name, name): stored[name] for name in stored}
    ranks.setdefault(KEPT_STRICT, ranks[KEPT_WITH_HISTORY_TERM])  # of an earlier version; the release has no term
    return facts | {"ranks": ranks}


def our_seed(run: Path, splits: Splits, seed: int) -> dict[str, Any]:
    """Rank with a finished run of ours."""
    loaded = load_run(run)
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    scorer = ModelScorer.with_popularity(loaded.model, loaded.catalogue)
    kept = ("valid_ndcg@10", "best_epoch", "epochs", "seconds")
    return {"seed": seed, **{key: info[key] for key in kept}, "ranks": _ranks(scorer, splits)}


def summary(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every metric's mean and spread over seeds of both, and the paired difference."""
    names, found = metric_names(KS), {}
    for protocol in PROTOCOLS:
        values = {
            system: np.stack([metric_values(run["ranks"][protocol], KS) for run in runs])
            for system, runs in (("paper", ours), ("release", theirs))
        }
        found[protocol] = {
            name: {
                **{system: spread(of[..., index].mean(1).tolist()) for system, of in values.items()},
                **paired(values["paper"][..., index], values["release"][..., index]),
            }
            for index, name in enumerate(names)
            if not name.startswith("mrr")
        }
    return found


def _ranks(scorer: ModelScorer, splits: Splits) -> dict[str, Ints]:
    histories, targets = splits.test.split_last()
    return dict(rank_catalogue(scorer, histories, targets, splits.catalogue.n_rows).ranks)


@contextmanager
def watched_memory(theirs: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the output of the release's encoder and its mask; sets of interests get `EMPTY` more padding slots."""
    seen: list[tuple[Tensor, Tensor]] = []
    pad = torch.nn.utils.rnn.pad_sequence

    def wider(*sets: Any, **options: Any) -> Tensor:
        return F.pad(pad(*sets, **options), (0, EMPTY))

    def watch(_module: Any, _args: Any, options: dict[str, Any], memory: Tensor) -> None:
        seen.append((memory, ~options["src_key_padding_mask"]))

    hook = theirs.trm_model.encoder.register_forward_hook(watch, with_kwargs=True)
    try:
        with patch.object(torch.nn.utils.rnn, "pad_sequence", wider):
            yield seen
    finally:
        hook.remove()


def padded_regulariser(memories: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the release's regulariser of a batch whose sets of interests are all padded to its largest set.

    Parameters
    ----------
    memories : list of (Tensor [part, place, dim], Tensor [part, place], bool)
        The encoder's output for each part of the batch, with `EMPTY` empty places or more, and which places are real.
    """
    places = max(mask.shape[1] - EMPTY for _, mask in memories)
    return torch.stack([orthogonality_loss(*memory, "faithful", n_slots=places) for memory in memories]).sum()


def main() -> None:
    """Run from the command line."""
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--release", type=Path, required=True, help="checkout of gimpong/MM23-MISSRec")
    words.add_argument("--data", type=Path, required=True, help="data folder with the modalities text and image")
    words.add_argument("--ours", type=Path, required=True, help="folder of seed-N: finished runs of the recipe paper")
    words.add_argument("--out", type=Path, default=Path("work/bench/release"), help="where finished seeds are kept")
    words.add_argument("--seeds", type=int, default=3)
    options = words.parse_args()
    splits = Splits.load(options.data)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    theirs = [release_seed(options.release, splits, seed, options.out) for seed in seeds]
    ours = [our_seed(options.ours / f"seed-{seed}", splits, seed) for seed in seeds]
    runs = {"paper": ours, "release": theirs}
    report(
        "release-seeds",
        {
            "data": options.data.parent.name,
            "seeds": list(seeds),
            **summary(ours, theirs),
            "runs": {
                name: [{key: value for key, value in run.items() if key != "ranks"} for run in of]
                for name, of in runs.items()
            },
        },
    )


if __name__ == "__main__":
    run_as_command(main)
