"""`compare`: the same sessions and targets for every system, paired differences by user, a verdict, JSON and a page."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.comparison.benchmark import Benchmark, Ranked
from missrec_t4r.comparison.beyond_accuracy import MEASURES, BeyondAccuracy
from missrec_t4r.comparison.examples import examples, outcomes, shown_ids
from missrec_t4r.comparison.page import page
from missrec_t4r.comparison.systems import OF_A_RUN, System, named, runs_of
from missrec_t4r.comparison.verdict import decide, explanation, measures_of, sentence
from missrec_t4r.config.checks import require_at_least, require_choices
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.features.thumbnails import thumbnails
from missrec_t4r.evaluation.full_ranking import KEPT_STRICT, PROTOCOLS
from missrec_t4r.evaluation.metrics import KS, bootstrap_intervals, metrics, paired_differences, users_of
from missrec_t4r.evaluation.slices import slices
from missrec_t4r.io.atomic import write_text
from missrec_t4r.io.json_files import write_json
from missrec_t4r.runs.evaluate import ALL_BASELINES, EVALUATED_SPLITS, checked_baselines
from missrec_t4r.runs.run_folder import versions
from missrec_t4r.schema import FIRST_ITEM_ROW

log = logging.getLogger(__name__)

JSON_FILE, PAGE_FILE = "comparison.json", "comparison.html"
FEW_SESSIONS: Final = 100
"""Fewer make a verdict doubtful, which a warning says."""
MOST_VALUES: Final = 8
"""Values of a column that become slices: the most frequent ones among the targets."""
MISSING: Final = "missing"
"""Value of a target that has none in the column."""


def compare(
    systems: Mapping[str, Any] | Sequence[Any],
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: Literal["test", "valid"] = "test",
    candidate: str | None = None,
    baselines: Sequence[str] = (),
    protocols: Sequence[str] = PROTOCOLS,
    slice_columns: Sequence[str] = (),
    gate: str | Path | None = None,
    max_sequence_length: int | None = None,
    image_column: str | None = None,
    images: str | Path | None = None,
    trust_pickle: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compare systems on the same sessions and targets, with paired differences, slices, a verdict and a page.

    Parameters
    ----------
    systems : sequence, or mapping of name to system
        The current system, the candidate, and any others; each as PATH or NAME=PATH: a run folder (several seeds:
        NAME=RUN1,RUN2), a folder of tr.Model.save, a parquet file of lists (user_id, item_id in order), or popularity,
        item_knn, content_knn, sasrec, network, terms (of the first run). From Python also a ``tr.Model``, or a function
        that scores sessions (`missrec_t4r.evaluation.full_ranking.Scorer`).
    out : path, optional
        Folder for comparison.json and comparison.html.
    data : path, optional
        Data folder with the sessions, on which every run is ranked; by default that of the first run, and other runs
        are ranked on their own folders and matched by user and target.
    split : {"test", "valid"}
        Sessions to compare on.
    candidate : str, optional
        Name of the system that the verdict is about; by default the second one.
    baselines : sequence of str
        Baselines to show beside: popularity, item_knn, content_knn, sasrec (trained first, and kept in the folder of
        the comparison), network, terms; comma-separated.
    protocols : sequence of str
        How seen items are treated, comma-separated; the verdict is by the first one.
    slice_columns : sequence of str
        Columns of the item table, such as category: a slice for each of the frequent values of the target.
    gate : path, optional
        YAML of bounds on the candidate's measures, measure: {min: ..., max: ...}; without it the 95 % interval of the
        paired difference in NDCG@10 decides.
    max_sequence_length : int, optional
        Last items of a session that a T4R model reads, if its schema does not state it.
    image_column : str, optional
        Column of the item table with the path of the item's picture, relative to --images, for the examples of the
        page; by default what `missrec features` read.
    images : path, optional
        Folder of these pictures. Without --image-column a picture is found by its name, <item_id>.png or the like.
    trust_pickle : bool
        Read saved T4R models, which are pickles and can run any code: only your own.
    dry_run : bool
        Check the systems and print what would be compared; rank and write nothing.

    Returns
    -------
    dict
        ``verdict`` (``decision``, ``summary``, ``explanation``, ``gate``), ``protocols[protocol][system]``,
        ``differences`` (each system minus the current one), ``outcomes`` (sessions that each of the two does better
        on), ``slices``, ``beyond_accuracy``, ``sessions`` (compared and left out), ``examples``, ``systems``; with
        ``out`` also ``report`` and ``page``.

    Raises
    ------
    ConfigError
        Fewer than two systems, an unknown name, or a gate that cannot be read.
    MISSRecError
        A run, model or file that cannot be ranked; no session that all systems have.

    Examples
    --------
    >>> result = compare({"today": "lists.parquet", "new": ["runs/1", "runs/2"]}, data="data")      # doctest: +SKIP
    >>> result["verdict"]["decision"]                                                               # doctest: +SKIP
    'ship'
    """
    require_at_least(1, max_sequence_length=max_sequence_length)
    extra = checked_baselines(baselines, OF_A_RUN)
    chosen = named(systems, extra, trust_pickle=trust_pickle, max_sequence_length=max_sequence_length)
    folder = None if out is None else Path(out)
    if folder is not None and folder.is_file():
        raise ConfigError(f"--out {out} is a file", "a folder for the comparison", "give another --out")
    candidate = _checked_candidate(chosen, candidate, split, protocols)
    runs = runs_of(chosen)
    trained_on = {run.name: checksum for run in runs if (checksum := run.trained_on()) is not None}
    if data is None and not runs:
        raise ConfigError("no run and no --data", "the data folder with the sessions to compare on", "give --data")
    benchmark = Benchmark(
        Path(data) if data is not None else runs[0].data,
        split,
        protocols,
        shared=data is not None,
        keep=folder,
        look_in=[run_folder for run in runs for run_folder in run.folders],
    )
    if missing := [name for name in slice_columns if name not in benchmark.catalogue.items.column_names]:
        columns = ", ".join(benchmark.catalogue.items.column_names)
        raise ConfigError(f"no column {missing[0]!r} in the catalogue", f"one of {columns}", "check --slice-columns")
    if image_column is not None or images is not None:
        thumbnails(benchmark.catalogue, [], column=image_column, images=images)  # refuses before the ranking
    files = [] if folder is None else [folder / JSON_FILE, folder / PAGE_FILE]
    if dry_run:
        return {
            "dry_run": True,
            "current": chosen[0].name,
            "candidate": candidate,
            "systems": {system.name: system.kind for system in chosen},
            "data": str(benchmark.data),
            "sessions": len(benchmark.sessions),
            "would_write": [str(file) for file in files],
        }
    ranked = [system.rank(benchmark) for system in chosen]
    _note_other_training(ranked, trained_on)
    report = _report(ranked, benchmark, candidate, slice_columns, None if gate is None else Path(gate))
    if files:
        pictures = thumbnails(benchmark.catalogue, shown_ids(report["examples"]), column=image_column, images=images)
        write_json(files[0], report, allow_nan=False)
        write_text(files[1], page(report, pictures))
        report |= {"report": str(files[0]), "page": str(files[1])}
    return report


def _checked_candidate(systems: Sequence[System], candidate: str | None, split: str, protocols: Sequence[str]) -> str:
    """Return the candidate's name."""
    require_choices(split=(split, EVALUATED_SPLITS))
    if unknown := sorted(set(protocols) - set(PROTOCOLS)):
        raise ConfigError(f"the protocol {unknown[0]!r}", f"some of {', '.join(PROTOCOLS)}", "check --protocols")
    if len(systems) < 2 or not protocols:
        raise ConfigError(
            f"{len(systems)} systems under {len(protocols)} protocols",
            "two systems or more: the current one first, then the candidate",
            f"add one, or compare with a baseline: {', '.join(ALL_BASELINES)}",
        )
    others = [system.name for system in systems[1:]]
    if candidate is not None and candidate not in others:
        raise ConfigError(f"--candidate {candidate}", f"one of {', '.join(others)}")
    return candidate or others[0]


def _note_other_training(ranked: Sequence[Ranked], trained_on: Mapping[str, int]) -> None:
    """Note, and warn, where two runs were trained on different sessions: not the model alone makes the difference."""
    first = next(iter(trained_on), None)
    for system in ranked:
        if first is not None and trained_on.get(system.name, trained_on[first]) != trained_on[first]:
            system.notes.append(f"trained on other sessions than {first}: the difference is of models and data")
            log.warning(f"{system.name} was {system.notes[-1]}")


def _report(
    systems: Sequence[Ranked], benchmark: Benchmark, candidate: str, slice_columns: Sequence[str], gate: Path | None
) -> dict[str, Any]:
    """Return the content of comparison.json."""
    sessions, current = _common_sessions(systems, benchmark), systems[0].name
    protocols = _protocols_of_both([system for system in systems if system.name in (current, candidate)], benchmark)
    ranks, lists = (_by_protocol(systems, sessions, protocols, what) for what in ("ranks", "lists"))
    main, histories, targets = protocols[0], benchmark.histories.take(sessions), benchmark.targets[sessions]
    compared = benchmark.sessions.take(sessions)
    users, beyond = users_of(compared), BeyondAccuracy(benchmark.catalogue, targets)
    masks = slices(histories, targets, benchmark.catalogue) | _values(slice_columns, targets, benchmark.catalogue)
    report: dict[str, Any] = {
        "format": 1,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "data": str(benchmark.data),
        "split": benchmark.split,
        "current": current,
        "candidate": candidate,
        "n_users": len(sessions),
        "n_items": benchmark.catalogue.n_items,
        "systems": {system.name: _description(system, ranks[main], benchmark.protocols) for system in systems},
        "sessions": {
            "in_split": len(benchmark.sessions),
            "compared": len(sessions),
            "left_out": len(benchmark.sessions) - len(sessions),
            "targets_no_item": int((targets < FIRST_ITEM_ROW).sum()),
            "without_known_item": int((histories.lengths == 0).sum()),
        },
        "protocols": {p: _accuracy(of, users) for p, of in ranks.items()},
        "differences": {
            p: {name: _difference(own, of[current], users, masks["all"]) for name, own in of.items() if name != current}
            for p, of in ranks.items()
        },
        "slices": {
            name: {
                "n": int(mask.sum()),
                **{p: {system: metrics(own[mask]) for system, own in of.items()} for p, of in ranks.items()},
                "differences": {p: _difference(of[candidate], of[current], users, mask) for p, of in ranks.items()},
            }
            for name, mask in masks.items()
        },
        "beyond_accuracy": {p: {name: _mean(beyond, shown) for name, shown in of.items()} for p, of in lists.items()},
        "popularity_of_targets": beyond.of_targets,
        "outcomes": {p: outcomes(of[current], of[candidate]) for p, of in ranks.items()},
    }
    report["verdict"] = _verdict(report, main, gate)
    first_seeds = {name: (ranks[main][name][:, 0], lists[main][name][:, 0]) for name in (current, candidate)}
    report["examples"] = examples(benchmark.catalogue, histories, targets, first_seeds, users=compared)
    return report


def _protocols_of_both(both: Sequence[Ranked], benchmark: Benchmark) -> list[str]:
    """Return the protocols under which the current system and the candidate were ranked; the verdict is by the first.

    Raises
    ------
    ConfigError
        There is none.
    """
    protocols = [name for name in benchmark.protocols if all(name in system.protocols for system in both)]
    if not protocols:
        raise ConfigError(
            f"no protocol of {', '.join(benchmark.protocols)} that {both[0].name} and {both[1].name} both have",
            "excluded, which every system has",
            "add it to --protocols",
        )
    return protocols


def _verdict(report: Mapping[str, Any], protocol: str, gate: Path | None) -> dict[str, Any]:
    decision, checks = decide(measures_of(report), protocol, gate)
    return {
        "decision": decision,
        "summary": sentence(report, decision, protocol),
        "explanation": explanation(report, protocol),
        "protocol": protocol,
        "rule": "the bounds of the gate" if gate else "95 % interval of the paired difference in NDCG@10",
        "gate": checks,
    }


def _common_sessions(systems: Sequence[Ranked], benchmark: Benchmark) -> Ints:
    """Return the indices of the sessions that all systems have; warn where they are few."""
    common, total = np.arange(len(benchmark.sessions)), len(benchmark.sessions)
    for system in systems:
        for seed in system.seeds:
            common = np.intersect1d(common, seed.sessions)
    if not len(common):
        raise DataError(
            "no session that all systems have", "the same users with the same targets", "leave a system out, or --data"
        )
    if len(common) < total:
        log.warning(f"compared on {len(common):,} of {total:,} sessions: those that all systems have")
    if len(common) < FEW_SESSIONS:
        log.warning(f"{len(common)} sessions are too few: intervals of so few, and a verdict by them, mean little")
    return common


def _by_protocol(
    systems: Sequence[Ranked], sessions: Ints, protocols: Sequence[str], what: Literal["ranks", "lists"]
) -> dict[str, dict[str, Ints]]:
    """Return ranks [session, seed] or lists [session, seed, place] of some sessions, by protocol and system."""
    result: dict[str, dict[str, Ints]] = {protocol: {} for protocol in protocols}
    for system in systems:
        places = [np.searchsorted(seed.sessions, sessions) for seed in system.seeds]
        for protocol in (name for name in protocols if name in system.protocols):
            seeds = zip(system.seeds, places, strict=True)
            result[protocol][system.name] = np.stack([getattr(seed, what)[protocol][at] for seed, at in seeds], axis=1)
    return result


def _accuracy(ranks: Mapping[str, Ints], users: Ints | None) -> dict[str, Any]:
    return {name: {**metrics(own), "interval": bootstrap_intervals(own, users=users)} for name, own in ranks.items()}


def _mean(beyond: BeyondAccuracy, lists: Ints) -> dict[str, float | None]:
    """Return the mean over seeds of the measures of lists [session, seed, place]."""
    seeds = [beyond(own) for own in np.moveaxis(lists, 1, 0)]
    result: dict[str, float | None] = {}
    for name in MEASURES:
        values = [value for seed in seeds if (value := seed[name]) is not None]
        result[name] = float(np.mean(values)) if values else None
    return result


def _description(system: Ranked, ranks: Mapping[str, Ints], protocols: Sequence[str]) -> dict[str, Any]:
    """Return what the report says of a system; ``ranks`` are those of the protocol of the verdict."""
    described: dict[str, Any] = {
        "kind": system.kind,
        "bytes": system.size,
        "ranked_items": system.n_items,
        "cost": system.cost,
        "protocols": system.protocols,
    }
    if len(system.seeds) > 1:
        values = [metrics(seed)["ndcg@10"] for seed in ranks[system.name].T]
        described["seeds"] = {"n": len(values), "ndcg@10": values}
    notes = list(system.notes)
    if KEPT_STRICT in protocols and KEPT_STRICT not in system.protocols:
        notes.append(f"its scores may depend on whether an item is in the session: not ranked under {KEPT_STRICT}")
    return described | {"counts": system.counts, "notes": notes}


def _difference(first: Ints, second: Ints, users: Ints | None, mask: Bools) -> dict[str, Any] | None:
    """Return first minus second for every metric, with the change relative to the second; None without a session."""
    if not mask.any():
        return None
    of_second = metrics(second[mask])
    of_mask = None if users is None else users[mask]
    differences = paired_differences(first[mask], second[mask], KS, users=of_mask)
    return {
        name: {**found._asdict(), "relative": found.difference / value if (value := of_second[name]) else None}
        for name, found in differences.items()
    }


def _values(columns: Sequence[str], targets: Ints, catalogue: Catalogue) -> dict[str, Bools]:
    """Return a mask per frequent value of a catalogue column, of the target; `MISSING` where it has none.

    A value that is called so itself stands in quotes.
    """
    masks: dict[str, Bools] = {}
    for column in columns:
        items = catalogue.items[column].to_pylist()
        texts = [MISSING if value is None else repr(value) if value == MISSING else str(value) for value in items]
        values = np.array([None] * FIRST_ITEM_ROW + texts, object)  # as text every one would take the longest's room
        of_target = values[targets]
        frequent = Counter(sorted(of_target[targets >= FIRST_ITEM_ROW].tolist())).most_common(MOST_VALUES)
        masks |= {f"{column}={name}": of_target == name for name, _ in frequent}
    return masks
