"""Reduce: merge the statistics of all chunks into the codes, types and filters that all partitions use.

Item indices of items that occur only in events, in input order; category codes by frequency; column types as narrow as
all chunks allow; filters for rare users and items; findings. The result is a dictionary, a JSON file of the working
folder (`sessionize.load_common`), with the keys

    maps                    per chunk: item index of its unknown items, common code of its category codes
    rows                    number of item indices, reserved ones included; larger ones are left out
    categories              category column -> values in the order of their codes, from 3 on
    types                   column -> Arrow type of times and numbers
    filtered                whether the working folder has masks of the kept events
    old                     data folder that an incremental update extends, or None
    drop_duplicates         setting
    split, valid_from, …    `session_settings`; ``newest`` is the time that recency counts from
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.arrays import AnyArray, Bools
from missrec_t4r.errors import DataError
from missrec_t4r.etl import event_arithmetic, item_table
from missrec_t4r.etl.engine import sessionize
from missrec_t4r.etl.engine.executor import Executor
from missrec_t4r.etl.engine.job import Job
from missrec_t4r.etl.engine.shuffle import ValueCodes
from missrec_t4r.etl.engine.workdir import FILTER_FOLDER, KEPT_FOLDER, SHUFFLE_FOLDER, partition_path
from missrec_t4r.etl.event_settings import no_weight
from missrec_t4r.etl.quality import checks
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, UNKNOWN_ROW

_SESSION_SETTINGS = ("split", "valid_from", "test_from", "max_events", "session_gap", "time_features", "newest")


def reduce_chunks(job: Job, chunks: Sequence[dict[str, Any]], executor: Executor) -> dict[str, Any]:
    """Return what all partitions have in common, after filtering rare users and items.

    Parameters
    ----------
    job : Job
        With plan and folder. Its items, vectors, settings and findings are updated.
    chunks : sequence of dict
        Statistics of `shuffle.shuffle_chunk`.
    executor : Executor
        Runs the tasks of the filters.
    """
    settings, plan = job.run.settings, job.plan
    unknown = ValueCodes(job.items[ITEM_ID].type)
    n_rows = FIRST_ITEM_ROW + job.items.num_rows
    maps: list[dict[str, list[int]]] = [
        {ITEM_ID: (unknown.encode(pa.array(chunk["unknown_items"], unknown.values.type)) + n_rows).tolist()}
        for chunk in chunks
    ]
    append = settings["unknown_items"] == "append"
    if job.old:
        checks.refuse_other_unit(chunks, settings["newest"])
    _add_chunk_findings(job, chunks, len(unknown.values))
    common: dict[str, Any] = {
        "maps": maps,
        "rows": n_rows + (len(unknown.values) if append else 0),
        "types": job.old.state["types"] if job.old else _column_types(job, chunks),
        "drop_duplicates": settings["drop_duplicates"],
        "filtered": False,
        "old": str(job.old.folder) if job.old else None,
    }
    if not job.old:
        settings["newest"] = max(chunk["newest"] for chunk in chunks if chunk["newest"] is not None)
    job.run.derive.check_clock(settings["newest"])
    categories = {name: _count_values(chunks, name) for name, kind in plan.features.items() if kind == "category"}
    if append and len(unknown.values):
        job.items, job.vectors = item_table.append_items(job.items, job.vectors, unknown.values)
    dropped = not append and len(unknown.values) > 0
    if not job.old and (dropped or settings["drop_duplicates"] or item_table.filters_rare(settings)):
        _map_values(chunks, maps, categories, 0)
        kept = _filter_events(job, common, executor)
        for name, counts in categories.items():
            of_kept = event_arithmetic.sum_counts((part[name] for part in kept), len(counts))
            categories[name] = dict(zip(counts, of_kept.tolist(), strict=True))
        common["filtered"] = True
    before = job.old.state["categories"] if job.old else {}
    common["categories"] = {
        name: _order_by_frequency(counts, before.get(name, ())) for name, counts in categories.items()
    }
    _map_values(chunks, maps, common["categories"], FIRST_ITEM_ROW)
    job.run.derive.note_types(job.run.findings, common["categories"].get(settings["event_type_column"], ()))
    return common | session_settings(settings, common["categories"])


def session_settings(settings: Mapping[str, Any], categories: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the settings of ``etl.json`` that sessions and splits depend on; event weights by category code.

    Raises
    ------
    DataError
        No event has a weight.
    """
    weights, column = settings["event_weights"], settings["event_type_column"]
    by_code = [weights.get(str(value), 1.0) for value in categories.get(column, ())]
    if weights and not any(by_code):
        raise no_weight()
    return {
        **{name: settings[name] for name in _SESSION_SETTINGS},
        "weights": {"column": column, "by_code": [1.0] * FIRST_ITEM_ROW + by_code} if weights else None,
    }


# Filters


def _filter_events(job: Job, common: dict[str, Any], executor: Executor) -> list[dict[str, list[int]]]:
    """Decide which events, users and items are kept, and write masks for every partition; count what is kept.

    Memory: one byte, two indices and one Boolean per event, for all events.
    """
    write_json(job.folder / sessionize.SURVEY_FILE, common, indent=None)
    tasks = [(str(job.folder), number) for number in range(job.plan.partitions)]
    surveyed = executor.run(sessionize.survey_events, tasks, "counting users and items")
    checks.note_users(job.run.findings, surveyed, drop_duplicates=common["drop_duplicates"])
    occurs = keep_frequent(job.folder, job.plan.partitions, job.run.settings)  # [item index]
    if item_table.filters_rare(job.run.settings):
        rows = np.flatnonzero(occurs[FIRST_ITEM_ROW:])  # of the item table
        index = np.full(len(occurs), -1, np.int64)
        index[FIRST_ITEM_ROW + rows] = FIRST_ITEM_ROW + np.arange(len(rows))
        np.save(job.folder / KEPT_FOLDER / sessionize.FILTERED_ITEMS_FILE, index)
        job.items, job.vectors = item_table.take_items(job.items, job.vectors, rows)
    return executor.run(sessionize.count_categories, tasks, "counting categories")


def keep_frequent(work: Path, partitions: int, settings: Mapping[str, Any]) -> Bools:
    """Write which events are kept, a mask for every partition, and return which items they are on, [item index].

    Parameters
    ----------
    work : Path
        Working folder with, per partition, user, item and eligibility of each event.
    partitions : int
        Their number; a partition without events may have no file.
    settings : mapping
        ``k_core`` and ``min_item_count``.

    Raises
    ------
    DataError
        No event is left.
    """
    paths = {number: partition_path(work, FILTER_FOLDER, number, "npz") for number in range(partitions)}
    files = {number: file for number, file in paths.items() if file.is_file()}
    eligible = _read_arrays(files.values(), "eligible")
    sizes, kept = [len(part) for part in eligible], np.concatenate(eligible)  # kept: [event of all partitions]
    items = np.concatenate(_read_arrays(files.values(), "items"))
    if not kept.any():
        raise DataError("no event is on an item of the item table", "matching ids", "check both id columns")
    if item_table.filters_rare(settings):
        offset, users = 0, []  # users are numbered per partition; no user is in two
        for part in _read_arrays(files.values(), "users"):
            users.append(part.astype(np.int64) + offset)
            offset += int(part.max(initial=-1)) + 1
        rows = np.flatnonzero(kept)
        rows = rows[item_table.frequent_events(np.concatenate(users)[rows], items[rows], settings)]
        kept[:] = False
        kept[rows] = True
    for number, mask in zip(files, np.split(kept, np.cumsum(sizes)[:-1]), strict=True):
        np.save(partition_path(work, KEPT_FOLDER, number, "npy"), mask)
    occurs = np.zeros(int(items.max()) + 1, bool)
    occurs[items[kept]] = True
    return occurs


def _read_arrays(files: Iterable[Path], name: str) -> list[AnyArray]:
    """Return one array of every file; each file is closed again, as there may be more than a process may open."""
    arrays = []
    for file in files:
        with np.load(file) as content:
            arrays.append(content[name])
    return arrays


# Types and categories


def _column_types(job: Job, chunks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the types of time and numbers: as narrow as all chunks allow."""
    types: dict[str, set[str]] = {}
    for file in sorted((job.folder / SHUFFLE_FOLDER).glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            for field in pa.ipc.open_file(source).schema:
                types.setdefault(field.name, set()).add(str(field.type))
    if job.plan.time_is_date:
        is_integer = all(chunk["whole_seconds"] for chunk in chunks)
    else:
        is_integer = types[TIMESTAMP] == {"int64"}
    columns = {TIMESTAMP: "int64" if is_integer else "double"}
    for name in (name for name, kind in job.plan.features.items() if kind == "number"):
        with_nulls = any(chunk["nulls"].get(name) for chunk in chunks)  # as in pandas: integers with nulls are floats
        columns[name] = "int64" if types[name] == {"int64"} and not with_nulls else "float"
    return columns


def _count_values(chunks: Sequence[dict[str, Any]], name: str) -> dict[Any, int]:
    """Return the number of events per value of a category, by first occurrence."""
    counts: Counter[Any] = Counter()
    for found in (chunk["categories"][name] for chunk in chunks if name in chunk["categories"]):
        for value, count in zip(found["values"], found["counts"], strict=True):
            counts[value] += count
    return counts


def _order_by_frequency(counts: Mapping[Any, int], old: Sequence[Any]) -> list[Any]:
    """Return the values with a kept event in the order of their codes.

    Codes of an incremental update never move: ``old`` values come first, new ones follow in input order.
    """
    has_code = set(old)
    new = [value for value, count in counts.items() if count and value not in has_code]
    return [*old, *new] if old else sorted(new, key=lambda value: (-counts[value], value))


def _map_values(
    chunks: Sequence[dict[str, Any]],
    maps: Sequence[dict[str, list[int]]],
    categories: Mapping[str, Iterable[Any]],
    first: int,
) -> None:
    """Set the codes of every chunk's values: their places in ``categories``, counted from ``first``, or unknown."""
    for name, values in categories.items():
        code_of = {value: code for code, value in enumerate(values, first)}
        for chunk, chunk_maps in zip(chunks, maps, strict=True):
            found = chunk["categories"].get(name, {"values": ()})["values"]
            chunk_maps[name] = [code_of.get(value, UNKNOWN_ROW) for value in found]


# Findings


def _add_chunk_findings(job: Job, chunks: Sequence[dict[str, Any]], n_unknown: int) -> None:
    """Add the findings of reading and encoding: nulls, odd times, unknown items, repaired text."""
    findings, plan = job.run.findings, job.plan
    events, unknown_events = (sum(chunk[name] for chunk in chunks) for name in ("rows", "unknown_item_events"))
    nulls, repaired = Counter[str](), Counter[str]()
    for chunk in chunks:
        nulls.update(chunk["nulls"])
        repaired.update(chunk["repaired"])
    checks.note_incomplete(findings, nulls)
    checks.note_times(findings, chunks)
    checks.note_repaired(
        findings, next(raw for raw, name in plan.names.items() if name == TIMESTAMP), repaired[TIMESTAMP]
    )
    item_table.note_unknown_items(findings, job.run.settings, n_unknown, unknown_events, events)
    for name, kind in plan.features.items():
        checks.note_nulls(findings, name, nulls[name], text=kind == "category")
        checks.note_repaired(findings, name, repaired[name])
