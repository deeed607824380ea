"""Ablation of the interest encoder: a recipe with and without interests, over seeds and slices of sessions.

    make bench-quality DATA=… RECIPE=default                                        # with interests, first
    python -m benchmarks.quality.interests --runs work/bench/scientific_mm/default --seeds 3

Without interests, no cluster is discovered: every session has an empty set of interests, the decoder reads its items
alone, and the model is trained from the start. Test split, whole catalogue; differences are paired over users and
averaged over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import FIRST_SEED, spread
from benchmarks.quality.paired import Values, paired
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.evaluation.full_ranking import KEPT_STRICT, PROTOCOLS, rank_catalogue
from missrec_t4r.evaluation.metrics import metric_names, metric_values
from missrec_t4r.evaluation.slices import slices
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.training.fit import train

SHOWN = ("ndcg@10", "recall@10")
WITH, WITHOUT = "with", "without"


def without_interests(model: MISSRec, _catalogue: Catalogue) -> dict[str, Any]:
    """Keep the interest vocabulary empty: interest discovery does nothing inside the block."""
    model.interests.discover = lambda *_: None  # type: ignore[method-assign]  # of this model alone
    return {"interests": "none"}


def ranked(run: Path, *, alone: bool) -> tuple[dict[str, Values], dict[str, Any]]:
    """Rank the test split with a run.

    Parameters
    ----------
    alone : bool
        Without score terms: the network alone, with its history bias except under ``kept_strict``. With terms the
        model is ranked as it is exported, so that there is no ``kept_strict``.

    Returns
    -------
    (dict of str to ndarray [user, metric], dict of str to ndarray [user])
        Metrics per protocol, and the slices.
    """
    loaded = load_run(run)
    model, catalogue = loaded.model, loaded.catalogue
    if alone:
        for name in set(model.terms) - {"history_bias"}:
            del model.terms[name]
    columns = model.event_columns
    histories, targets = load_sessions(loaded.data, "test", columns).known().split_last()
    scorer = ModelScorer.with_popularity(model, catalogue)
    ranks = dict(rank_catalogue(scorer, histories, targets, catalogue.n_rows).ranks)
    if alone:
        model.terms.clear()
        strict = rank_catalogue(scorer, histories, targets, catalogue.n_rows, protocols=[KEPT_STRICT])
        ranks |= strict.ranks
    values = {protocol: metric_values(of, [10]) for protocol, of in ranks.items()}
    return values, dict(slices(histories, targets, catalogue))


def compare(runs: dict[str, list[Path]], *, alone: bool) -> dict[str, Any]:
    """Return, per protocol, slice and metric, means of both systems and their paired difference."""
    found = {name: [ranked(run, alone=alone) for run in folders] for name, folders in runs.items()}
    parts = found[WITH][0][1]
    table: dict[str, Any] = {}
    for protocol in (protocol for protocol in PROTOCOLS if protocol in found[WITH][0][0]):
        values = {name: np.stack([one[0][protocol] for one in of]) for name, of in found.items()}
        for part, chosen in parts.items():
            if not chosen.any():
                continue
            row: dict[str, Any] = {"users": int(chosen.sum())}
            for metric in SHOWN:
                of = {name: value[:, chosen, metric_names([10]).index(metric)] for name, value in values.items()}
                means = {name: spread(value.mean(1).tolist()) for name, value in of.items()}
                row[metric] = {**means, **paired(of[WITH], of[WITHOUT])}
            table.setdefault(protocol, {})[part] = row
    return table


def train_without(like: Path, out: Path) -> Path:
    """Train with a finished run's recipe, without interests, unless it is done."""
    if not (out / "run.json").is_file():
        loaded = load_run(like)
        recipe = dataclasses.replace(loaded.recipe, name=f"{loaded.recipe.name} without interests")
        train(loaded.data, out, recipe=recipe, prepare=without_interests)
    return out


def main() -> None:
    """Run from the command line."""
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--runs", type=Path, required=True, help="folder of seed-N: finished runs with interests")
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--out", type=Path, help="where runs without are kept; beside those with by default")
    options = words.parse_args()
    out = options.out or options.runs.with_name(f"{options.runs.name}-without-interests")
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    runs = {WITH: [options.runs / f"seed-{seed}" for seed in seeds]}
    runs[WITHOUT] = [train_without(run, out / run.name) for run in runs[WITH]]
    report(
        "interests",
        {
            "data": options.runs.parent.name,
            "recipe": options.runs.name,
            "seeds": list(seeds),
            "with_priors": compare(runs, alone=False),
            "model_alone": compare(runs, alone=True),
        },
    )


if __name__ == "__main__":
    run_as_command(main)
