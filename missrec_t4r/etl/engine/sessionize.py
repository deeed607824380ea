"""Sessionize: per partition, events are grouped by user, cut into sessions, and split into train, valid and test.

Two tasks per partition. `group_by_user` writes the user state: all events of every user, sorted by time, uncut.
`write_splits` makes sessions of it (event weights, session gaps, time features, last events) and writes the rows of
the splits. An incremental update repeats both only for partitions with new events, from the old state and the new
shuffle files. Before them, if rare users or items are filtered, `survey_events` and `count_categories` run.

Each task writes its files atomically, or before its result. What all partitions have in common (item indices and
category codes of every chunk, types, settings) is a JSON file of the working folder, written by `build.py` as a stage
needs it; see `reduce.py` for its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.arrays import AnyArray, Bools, Ints
from missrec_t4r.data.session_files import prefix_mask, take_prefixes
from missrec_t4r.errors import SchemaError
from missrec_t4r.etl import event_arithmetic, splits
from missrec_t4r.etl.engine import workdir
from missrec_t4r.etl.engine.ordering import EventOrder, count_out_of_order, duplicate_positions, order_events
from missrec_t4r.etl.engine.shuffle import load_plan, read_partition
from missrec_t4r.etl.engine.user_state import STATE_FOLDER, count_events, list_columns, state_path, to_events, to_state
from missrec_t4r.etl.event_settings import WEIGHT
from missrec_t4r.etl.quality import checks
from missrec_t4r.io.arrow_files import one_array, read_arrow, with_column, write_arrow
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, LIST_SUFFIX, SESSION_ID, SPLITS, TIMESTAMP, USER_ID

SURVEY_FILE, COMMON_FILE, SPLIT_FILE = "survey.json", "common.json", "split.json"
"""What all partitions have in common: before filtering, for grouping by user, for the splits."""
FILTERED_ITEMS_FILE = "item_index.npy"
"""[item index before filtering]: item index after it, -1 where the item is left out."""


@lru_cache(maxsize=4)
def load_common(work: str, name: str) -> dict[str, Any]:
    """Read what all partitions have in common, once per process."""
    common = read_json(Path(work) / name)
    common["maps"] = [
        {column: np.asarray(codes, np.int32) for column, codes in chunk.items()} for chunk in common["maps"]
    ]
    return common


def read_events(work: str, partition: int, name: str = COMMON_FILE) -> pa.Table:
    """Return a partition's events in input order, with common codes and types."""
    common = load_common(work, name)
    return cast_columns(read_partition(work, partition, common["maps"]), common["types"])


def cast_columns(events: pa.Table, types: Mapping[str, str]) -> pa.Table:
    """Return events with the column types that all partitions have.

    Raises
    ------
    SchemaError
        A column of an incremental update does not fit.
    """
    columns = {}
    for column in events.column_names:
        kind = types.get(column, str(events[column].type))
        try:
            values = events[column]
            if kind == "float" and pa.types.is_integer(values.type):  # the nearest ones, as pandas makes them
                values = values.cast(pa.float64(), safe=False)
            columns[column] = values.cast(kind)
        except pa.ArrowInvalid as error:
            message = f"column {column!r} does not fit the folder ({error})"
            raise SchemaError(message, f"{kind} as before", "run missrec etl on all events") from error
    return pa.table(columns)


# Filters (k-core, item count, unknown items, duplicates): what the coordinator needs, partition by partition


def survey_events(work: str, partition: int) -> dict[str, int]:
    """Write user, item and eligibility of a partition's events, input of the k-core and item-count filters.

    Not eligible are events that the settings leave out: duplicates, and events on items that the item table lacks.

    Returns
    -------
    dict
        Counts for the findings.
    """
    events = read_events(work, partition, SURVEY_FILE)
    by_user, kept, counts = _check_events(events, load_common(work, SURVEY_FILE))
    with atomic_write_file(workdir.partition_path(work, workdir.FILTER_FOLDER, partition, "npz")) as temporary:
        np.savez(temporary, users=by_user.codes.astype(np.int32), items=events[ITEM_ID].to_numpy(), eligible=kept)
    return counts


def count_categories(work: str, partition: int) -> dict[str, list[int]]:
    """Return, per category column, the number of kept events per code."""
    events = read_events(work, partition, SURVEY_FILE)
    events = events.filter(pa.array(_kept_events(work, partition)))
    names = [name for name, kind in load_plan(work).features.items() if kind == "category"]
    return {name: np.bincount(events[name].to_numpy()).tolist() for name in names}


def _kept_events(work: str, partition: int) -> Bools:
    kept: Bools = np.load(workdir.partition_path(work, workdir.KEPT_FOLDER, partition, "npy"))
    return kept


def _check_events(
    events: pa.Table, common: Mapping[str, Any], n_old: int = 0
) -> tuple[EventOrder, Bools, dict[str, int]]:
    """Return the order of events, which of them the settings keep, [event], and counts for the findings.

    The first ``n_old`` events are those of an old state, which was counted when they were new.
    """
    users, items, times = one_array(events[USER_ID]), events[ITEM_ID].to_numpy(), events[TIMESTAMP].to_numpy()
    by_user = order_events(users, times)
    duplicates = duplicate_positions(by_user.codes, times, items, by_user.order)
    kept = items < common["rows"]
    counts = {
        "duplicates": int((duplicates >= n_old).sum()),
        "unknown_item_events": int((~kept).sum()),
        "out_of_order": count_out_of_order(by_user.codes[n_old:], times[n_old:]),
        "very_long": int((np.bincount(by_user.codes) > checks.MANY_EVENTS).sum()),
    }
    if common["drop_duplicates"]:
        kept[duplicates] = False
    return by_user, kept, counts


# First task: group by user


@workdir.resumable(STATE_FOLDER)
def group_by_user(work: str, partition: int) -> dict[str, Any]:
    """Write the user state of a partition: all events of every user, sorted by time.

    Returns
    -------
    dict
        Numbers of events and users, and counts for the findings.
    """
    common, events = load_common(work, COMMON_FILE), read_events(work, partition)
    counts: dict[str, int] = {}
    if common["filtered"]:  # `survey_events` has counted
        events = events.filter(pa.array(_kept_events(work, partition)))
        filtered_items = Path(work) / workdir.KEPT_FOLDER / FILTERED_ITEMS_FILE
        if filtered_items.is_file():
            items = pa.array(np.load(filtered_items)[events[ITEM_ID].to_numpy()], pa.int32())
            events = with_column(events, ITEM_ID, items)
        state = to_state(events)
    else:
        file = state_path(common["old"] or work, partition)
        state, counts = extend_state(read_arrow(file) if common["old"] and file.is_file() else None, events, common)
    write_arrow(state, state_path(work, partition))
    return counts | {"events": count_events(state), "users": state.num_rows}


def extend_state(old: pa.Table | None, events: pa.Table, common: Mapping[str, Any]) -> tuple[pa.Table, dict[str, int]]:
    """Return the user state of old and new events, without what the settings leave out, and counts for the findings."""
    n_old = 0
    if old is not None:
        before = to_events(old).select(events.column_names)
        n_old, events = before.num_rows, pa.concat_tables([before, events], promote_options="permissive")
    by_user, kept, counts = _check_events(events, common, n_old)
    if kept.all():
        return to_state(events, by_user), counts
    return to_state(events.filter(pa.array(kept))), counts


# Second task: sessions and splits


@workdir.resumable(workdir.SPLIT_FOLDER)
def write_splits(work: str, partition: int) -> dict[str, Any]:
    """Write a partition's rows of every split, and how often each item occurs in its training rows.

    Returns
    -------
    dict
        Rows per split, and the events of the longest session.
    """
    common = load_common(work, SPLIT_FILE)
    sessions = to_sessions(read_arrow(state_path(work, partition)), common)
    offsets, lengths = splits.split_lengths(sessions, common)
    result: dict[str, Any] = {"sessions": {}, "longest": int(np.diff(offsets).max(initial=0))}
    for name in SPLITS:
        rows = take_prefixes(sessions, offsets, lengths[name])
        result["sessions"][name] = rows.num_rows
        if rows.num_rows:  # item ids repeat too little for dictionary encoding to pay
            file = Path(work) / workdir.OUTPUT_FOLDER / name / f"part_{partition:05}.parquet"
            pq.write_table(rows, file, use_dictionary=False, write_statistics=False)
    np.save(state_path(work, partition, "npy"), count_train_items(sessions, offsets, lengths["train"]))
    return result


def count_train_items(sessions: pa.Table, offsets: Ints, lengths: Ints) -> Ints:
    """Return how often each item occurs in the training prefixes, [item index]; trailing zeros may be missing."""
    items = one_array(sessions[ITEM_ID + LIST_SUFFIX]).values.to_numpy()
    return np.bincount(items[prefix_mask(offsets, lengths)], minlength=FIRST_ITEM_ROW)


def to_sessions(state: pa.Table, common: Mapping[str, Any]) -> pa.Table:
    """Return the sessions of a state's users: event weights, session gaps, time features, last events.

    The result equals what the NVTabular workflow makes of the same events (`nvt/event_ops.py`), because both use the
    arithmetic of `event_arithmetic.py`.
    """
    lists = list_columns(state)
    if not derives_sessions(common):
        return pa.table({USER_ID: state[USER_ID], **{name: _widen_integers(column) for name, column in lists.items()}})
    sizes = np.diff(np.asarray(lists[ITEM_ID + LIST_SUFFIX].offsets, np.int64))  # [user]
    user = np.repeat(np.arange(len(sizes)), sizes)  # [event]: row of the event's user
    columns = {name.removesuffix(LIST_SUFFIX): column.values.to_numpy() for name, column in lists.items()}  # [event]
    columns[ITEM_ID] = columns[ITEM_ID].astype(np.int64)
    if weights := common["weights"]:
        weight = np.asarray(weights["by_code"], np.float32)[columns[weights["column"]]]
        kept = weight > 0
        user, columns = user[kept], {name: column[kept] for name, column in columns.items()}
        columns[WEIGHT] = weight[kept]
    first_of_user = np.ones(len(user), bool)  # [event]
    first_of_user[1:] = user[1:] != user[:-1]
    session_number, times = None, columns[TIMESTAMP]
    gaps = event_arithmetic.gaps(times, first_of_user)
    first_of_session = first_of_user
    if common["session_gap"]:
        session_number = event_arithmetic.session_numbers(gaps, first_of_user, common["session_gap"])
        first_of_session = first_of_user.copy()
        first_of_session[1:] |= session_number[1:] != session_number[:-1]
    for name in common["time_features"]:
        columns[name] = _time_feature(name, times, gaps, common["newest"])
    starts = np.flatnonzero(first_of_session)  # [session]
    offsets = np.append(starts, len(user))  # [session + 1]
    sessions: dict[str, Any] = {USER_ID: one_array(state[USER_ID]).take(pa.array(user[starts]))}
    if session_number is not None:
        sessions[SESSION_ID] = session_number[starts]
    if max_events := common["max_events"]:
        to_end = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(user))  # [event]: 1 for a session's last
        columns = {name: column[to_end <= max_events] for name, column in columns.items()}
        offsets = np.concatenate([[0], np.cumsum(np.minimum(np.diff(offsets), max_events))])
    list_offsets = pa.array(offsets, pa.int32())
    for name, column in columns.items():
        kind = np.int64 if column.dtype.kind in "iu" else column.dtype
        values = pa.array(column.astype(kind, copy=False))
        sessions[name + LIST_SUFFIX] = pa.ListArray.from_arrays(list_offsets, values)
    return pa.table(sessions)


def derives_sessions(common: Mapping[str, Any]) -> bool:
    """Whether the settings make sessions that differ from the users' events."""
    return any(common[name] for name in ("weights", "session_gap", "time_features", "max_events"))


def _widen_integers(column: pa.ListArray) -> pa.ListArray:
    """Return lists with int64 values, as the splits store them."""
    values = column.values
    wide = values.cast(pa.int64()) if pa.types.is_integer(values.type) else values
    return pa.ListArray.from_arrays(column.offsets, wide)


def _time_feature(name: str, times: AnyArray, gaps: AnyArray, newest: float) -> Any:
    """Return a time feature, [event]; hour and weekday as category codes."""
    if name == "gap":
        return gaps.astype(np.float32)
    if name == "recency":
        return event_arithmetic.recencies(times, newest)
    return (event_arithmetic.hours if name == "hour" else event_arithmetic.weekdays)(times) + FIRST_ITEM_ROW
