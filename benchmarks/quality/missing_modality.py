"""Recall@10 of a run whose items lack a modality at test time, and its share of the full Recall@10.

    python -m benchmarks.quality.missing_modality --run work/bench/…/seed-2020 [--run …]

Vectors are removed from the catalogue, so item encoder, interests and content-kNN have none of them. ID embeddings and
co-occurrence counts stay, if the model has them. The model is ranked as it is exported: ``kept_strict`` is among the
protocols for networks without terms only.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import report, run_as_command
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import quick_metrics
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec, terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.schema import FIRST_ITEM_ROW

_SEED = 2020


def withheld(catalogue: Catalogue, hidden: dict[str, np.ndarray[Any, np.dtype[np.bool_]]]) -> Catalogue:
    """Return the catalogue with some vectors removed.

    Parameters
    ----------
    hidden : dict of str to ndarray [row], bool
        Per modality, the rows that lose it.
    """
    modalities = {
        name: dataclasses.replace(
            modality,
            vectors=np.where(hidden[name][:, None], 0, modality.vectors).astype(modality.vectors.dtype),
            present=modality.present & ~hidden[name],
        )
        for name, modality in catalogue.modalities.items()
    }
    return dataclasses.replace(catalogue, modalities=modalities)


def without_vectors(model: MISSRec, catalogue: Catalogue) -> MISSRec:
    """Build the trained model over another catalogue of the same rows; clusters are those of training."""
    other = build_missrec(model.config, catalogue, model.event_columns)
    trained = model.state_dict()
    other.interests.centroids = model.interests.centroids.clone()  # as many as were found in training
    keep = other.state_dict() | trained
    other.load_state_dict({name: keep[name] for name in other.state_dict()})
    other.interests.assignment[~other.item_encoder.presence] = 0
    if terms_of(other).content_knn is not None and terms_of(other).content_knn.active:
        vectors = {name: other.item_encoder.vectors.get_buffer(name) for name in other.item_encoder.names}
        terms_of(other).content_knn.fit(vectors, other.item_encoder.presence)
    return other.eval()


def measure(run: Path) -> dict[str, Any]:
    """Return Recall@10 and NDCG@10 per protocol for every set of removed vectors, and its share of the full one."""
    loaded = load_run(run)
    catalogue, sessions = loaded.catalogue, Sessions.load(loaded.data / "test").known()
    nothing = np.zeros(catalogue.n_rows, bool)
    names = list(catalogue.modalities)
    cases = {"nothing": dict.fromkeys(names, nothing)}
    for name in names:
        cases[f"all {name}"] = {**cases["nothing"], name: ~nothing}
    if {"text", "words"} <= set(names):  # both come from the same texts
        cases["all text and words"] = {**cases["nothing"], "text": ~nothing, "words": ~nothing}
    rng = np.random.default_rng(_SEED)
    several = np.sum([modality.present for modality in catalogue.modalities.values()], 0) > 1
    half = several & (rng.random(catalogue.n_rows) < 0.5) & (np.arange(catalogue.n_rows) >= FIRST_ITEM_ROW)
    loser = rng.integers(len(names), size=catalogue.n_rows)
    cases["a random one of half the items"] = {name: half & (loser == index) for index, name in enumerate(names)}
    found: dict[str, Any] = {}
    for case, hidden in cases.items():
        reduced = withheld(catalogue, hidden)
        model = without_vectors(loaded.model, reduced)
        metrics = quick_metrics(ModelScorer.with_popularity(model, reduced), sessions, catalogue.n_rows)
        found[case] = {
            protocol: {key: round(float(metrics[protocol][key] or 0), 4) for key in ("recall@10", "ndcg@10")}
            for protocol in metrics
        }
    full = found["nothing"]
    shares = {
        case: {p: round(values[p]["recall@10"] / max(full[p]["recall@10"], 1e-9), 3) for p in full}
        for case, values in found.items()
        if case != "nothing"
    }
    config = loaded.recipe.model
    kept = ("item_ids", "modality_dropout", "id_dropout", "n_neighbours", "n_similar_items", "history_bias")
    return {"model": {key: getattr(config, key) for key in kept}, "withheld": found, "recall_kept": shares}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, action="append", required=True, help="folder of missrec train; repeatable")
    parser.add_argument("--name", default="missing-modality")
    options = parser.parse_args()
    report(options.name, {"runs": {str(Path(*run.parts[-2:])): measure(run) for run in options.run}})


if __name__ == "__main__":
    run_as_command(main)
