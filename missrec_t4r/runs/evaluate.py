"""`missrec evaluate`: rank the catalogue with a run, with its network and its terms alone, and with tuned baselines.

Three protocols (`missrec_t4r.ranking.protocols`), slices of sessions and targets, bootstrap intervals, paired
differences to every other system, and the protocol checklist: what a reader must know to compare the figures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.config.checks import require_choices
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import (
    PROTOCOLS,
    Ranking,
    Scored,
    Scorer,
    protocols_of,
    rank_catalogue,
    rank_systems,
    targets_in_history,
)
from missrec_t4r.evaluation.metrics import (
    KS,
    bootstrap_intervals,
    coverage,
    metrics,
    named_differences,
    paired_differences,
    users_of,
)
from missrec_t4r.evaluation.slices import slices
from missrec_t4r.io.json_files import write_json
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.protocols import EXPORTED, BlendScorer, blends_of
from missrec_t4r.ranking.tune import Validation
from missrec_t4r.ranking.tune_baselines import Tuned, tuned_content_knn, tuned_item_knn
from missrec_t4r.runs.checklist import NOT_RECORDED, checklist
from missrec_t4r.runs.run_folder import load_run, read_info, sessions_checksum, trained_on
from missrec_t4r.runs.sasrec_file import kept_sasrec
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW

log = logging.getLogger(__name__)

EVALUATED_SPLITS: Final = ("valid", "test")
BASELINES: Final = ("popularity", "item_knn", "content_knn")
"""Those that need no training."""
ALL_BASELINES: Final = (*BASELINES, "sasrec")

System = Scorer | Mapping[str, Scorer]
"""One scorer, or one per protocol if its settings were tuned per protocol."""


def evaluate(
    run: str | Path,
    *,
    split: Literal["test", "valid"] = "test",
    data: str | Path | None = None,
    baselines: Sequence[str] | bool = BASELINES,
    alone: bool = False,
    out: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Rank the whole catalogue for every session under three protocols, beside the baselines.

    excluded: the session's items cannot be recommended. kept_strict: all items are ranked, and no part of a score
    depends on whether the item is in the session. kept_with_history_term: all items are ranked, and a score may depend
    on it.

    Parameters
    ----------
    run : path
        Run folder written by `missrec train`.
    split : {"test", "valid"}
        Sessions to evaluate. Baselines and blend weights are tuned on valid, so the figures there are optimistic.
    data : path, optional
        Data folder, if it was moved since training.
    baselines : sequence of str, or bool
        Baselines to tune and rank beside, comma-separated: popularity, item_knn, content_knn and sasrec, which is
        trained first and kept in the run folder. From Python, True stands for the first three.
    alone : bool
        Rank no baseline, and not the model's score terms without its network.
    out : path, optional
        JSON file to write; by default metrics_<split>.json in the run folder.
    dry_run : bool
        Load the run and the sessions and print what would be ranked; write nothing.

    Returns
    -------
    dict
        As `evaluate_sessions` returns it, with ``split``, ``data``, ``checklist``, ``blend_settings``,
        ``baseline_settings`` and ``seconds``.

    Raises
    ------
    ConfigError
        An unknown split or baseline.
    MISSRecError
        The run or the data folder is missing, incomplete, or does not fit.
    """
    require_choices(split=(split, EVALUATED_SPLITS))
    names = [] if alone else checked_baselines(baselines)
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
            "baselines": names,
            "would_write": [str(file)],
            "would_replace": file.exists(),
        }
    info = read_info(Path(run))
    train, valid = (load_sessions(loaded.data, name, loaded.model.event_columns) for name in ("train", "valid"))
    train, valid = train.known(), valid.with_known_target()
    if trained_on(Path(run)) not in (None, sessions_checksum((train, valid))):
        log.warning(
            f"{run} was trained on other sessions than {loaded.data} holds: its figures are not comparable with those "
            "of runs that were trained on these"
        )
    validation = Validation(loaded.model, loaded.catalogue, train, valid)
    blends, blend_settings = blends_of(loaded.model, validation, alone=bool(names))
    if EXPORTED in blends:
        blend_settings[EXPORTED] = info.get("score_terms", NOT_RECORDED)
    tuned = time.perf_counter()
    systems: dict[str, System] = {}
    settings: dict[str, Any] = {}
    if names:
        systems, settings = fitted_baselines(loaded.data, loaded.catalogue, names=names, keep=Path(run))
    baselines_done = time.perf_counter()
    report = {
        "split": split,
        "data": str(loaded.data),
        "checklist": checklist(loaded, info, len(validation.histories)),
        **evaluate_sessions(systems, sessions, loaded.catalogue, together=BlendScorer(validation.scorer, blends)),
        "blend_settings": blend_settings,
        "baseline_settings": settings,
        "seconds": {
            "tuning": round(tuned - started, 2),
            "baselines": round(baselines_done - tuned, 2),
            "ranking": round(time.perf_counter() - baselines_done, 2),
        },
    }
    write_json(file, report, allow_nan=False)
    return report | {"file": str(file)}


def checked_baselines(names: Sequence[str] | str | bool, others: Sequence[str] = ()) -> list[str]:
    """Return the names of baselines, each once; True stands for `BASELINES`.

    Parameters
    ----------
    names : sequence of str, one name, or bool
    others : sequence of str
        What else may be named.

    Raises
    ------
    ConfigError
        An unknown name.
    """
    if isinstance(names, bool):
        names = BASELINES if names else ()
    chosen = [*dict.fromkeys([names] if isinstance(names, str) else names)]
    known = (*ALL_BASELINES, *others)
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(f"the baseline {unknown[0]!r}", f"some of {', '.join(known)}", "check --baselines")
    return chosen


def fitted_baselines(
    data: Path,
    catalogue: Catalogue | None = None,
    *,
    names: Sequence[str] = BASELINES,
    keep: Path | None = None,
    look_in: Sequence[Path] = (),
) -> tuple[dict[str, System], dict[str, Any]]:
    """Fit baselines on the train split and tune them on the valid split.

    Parameters
    ----------
    data : Path
        Data folder.
    catalogue : Catalogue, optional
        That of the folder, if it is loaded already.
    names : sequence of str
        Which of them, `ALL_BASELINES`.
    keep, look_in
        Folders of a trained ``sasrec``, as in `missrec_t4r.runs.sasrec_file.kept_sasrec`.

    Returns
    -------
    systems : dict of str to System
        In the order of `ALL_BASELINES`; ``content_knn`` where the catalogue has modality vectors.
    settings : dict
        ``{system: {protocol: {setting: value, "valid_ndcg@10": …}}}``.
    """
    catalogue = catalogue or Catalogue.load(data / CATALOGUE_FOLDER)
    train, valid = Sessions.load(data / "train", ()), Sessions.load(data / "valid", ())
    tune: dict[str, Callable[[], Mapping[str, Tuned] | None]] = {
        "item_knn": lambda: tuned_item_knn(train, valid, catalogue),
        "content_knn": lambda: tuned_content_knn(valid, catalogue),
        "sasrec": lambda: kept_sasrec(train, valid, catalogue, keep, look_in),
    }
    systems: dict[str, System] = {"popularity": Popularity.fit(catalogue)} if "popularity" in names else {}
    settings: dict[str, Any] = {}
    for name in tune:
        if name in names and (best := tune[name]()):
            systems[name] = {protocol: tuned.scorer for protocol, tuned in best.items()}
            settings[name] = {protocol: tuned.describe() for protocol, tuned in best.items()}
    return systems, settings


def evaluate_sessions(
    systems: Mapping[str, System],
    sessions: Sessions,
    catalogue: Catalogue,
    *,
    together: Callable[[Sessions], Iterable[Scored]] | None = None,
) -> dict[str, Any]:
    """Rank the whole catalogue with every system and return the report; needs no run folder.

    Parameters
    ----------
    systems : mapping of str to Scorer, or to ``{protocol: Scorer}``
        The first one is compared with each of the others, paired by user.
    together : function, optional
        Scores of several systems that share work, as `rank_systems` takes it; they come before ``systems``.
    sessions : Sessions
        Evaluation rows: history and target, which is the last item.

    Returns
    -------
    dict
        ``n_users``; ``protocols[protocol][system]`` = metrics and ``interval``, for the systems that the protocol
        has; ``slices[name]`` = ``n`` and the same per protocol; ``coverage[protocol][system]``;
        ``differences[protocol][other]``; ``counts`` of targets that are not in the ranking.
    """
    if not len(sessions):
        raise DataError("the split has no session", "at least one history with a target", "re-run missrec etl")
    histories, targets = sessions.split_last()
    rankings: dict[str, Ranking] = {}
    if together is not None:
        rankings = rank_systems(together, histories, targets, catalogue.n_rows, top_k=max(KS), description="ranking")
    for name, system in systems.items():
        rankings[name] = rank_system(system, histories, targets, catalogue, max(KS), f"ranking {name}")
    masks, users = slices(histories, targets, catalogue), users_of(sessions)
    ranks_of = {
        protocol: {name: ranking.ranks[protocol] for name, ranking in rankings.items() if protocol in ranking.ranks}
        for protocol in PROTOCOLS
    }
    measured = {part: _measured(ranks_of, users, mask) for part, mask in masks.items()}
    return {
        "n_users": len(sessions),
        "n_items": catalogue.n_items,
        "protocols": measured["all"],
        "slices": {part: {"n": int(masks[part].sum()), **protocols} for part, protocols in measured.items()},
        "coverage": {
            protocol: {
                name: _coverage(rankings[name].recommended[protocol], catalogue.n_items) for name in systems_ranks
            }
            for protocol, systems_ranks in ranks_of.items()
        },
        "differences": {protocol: _differences(systems_ranks, users) for protocol, systems_ranks in ranks_of.items()},
        "counts": {
            "targets_in_history": int(targets_in_history(histories, targets).sum()),
            "targets_no_item": int((targets < FIRST_ITEM_ROW).sum()),
            "targets_unrecommendable": {name: ranking.n_unrecommendable for name, ranking in rankings.items()},
            "sessions_without_known_item": int((histories.known().lengths == 0).sum()),
        },
    }


def rank_system(
    system: System,
    histories: Sessions,
    targets: Ints,
    catalogue: Catalogue,
    top_k: int,
    description: str,
) -> Ranking:
    """Rank with a system, in one pass per distinct scorer over the protocols that use it; without retired items."""
    per_protocol = dict(system) if isinstance(system, Mapping) else dict.fromkeys(protocols_of(system), system)
    passes = [
        rank_catalogue(
            _WithoutRetired(scorer, torch.from_numpy(np.flatnonzero(catalogue.retired))),
            histories,
            targets,
            catalogue.n_rows,
            top_k=top_k,
            protocols=[protocol for protocol, its_scorer in per_protocol.items() if its_scorer is scorer],
            description=description,
        )
        for scorer in {id(scorer): scorer for scorer in per_protocol.values()}.values()
    ]
    return Ranking(
        {protocol: ranks for result in passes for protocol, ranks in result.ranks.items()},
        {protocol: rows for result in passes for protocol, rows in result.recommended.items()},
        max(result.n_unrecommendable for result in passes),
    )


@dataclass(frozen=True)
class _WithoutRetired:
    """A scorer that does not recommend retired items, as no served model does."""

    scorer: Scorer
    retired: Tensor
    """Catalogue rows."""

    @property
    def protocols(self) -> Sequence[str]:
        return protocols_of(self.scorer)

    def __call__(self, histories: Sessions) -> Tensor:
        scores = self.scorer(histories)
        return scores.index_fill(1, self.retired.to(scores.device), -torch.inf) if len(self.retired) else scores


def _measured(
    ranks_of: Mapping[str, Mapping[str, Ints]], users: Ints | None, mask: Bools
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the metrics of some sessions with their intervals, by protocol and system."""
    users = None if users is None else users[mask]
    return {
        protocol: {
            name: {**metrics(ranks[mask]), "interval": bootstrap_intervals(ranks[mask], users=users)}
            for name, ranks in systems.items()
        }
        for protocol, systems in ranks_of.items()
    }


def _coverage(recommended: Ints, n_items: int) -> dict[str, float]:
    return {f"coverage@{k}": coverage(recommended[:, :k], n_items) for k in KS}


def _differences(systems: Mapping[str, Ints], users: Ints | None) -> dict[str, Any]:
    """Return the paired differences of the first system to each of the others."""
    names = [*systems]
    return {
        name: named_differences(paired_differences(systems[names[0]], systems[name], users=users)) for name in names[1:]
    }
