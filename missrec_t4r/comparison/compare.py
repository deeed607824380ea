"""`compare`: the same sessions and targets for every system, paired differences by user, a verdict, JSON and a page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.comparison.beyond_accuracy import MEASURES, BeyondAccuracy
from missrec_t4r.comparison.examples import examples, outcomes, shown_ids
from missrec_t4r.comparison.page import page
from missrec_t4r.comparison.systems import (
    OF_A_RUN,
    Benchmark,
    Named,
    Ranked,
    first_data_folder,
    named,
    ranked,
    training_sessions,
)
from missrec_t4r.comparison.verdict import decide, measures_of, plainly, sentence
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.features.thumbnails import thumbnails
from missrec_t4r.evaluation.full_ranking import KEPT_STRICT, PROTOCOLS
from missrec_t4r.evaluation.metrics import KS, Difference, bootstrap_intervals, metrics, paired_differences, users_of
from missrec_t4r.evaluation.slices import slices
from missrec_t4r.io.atomic import atomic_write_file
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
        ``verdict`` (``decision``, ``words``, ``plainly``, ``gate``), ``protocols[protocol][system]``, ``differences``
        (each system minus the current one), ``outcomes`` (sessions that each of the two does better on), ``slices``,
        ``beyond_accuracy``, ``sessions`` (compared and left out), ``examples``, ``systems``; with ``out`` also
        ``report`` and ``page``.

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
    baselines = checked_baselines(baselines, OF_A_RUN)
    if isinstance(systems, Mapping):
        given = named({**systems, **{name: name for name in baselines}})
    else:
        given = named([*systems, *(name for name in baselines if name not in systems)])
    if out is not None and Path(out).is_file():
        raise ConfigError(f"--out {out} is a file", "a folder for the comparison", "give another --out")
    chosen, trained = _checked(given, candidate, split, protocols), training_sessions(given)
    benchmark = Benchmark(Path(data) if data else first_data_folder(given), split, shared=data is not None)
    if missing := [name for name in slice_columns if name not in benchmark.catalogue.items.column_names]:
        columns = ", ".join(benchmark.catalogue.items.column_names)
        raise ConfigError(f"no column {missing[0]!r} in the catalogue", f"one of {columns}", "check --slice-columns")
    if image_column is not None or images is not None:
        thumbnails(benchmark.catalogue, [], column=image_column, images=images)  # refuses before the ranking
    written = [str(Path(out) / name) for name in (JSON_FILE, PAGE_FILE)] if out is not None else []
    if dry_run:
        kinds = {one.name: one.kind for one in given}
        return {
            "dry_run": True,
            "current": given[0].name,
            "candidate": chosen,
            "systems": kinds,
            "data": str(benchmark.data),
            "sessions": len(benchmark.sessions),
            "would_write": written,
        }
    keep = None if out is None else Path(out)
    options: dict[str, Any] = {"trust_pickle": trust_pickle, "max_sequence_length": max_sequence_length, "keep": keep}
    found = ranked(given, benchmark, protocols, **options)
    _note_other_training(found, trained)
    report = _report(found, benchmark, chosen, list(protocols), slice_columns, None if gate is None else Path(gate))
    if out is not None:
        pictures = thumbnails(benchmark.catalogue, shown_ids(report["examples"]), column=image_column, images=images)
        write_json(Path(out) / JSON_FILE, report, allow_nan=False)
        with atomic_write_file(Path(out) / PAGE_FILE) as file:
            file.write_text(page(report, pictures), encoding="utf-8")
        report |= {"report": written[0], "page": written[1]}
    return report


def _checked(given: Sequence[Named], candidate: str | None, split: str, protocols: Sequence[str]) -> str:
    """Return the candidate's name."""
    if split not in EVALUATED_SPLITS:
        raise ConfigError(f"--split {split}", f"one of {', '.join(EVALUATED_SPLITS)}")
    if unknown := sorted(set(protocols) - set(PROTOCOLS)):
        raise ConfigError(f"the protocol {unknown[0]!r}", f"some of {', '.join(PROTOCOLS)}", "check --protocols")
    if len(given) < 2 or not protocols:
        raise ConfigError(
            f"{len(given)} systems under {len(protocols)} protocols",
            "two systems or more: the current one first, then the candidate",
            f"add one, or compare with a baseline: {', '.join(ALL_BASELINES)}",
        )
    names = [one.name for one in given]
    if candidate is not None and candidate not in names[1:]:
        raise ConfigError(f"--candidate {candidate}", f"one of {', '.join(names[1:])}")
    return candidate or names[1]


def _note_other_training(found: Sequence[Ranked], trained: Mapping[str, int]) -> None:
    """Note, and warn, where two runs were trained on different sessions: not the model alone makes the difference."""
    first = next(iter(trained), None)
    for one in found:
        if first is not None and trained.get(one.name, trained[first]) != trained[first]:
            one.notes.append(f"trained on other sessions than {first}: the difference is of models and data")
            log.warning(f"{one.name} was {one.notes[-1]}")


def _report(
    found: Sequence[Ranked],
    benchmark: Benchmark,
    candidate: str,
    protocols: Sequence[str],
    slice_columns: Sequence[str],
    gate: Path | None,
) -> dict[str, Any]:
    current = found[0]
    common = np.arange(len(benchmark.sessions))
    for seed in (seed for one in found for seed in one.seeds):
        common = np.intersect1d(common, seed.sessions)
    if not len(common):
        raise DataError(
            "no session that all systems have", "the same users with the same targets", "leave a system out, or --data"
        )
    if len(common) < len(benchmark.sessions):
        log.warning(f"compared on {len(common):,} of {len(benchmark.sessions):,} sessions: those that all systems have")
    if len(common) < FEW_SESSIONS:
        log.warning(f"{len(common)} sessions are too few: intervals of so few, and a verdict by them, mean little")
    ranks = {one.name: _together(one, common, "ranks") for one in found}  # {system: {protocol: [session, seed]}}
    lists = {one.name: _together(one, common, "lists") for one in found}
    shared = [name for name in protocols if all(name in ranks[one] for one in (current.name, candidate))]
    if not shared:
        raise ConfigError(
            f"no protocol of {', '.join(protocols)} that {current.name} and {candidate} both have",
            "excluded, which every system has",
            "add it to --protocols",
        )
    histories, targets = benchmark.histories.take(common), benchmark.targets[common]
    masks = slices(histories, targets, benchmark.catalogue)
    masks |= _values(slice_columns, targets, benchmark.catalogue)
    compared = benchmark.sessions.take(common)
    users = users_of(compared)
    beyond = BeyondAccuracy(benchmark.catalogue, targets)
    under = {protocol: {name: of[protocol] for name, of in ranks.items() if protocol in of} for protocol in shared}
    report: dict[str, Any] = {
        "format": 1,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "data": str(benchmark.data),
        "split": benchmark.split,
        "current": current.name,
        "candidate": candidate,
        "n_users": len(common),
        "n_items": benchmark.catalogue.n_items,
        "systems": {one.name: _description(one, ranks[one.name], shared[0], protocols) for one in found},
        "sessions": {
            "in_the_split": len(benchmark.sessions),
            "compared": len(common),
            "left_out": len(benchmark.sessions) - len(common),
            "targets_no_item": int((targets < FIRST_ITEM_ROW).sum()),
            "without_known_item": int((histories.lengths == 0).sum()),
        },
        "protocols": {
            protocol: {
                name: {**metrics(of), "interval": bootstrap_intervals(of, users=users)} for name, of in systems.items()
            }
            for protocol, systems in under.items()
        },
        "differences": {
            protocol: {
                name: _difference(of, systems[current.name], users, masks["all"])
                for name, of in systems.items()
                if name != current.name
            }
            for protocol, systems in under.items()
        },
        "slices": {
            part: {
                "n": int(mask.sum()),
                **{p: {name: metrics(of[mask]) for name, of in systems.items()} for p, systems in under.items()},
                "differences": {
                    p: _difference(systems[candidate], systems[current.name], users, mask)
                    for p, systems in under.items()
                },
            }
            for part, mask in masks.items()
        },
        "beyond_accuracy": {
            protocol: {name: _mean([beyond(one) for one in _seeds(lists[name][protocol])]) for name in systems}
            for protocol, systems in under.items()
        },
        "popularity_of_targets": beyond.of_targets,
    }
    report["coverage"] = report["beyond_accuracy"]
    report["outcomes"] = {
        protocol: outcomes(systems[current.name], systems[candidate]) for protocol, systems in under.items()
    }
    decision, checks = decide(measures_of(report), shared[0], gate)
    report["verdict"] = {
        "decision": decision,
        "words": sentence(report, decision, shared[0]),
        "plainly": plainly(report, shared[0]),
        "protocol": shared[0],
        "rule": "the bounds of the gate" if gate else "95 % interval of the paired difference in NDCG@10",
        "gate": checks,
    }
    first = {name: (ranks[name][shared[0]][:, 0], lists[name][shared[0]][:, 0]) for name in (current.name, candidate)}
    report["examples"] = examples(benchmark.catalogue, histories, targets, first, users=compared)
    return report


def _together(one: Ranked, common: Ints, what: Literal["ranks", "lists"]) -> dict[str, Ints]:
    """Return ranks [session, seed] or lists [session, seed, place] of the common sessions by protocol."""
    places = [np.searchsorted(seed.sessions, common) for seed in one.seeds]
    return {
        protocol: np.stack(
            [getattr(seed, what)[protocol][place] for seed, place in zip(one.seeds, places, strict=True)], axis=1
        )
        for protocol in one.protocols
    }


def _seeds(values: Ints) -> Iterator[Ints]:
    return (values[:, index] for index in range(values.shape[1]))


def _mean(parts: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of the seeds' measures."""
    result: dict[str, float | None] = {}
    for name in MEASURES:
        values = [value for part in parts if (value := part[name]) is not None]
        result[name] = float(np.mean(values)) if values else None
    return result


def _description(one: Ranked, ranks: Mapping[str, Ints], protocol: str, asked: Sequence[str]) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": one.kind, "bytes": one.size, "ranked_items": one.n_items}
    described["cost"] = one.cost
    described["protocols"] = one.protocols
    if len(one.seeds) > 1:
        values = [metrics(of)["ndcg@10"] for of in _seeds(ranks[protocol])]
        described["seeds"] = {"n": len(values), "ndcg@10": values}
    notes = list(one.notes)
    if KEPT_STRICT in asked and KEPT_STRICT not in one.protocols:
        notes.append(f"its scores may depend on whether an item is in the session: not ranked under {KEPT_STRICT}")
    return described | {"counts": one.counts, "notes": notes}


def _difference(first: Ints, second: Ints, users: Ints | None, mask: Bools) -> dict[str, Any] | None:
    """Return first minus second for every metric, with the change relative to the second; None without a session."""
    if not mask.any():
        return None
    of_second = metrics(second[mask])
    of_mask = None if users is None else users[mask]
    differences = paired_differences(first[mask], second[mask], KS, users=of_mask)
    return {name: _described(found, of_second[name]) for name, found in differences.items()}


def _described(found: Difference, of_second: float | None) -> dict[str, Any]:
    return {**found._asdict(), "relative": found.difference / of_second if of_second else None}


def _values(columns: Sequence[str], targets: Ints, catalogue: Catalogue) -> dict[str, Bools]:
    """Return a mask per frequent value of a catalogue column, of the target."""
    masks: dict[str, Bools] = {}
    is_item = targets >= FIRST_ITEM_ROW
    for column in columns:
        values = np.array([str(value) for value in catalogue.items[column].to_pylist()], dtype=object)
        of_target = np.full(len(targets), "", dtype=object)
        of_target[is_item] = values[targets[is_item] - FIRST_ITEM_ROW]
        names, counts = np.unique(of_target[is_item].astype(str), return_counts=True)
        for name in names[np.argsort(-counts, kind="stable")][:MOST_VALUES]:
            masks[f"{column}={name}"] = of_target == name
    return masks
