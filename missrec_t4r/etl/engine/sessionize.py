"""One partition at a time: the events of its users, in the order of time, and from them the rows of the splits.

Two tasks, each leaving files that mean "finished". `gather` keeps what is known of every user, uncut, as one Arrow
file; `divide` makes sessions of it (weights, pauses, time features, last events) and writes the splits. An update
gathers again only where there are new events, from the old file and the new shards.

The order of users is that of their hash, so it does not depend on the number of partitions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.data.session_files import one_array, prefix_mask
from missrec_t4r.data.user_hash import Hashes, hash_ids
from missrec_t4r.errors import SchemaError
from missrec_t4r.etl import splits
from missrec_t4r.etl.engine.shuffle import load_plan, one_batch, read_shards, write_json
from missrec_t4r.etl.event_settings import SESSION_ID
from missrec_t4r.etl.nvt import kernels
from missrec_t4r.etl.quality import checks
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, LIST_SUFFIX, SPLITS, TIMESTAMP, USER_ID

MERGED_FILE, DIVIDE_FILE = "merged.json", "divide.json"
SURVEY_FILE = "survey.json"
STATE_FOLDER = "state"
STATE_FILE = "state.json"
USER_HASH = "user_hash"
"""Column of the state: ascending, so that a few users are found without reading the others."""

Ints = npt.NDArray[np.int64]


@lru_cache(maxsize=4)
def load_merged(work: str, name: str = MERGED_FILE) -> dict[str, Any]:
    """Read what the chunks have in common, once per process: rows of unknown items, codes, types, boundaries."""
    merged: dict[str, Any] = json.loads((Path(work) / name).read_text(encoding="utf-8"))
    merged["maps"] = [
        {name: np.asarray(values, np.int32) for name, values in chunk.items()} for chunk in merged["maps"]
    ]
    return merged


def events_of(work: str, partition: int, name: str = MERGED_FILE) -> pa.Table:
    """Return a partition's events in the order of the input, with common codes and types."""
    plan, merged = load_plan(work), load_merged(work, name)
    table = read_shards(work, partition, merged["maps"], [USER_ID, ITEM_ID, TIMESTAMP, *plan.features])
    return with_types(table, merged["types"])


def with_types(table: pa.Table, types: Mapping[str, str]) -> pa.Table:
    """Return events in the types that all partitions have.

    Raises
    ------
    SchemaError
        New events of an update do not fit.
    """
    columns = {}
    for column in table.column_names:
        kind = types.get(column, str(table[column].type))
        try:
            columns[column] = table[column].cast(kind)
        except pa.ArrowInvalid as error:
            words = f"column {column!r} does not fit the folder ({error})"
            raise SchemaError(words, f"{kind} as before", "run missrec etl on all events") from error
    return pa.table(columns)


def survey(work: str, partition: int) -> dict[str, int]:
    """Note which events of a partition may stay before rare users and items are counted.

    Unknown items (when they are dropped) and repeats go here. Leaves the users' numbers, the items' rows and the
    mask for the coordinator.
    """
    merged = load_merged(work, SURVEY_FILE)
    file = place(work, "survey", partition, "npz")
    table = events_of(work, partition, SURVEY_FILE)
    users, items, times = _arrays(table)
    order, codes, *_ = order_of(users, times)
    alive, repeated = np.ones(len(items), bool), repeats(codes, times, items, order)
    if merged["drop_duplicates"]:
        alive[repeated] = False
    strange = items >= merged["rows"]
    alive &= ~strange
    with file.with_suffix(".part").open("wb") as aside:
        np.savez(aside, users=codes.astype(np.int32), items=items, alive=alive)
    file.with_suffix(".part").replace(file)
    told = {"repeated": len(repeated), "strange": int(strange.sum()), "backwards": backwards(codes, times)}
    return told | {"very_long": very_long(codes)}


def very_long(codes: npt.NDArray[Any]) -> int:
    """Return how many users have more events than people make."""
    return int((np.bincount(codes) > checks.MANY_EVENTS).sum())


def count_codes(work: str, partition: int) -> dict[str, list[int]]:
    """Count the categories of the events that may stay."""
    table = events_of(work, partition, SURVEY_FILE)
    table = table.filter(pa.array(np.load(place(work, "keep", partition, "npy"))))
    names = [name for name, kind in load_plan(work).features.items() if kind == "category"]
    return {name: np.bincount(table[name].to_numpy()).tolist() for name in names}


def gather(work: str, partition: int) -> dict[str, Any]:
    """Write what is known of every user of a partition, time-ordered and uncut.

    Returns
    -------
    dict
        Numbers of events and users, repeats, users' clocks going backwards.
    """
    merged = load_merged(work)
    done = place(work, STATE_FOLDER, partition, "json")
    if done.is_file():
        answer: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return answer
    table = events_of(work, partition)
    users, items, times = _arrays(table)
    found: dict[str, Any] = {}
    if merged["filtered"]:
        table = table.filter(pa.array(np.load(place(work, "keep", partition, "npy"))))
        users, items, times = _arrays(table)
        if (new_rows := place(work, "keep", None, "npy")).is_file():
            items = np.load(new_rows)[items]
    if merged["old"]:
        table, users, items, times = _joined(Path(merged["old"]) / STATE_FOLDER / f"{partition:05}.arrow", table, items)
    known = order_of(users, times)
    if not merged["filtered"]:
        repeated = repeats(known.codes, times, items, known.order)
        strange = items >= merged["rows"]
        found = {"repeated": len(repeated), "strange": int(strange.sum()), "backwards": backwards(known.codes, times)}
        found["very_long"] = very_long(known.codes)
        if strange.any() or (merged["drop_duplicates"] and len(repeated)):  # of an update; else `survey` saw to it
            stay = ~strange
            stay[repeated[~strange[repeated]] if merged["drop_duplicates"] else repeated[:0]] = False
            table = table.filter(pa.array(stay))
            users, items, times = users.filter(pa.array(stay)), items[stay], times[stay]
            known = order_of(users, times)
    write_state(as_lists(known, values_of(table, items)), Path(work) / STATE_FOLDER, partition)
    found |= {"events": len(items), "users": len(known.users)}
    write_json(done, found)
    return found


def values_of(table: pa.Table, items: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of events as a state keeps them: items, times, the others in the order of the input."""
    others = [TIMESTAMP, *(name for name in table.column_names if name not in (USER_ID, ITEM_ID, TIMESTAMP))]
    return {ITEM_ID: items.astype(np.int32)} | {name: table[name].to_numpy() for name in others}


def as_lists(known: Ordered, values: Mapping[str, npt.NDArray[Any]]) -> pa.Table:
    """Return what is known of users, a row each: id, hash, lists of their events (``values``, not yet in order)."""
    counts = np.bincount(known.codes, minlength=len(known.users))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    columns = {USER_ID: known.users, USER_HASH: pa.array(known.hashes, pa.uint64())}
    for name, column in values.items():
        columns[name + LIST_SUFFIX] = pa.ListArray.from_arrays(offsets, pa.array(column[known.order]))
    return pa.table(columns)


def write_state(known: pa.Table, folder: Path, partition: int) -> None:
    """Write what is known of a partition's users: uncompressed, so that it is read where it lies."""
    aside = folder / f"{partition:05}.{os.getpid()}.part"
    write_arrow(known, aside)
    aside.replace(folder / f"{partition:05}.arrow")


def write_arrow(table: pa.Table, file: Path) -> None:
    """Write a table as one uncompressed record batch."""
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_batch(one_batch(table))


def read_arrow(file: Path) -> pa.Table:
    """Return a table of `write_arrow` where it lies on disk: what is not looked at is not read."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def divide(work: str, partition: int) -> dict[str, Any]:
    """Write a partition's rows of every split, and how often each item is in the training rows.

    Returns
    -------
    dict
        Rows per split, the longest session.
    """
    done, counts = place(work, "done", partition, "json"), place(work, STATE_FOLDER, partition, "npy")
    if done.is_file() and counts.is_file():
        answer: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return answer
    merged = load_merged(work, DIVIDE_FILE)
    sessions = sessions_of(read_arrow(Path(work) / STATE_FOLDER / f"{partition:05}.arrow"), merged)
    offsets, lengths = prefixes(sessions, merged)
    found: dict[str, Any] = {"sessions": {}, "longest": int(np.diff(offsets).max(initial=0))}
    for name in SPLITS:
        rows = splits.take_prefixes(sessions, offsets, lengths[name])
        found["sessions"][name] = rows.num_rows
        if rows.num_rows:
            write_rows(rows, Path(work) / "out" / name / f"part_{partition:05}.parquet")
    np.save(counts, trained(sessions, offsets, lengths["train"]))
    write_json(done, found)
    return found


def prefixes(sessions: pa.Table, merged: Mapping[str, Any]) -> tuple[Ints, splits.Lengths]:
    """Return where the sessions' events begin, [session + 1], and how many of each are in every split, [session]."""
    offsets = np.asarray(one_array(sessions[ITEM_ID + LIST_SUFFIX]).offsets, np.int64)
    if merged["split"] == "leave_one_out":
        return offsets, splits.leave_one_out(offsets)
    times = one_array(sessions[TIMESTAMP + LIST_SUFFIX]).values.to_numpy()
    return offsets, splits.time_split(offsets, times, merged["valid_from"], merged["test_from"])


def trained(sessions: pa.Table, offsets: Ints, lengths: Ints) -> Ints:
    """Return how often each item is in the training prefixes, [row of the catalogue]; shorter where the last are 0."""
    items = one_array(sessions[ITEM_ID + LIST_SUFFIX]).values.to_numpy()
    return np.bincount(items[prefix_mask(offsets, lengths)], minlength=FIRST_ITEM_ROW)


def sessions_of(known: pa.Table, merged: Mapping[str, Any]) -> pa.Table:
    """Make sessions of what is known of the users: weights, pauses, time features, the last events."""
    lists = lists_of(known)
    if not derives(merged):
        return pa.table({USER_ID: known[USER_ID], **{name: _widened(column) for name, column in lists.items()}})
    sizes = np.diff(np.asarray(lists[ITEM_ID + LIST_SUFFIX].offsets, np.int64))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = {name.removesuffix(LIST_SUFFIX): column.values.to_numpy() for name, column in lists.items()}
    values[ITEM_ID] = values[ITEM_ID].astype(np.int64)
    if weights := merged["weights"]:
        weight = np.asarray(weights["by_code"], np.float32)[values[weights["column"]]]
        owner, values = owner[weight > 0], {name: column[weight > 0] for name, column in values.items()}
        values["weight"] = weight[weight > 0]
    leads = np.ones(len(owner), bool)
    leads[1:] = owner[1:] != owner[:-1]
    numbers, times = None, values[TIMESTAMP]
    passed = kernels.gaps(times, leads)
    if merged["session_gap"]:
        numbers = kernels.session_numbers(passed, leads, merged["session_gap"])
        begins = leads.copy()
        begins[1:] |= numbers[1:] != numbers[:-1]
    else:
        begins = leads
    for name in merged["time_features"]:
        values[name] = _time_feature(name, times, passed, merged)
    starts = np.flatnonzero(begins)
    offsets = np.append(starts, len(owner))
    columns: dict[str, Any] = {USER_ID: one_array(known[USER_ID]).take(pa.array(owner[starts]))}
    if numbers is not None:
        columns[SESSION_ID] = numbers[starts]
    if longest := merged["max_events"]:
        keep = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(owner)) <= longest
        values = {name: column[keep] for name, column in values.items()}
        offsets = np.concatenate([[0], np.cumsum(np.minimum(np.diff(offsets), longest))])
    bounds = pa.array(offsets, pa.int32())
    for name in values:
        kind = np.int64 if values[name].dtype.kind in "iu" else values[name].dtype
        columns[name + LIST_SUFFIX] = pa.ListArray.from_arrays(bounds, pa.array(values[name].astype(kind, copy=False)))
    return pa.table(columns)


def derives(merged: Mapping[str, Any]) -> bool:
    """Whether sessions differ from what is known of their users."""
    return any(merged[name] for name in ("weights", "session_gap", "time_features", "max_events"))


def _widened(column: pa.ListArray) -> pa.ListArray:
    """Return lists with integers as the splits have them."""
    values = column.values
    wide = values.cast(pa.int64()) if pa.types.is_integer(values.type) else values
    return pa.ListArray.from_arrays(column.offsets, wide)


def lists_of(known: pa.Table) -> dict[str, pa.ListArray]:
    """Return the list columns of a state."""
    return {name: one_array(known[name]) for name in known.column_names if name.endswith(LIST_SUFFIX)}


def n_events(known: pa.Table) -> int:
    """Return the number of events of a state."""
    return int(pc.sum(pc.list_value_length(known[ITEM_ID + LIST_SUFFIX])).as_py() or 0)


def write_rows(rows: pa.Table, file: Path) -> None:
    """Write session rows; items repeat too little for a dictionary to pay."""
    pq.write_table(rows, file, use_dictionary=False, write_statistics=False)


class Ordered(NamedTuple):
    """Events by user and time."""

    order: Ints
    """[event]: by user (hash) and time, ties as they came."""
    codes: Ints
    """[event]: number of the event's user."""
    users: pa.Array
    """[user]: ids in the order of their hash."""
    hashes: Hashes


def order_of(users: pa.Array, times: npt.NDArray[Any]) -> Ordered:
    """Return the order of events by user and time.

    Number, time and position are packed into one integer where they fit, because one plain sort is several times
    faster than sorting by columns.
    """
    coded = users.dictionary_encode()
    hashes = hash_ids(coded.dictionary)
    by_hash = np.argsort(hashes, kind="stable")
    ranks = np.empty(len(by_hash), np.int64)
    ranks[by_hash] = np.arange(len(ranks))
    codes = ranks[coded.indices.to_numpy()]
    return Ordered(packed_order(codes, times), codes, coded.dictionary.take(pa.array(by_hash)), hashes[by_hash])


def packed_order(codes: Ints, times: npt.NDArray[Any], *, nearly: bool = False) -> Ints:
    """Return the stable order by code, then time, [event]; ``nearly`` says that it is a few runs in order already.

    Examples
    --------
    >>> packed_order(np.array([1, 0, 1, 1]), np.array([9, 5, 2, 2])).tolist()
    [1, 2, 3, 0]
    """
    size = len(codes)
    if not size:
        return np.zeros(0, np.int64)
    if times.dtype.kind == "i":
        earliest, latest = int(times.min()), int(times.max())
        place, span, wide = size.bit_length(), (latest - earliest).bit_length(), int(codes.max()).bit_length()
        if nearly and span + wide <= 63:
            return np.argsort((codes << span) | (times - earliest), kind="stable")  # merges the runs
        if place + span + wide <= 63:
            packed = (((codes << span) | (times - earliest)) << place) | np.arange(size)
            packed.sort()
            return packed & ((1 << place) - 1)
    return np.lexsort((times, codes))


def repeats(codes: Ints, times: npt.NDArray[Any], items: npt.NDArray[Any], order: Ints) -> Ints:
    """Return the positions of events whose user, item and time were there before, ascending."""
    near = np.zeros(len(order), bool)
    tied = (codes[order][1:] == codes[order][:-1]) & (times[order][1:] == times[order][:-1])
    near[1:] |= tied
    near[:-1] |= tied
    some = np.sort(order[near])
    again = some[np.lexsort((some, items[some], times[some], codes[some]))]
    same = (codes[again][1:] == codes[again][:-1]) & (times[again][1:] == times[again][:-1])
    same &= items[again][1:] == items[again][:-1]
    return np.sort(again[1:][same])


def backwards(codes: Ints, times: npt.NDArray[Any]) -> int:
    """Return how often a user's event is earlier than the one before it in the input."""
    if (times[1:] >= times[:-1]).all():
        return 0
    order = packed_order(codes, np.zeros(len(codes), np.int64))
    return int(((np.diff(times[order]) < 0) & (np.diff(codes[order]) == 0)).sum())


def _arrays(table: pa.Table) -> tuple[pa.Array, npt.NDArray[Any], npt.NDArray[Any]]:
    return one_array(table[USER_ID]), table[ITEM_ID].to_numpy(), table[TIMESTAMP].to_numpy()


def _joined(file: Path, table: pa.Table, items: npt.NDArray[Any]) -> tuple[pa.Table, pa.Array, Any, Any]:
    """Return the old events of a partition, as they were kept, followed by the new ones."""
    table = table.set_column(table.column_names.index(ITEM_ID), ITEM_ID, pa.array(items, pa.int32()))
    if file.is_file():
        known = read_arrow(file)
        lists = lists_of(known)
        sizes = np.diff(np.asarray(lists[ITEM_ID + LIST_SUFFIX].offsets))
        old = {USER_ID: one_array(known[USER_ID]).take(pa.array(np.repeat(np.arange(len(sizes)), sizes)))}
        old |= {name.removesuffix(LIST_SUFFIX): column.values for name, column in lists.items()}
        table = pa.concat_tables([pa.table(old).select(table.column_names), table], promote_options="permissive")
    return (table, *_arrays(table))


def _time_feature(name: str, times: npt.NDArray[Any], passed: npt.NDArray[Any], merged: Mapping[str, Any]) -> Any:
    if name == "gap":
        return passed.astype(np.float32)
    if name == "recency":
        return kernels.recencies(times, merged["newest"])
    return (kernels.hours if name == "hour" else kernels.weekdays)(times) + FIRST_ITEM_ROW


def place(work: str | Path, folder: str, partition: int | None, ending: str) -> Path:
    """Return the file of a partition, or of all of them, in a folder of the working folder."""
    return Path(work) / folder / f"{'rows' if partition is None else f'{partition:05}'}.{ending}"
