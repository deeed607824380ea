"""`missrec evaluate`: rank the catalogue with a run and with tuned popularity, item-kNN and content-kNN baselines.

Both protocols, slices of sessions and targets, bootstrap intervals, and paired differences to every baseline.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import PROTOCOLS, Ranking, Scorer, rank_catalogue, targets_in_history
from missrec_t4r.evaluation.metrics import (
    KS,
    bootstrap_intervals,
    coverage,
    metrics,
    named_differences,
    paired_differences,
)
from missrec_t4r.evaluation.report import write_report
from missrec_t4r.evaluation.slices import slices
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.tune_baselines import tuned_content_knn, tuned_item_knn
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW

MODEL: Final = "model"
EVALUATED_SPLITS: Final = ("valid", "test")

System = Scorer | Mapping[str, Scorer]
"""One scorer, or one per protocol if its settings were tuned per protocol."""


def evaluate(
    run: str | Path,
    *,
    split: Literal["test", "valid"] = "test",
    data: str | Path | None = None,
    baselines: bool = True,
    out: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Rank the whole catalogue for every session, with seen items kept and excluded, beside the baselines.

    Parameters
    ----------
    run : path
        Run folder written by `missrec train`.
    split : {"test", "valid"}
        Sessions to evaluate. The baselines are tuned on valid, so their figures there are optimistic.
    data : path, optional
        Data folder, if it was moved since training.
    baselines : bool
        Also tune and rank popularity, item-kNN and content-kNN.
    out : path, optional
        JSON file to write; by default metrics_<split>.json in the run folder.
    dry_run : bool
        Load the run and the sessions and print what would be ranked; write nothing.

    Returns
    -------
    dict
        As `evaluate_sessions` returns it, with ``split``, ``data``, ``baseline_settings`` and ``seconds``.

    Raises
    ------
    ConfigError
        An unknown split.
    MISSRecError
        The run or the data folder is missing, incomplete, or does not fit.
    """
    from missrec_t4r.ranking.scorer import ModelScorer
    from missrec_t4r.runs.run_folder import load_run

    if split not in EVALUATED_SPLITS:
        raise ConfigError(f"--split {split}", f"one of {', '.join(EVALUATED_SPLITS)}")
    started = time.perf_counter()
    loaded = load_run(run, data)
    sessions = load_sessions(loaded.data, split, loaded.model.event_columns)
    file = Path(out or Path(run) / f"metrics_{split}.json")
    if dry_run:
        return {
            "dry_run": True,
            "split": split,
            "data": str(loaded.data),
            "n_users": len(sessions),
            "n_items": loaded.catalogue.n_items,
            "baselines": baselines,
            "would_write": [str(file)],
            "would_replace": file.exists(),
        }
    systems: dict[str, System] = {MODEL: ModelScorer.with_popularity(loaded.model, loaded.catalogue)}
    settings: dict[str, Any] = {}
    if baselines:
        fitted, settings = fitted_baselines(loaded.data, loaded.catalogue)
        systems |= fitted
    baselines_done = time.perf_counter()
    report = {
        "split": split,
        "data": str(loaded.data),
        **evaluate_sessions(systems, sessions, loaded.catalogue),
        "baseline_settings": settings,
        "seconds": {
            "baselines": round(baselines_done - started, 2),
            "ranking": round(time.perf_counter() - baselines_done, 2),
        },
    }
    write_report(report, file)
    return report | {"file": str(file)}


def fitted_baselines(
    data: Path, catalogue: Catalogue | None = None, *, seed: int = 0
) -> tuple[dict[str, System], dict[str, Any]]:
    """Fit popularity, item-kNN and content-kNN on the train split and tune them on the valid split.

    Returns
    -------
    systems : dict of str to System
        ``popularity``, ``item_knn`` and, where the catalogue has modality vectors, ``content_knn``.
    settings : dict
        ``{system: {protocol: {setting: value, "valid_ndcg@10": …}}}``.
    """
    catalogue = catalogue or Catalogue.load(data / CATALOGUE_FOLDER)
    train, valid = Sessions.load(data / "train", ()), Sessions.load(data / "valid", ())
    tuned = {
        "item_knn": tuned_item_knn(train, valid, catalogue, seed=seed),
        "content_knn": tuned_content_knn(valid, catalogue, seed=seed),
    }
    systems: dict[str, System] = {"popularity": Popularity.fit(catalogue)}
    settings: dict[str, Any] = {}
    for name, best in tuned.items():
        if best:
            systems[name] = {protocol: winner.scorer for protocol, winner in best.items()}
            settings[name] = {protocol: winner.describe() for protocol, winner in best.items()}
    return systems, settings


def evaluate_sessions(
    systems: Mapping[str, System],
    sessions: Sessions,
    catalogue: Catalogue,
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
) -> dict[str, Any]:
    """Rank the whole catalogue with every system and return the report; needs no run folder.

    Parameters
    ----------
    systems : mapping of str to Scorer, or to ``{protocol: Scorer}``
        The first one is compared with each of the others, paired by user.
    sessions : Sessions
        Evaluation rows: history and target, which is the last item.

    Returns
    -------
    dict
        ``n_users``; ``protocols[protocol][system]`` = metrics and ``interval``; ``slices[name]`` = ``n`` and the same
        per protocol; ``coverage[protocol][system]``; ``differences[protocol][other]``; ``counts`` of targets that are
        not in the ranking.
    """
    if not len(sessions):
        raise DataError("the split has no session", "at least one history with a target", "re-run missrec etl")
    histories, targets = sessions.split_last()
    rankings = {
        name: _rank(system, histories, targets, catalogue, max(ks), f"ranking {name}")
        for name, system in systems.items()
    }
    masks = slices(histories, targets, catalogue)
    overall = {
        protocol: {name: _with_interval(ranking.ranks[protocol], ks, seed) for name, ranking in rankings.items()}
        for protocol in PROTOCOLS
    }
    return {
        "n_users": len(sessions),
        "n_items": catalogue.n_items,
        "protocols": overall,
        "slices": {
            part: {
                "n": int(mask.sum()),
                **{
                    protocol: {
                        name: _with_interval(ranking.ranks[protocol][mask], ks, seed)
                        for name, ranking in rankings.items()
                    }
                    for protocol in PROTOCOLS
                },
            }
            for part, mask in masks.items()
        },
        "coverage": _coverage(rankings, ks, catalogue.n_items),
        "differences": _differences(rankings, ks, seed),
        "counts": {
            "targets_in_history": int(targets_in_history(histories, targets).sum()),
            "targets_no_item": int((targets < FIRST_ITEM_ROW).sum()),
            "targets_unrecommendable": {name: ranking.n_unrecommendable for name, ranking in rankings.items()},
            "sessions_without_known_item": int((histories.known().lengths == 0).sum()),
        },
    }


def _rank(
    system: System,
    histories: Sessions,
    targets: Ints,
    catalogue: Catalogue,
    top_k: int,
    description: str,
) -> Ranking:
    # One pass per distinct scorer, over the protocols that use it
    per_protocol = dict(system) if isinstance(system, Mapping) else dict.fromkeys(PROTOCOLS, system)
    passes = [
        rank_catalogue(
            scorer,
            histories,
            targets,
            catalogue.n_rows,
            top_k=top_k,
            protocols=[protocol for protocol in PROTOCOLS if per_protocol[protocol] is scorer],
            description=description,
        )
        for scorer in {id(scorer): scorer for scorer in per_protocol.values()}.values()
    ]
    return Ranking(
        {protocol: ranks for result in passes for protocol, ranks in result.ranks.items()},
        {protocol: rows for result in passes for protocol, rows in result.recommended.items()},
        max(result.n_unrecommendable for result in passes),
    )


def _with_interval(ranks: Ints, ks: Sequence[int], seed: int) -> dict[str, Any]:
    return {**metrics(ranks, ks), "interval": bootstrap_intervals(ranks, ks, seed=seed)}


def _coverage(rankings: Mapping[str, Ranking], ks: Sequence[int], n_items: int) -> dict[str, Any]:
    return {
        protocol: {
            name: {f"coverage@{k}": coverage(ranking.recommended[protocol][:, :k], n_items) for k in ks}
            for name, ranking in rankings.items()
        }
        for protocol in PROTOCOLS
    }


def _differences(rankings: Mapping[str, Ranking], ks: Sequence[int], seed: int) -> dict[str, Any]:
    first, *others = rankings
    return {
        protocol: {
            other: named_differences(
                paired_differences(rankings[first].ranks[protocol], rankings[other].ranks[protocol], ks, seed=seed)
            )
            for other in others
        }
        for protocol in PROTOCOLS
    }
