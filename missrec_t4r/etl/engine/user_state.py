"""User state: all events of every user, sorted by time and uncut, and random access to the events of some users.

A data folder of the out-of-core engine keeps it, so that an incremental update never reads old input again:

    state/state.json            types, category values, boundaries and partitions of the folder
    state/00007.arrow           the users of partition 7, one row each: id, hash (ascending), one list column per column
    state/00007.json, .npy      counts of partition 7; occurrences of each item in its training rows
    state/deltas/00002.arrow    newer rows of the users of version 2 (`delta.py`); the newest row of a user counts

Arrow files are memory-mapped. Users are found by binary search on their hash; rows of other users are not read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.data.session_files import DELTA_FOLDER
from missrec_t4r.data.user_hash import Hashes, hash_ids, partition_of
from missrec_t4r.etl.engine.ordering import EventOrder
from missrec_t4r.io.arrow_files import one_array, read_arrow
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import ITEM_ID, LIST_SUFFIX, TIMESTAMP, USER_ID

STATE_FOLDER = "state"
STATE_FILE = "state.json"
USER_HASH = "user_hash"
_THREADS = 4
"""Look-ups wait for the disk, and NumPy and Arrow release the interpreter lock."""


def state_path(folder: str | Path, partition: int, extension: str = "arrow") -> Path:
    """Return the state file of a partition in a data folder or working folder."""
    return Path(folder) / STATE_FOLDER / f"{partition:05}.{extension}"


def state_deltas(data: Path) -> list[Path]:
    """Return the state files of a data folder's deltas, oldest first."""
    return sorted((data / STATE_FOLDER / DELTA_FOLDER).glob("*.arrow"))


def move_state(work: Path, out: Path, content: Mapping[str, Any]) -> None:
    """Move the state files of a working folder to the new data folder and add what its partitions have in common."""
    target = out / STATE_FOLDER
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed after the next line
    (work / STATE_FOLDER).rename(target)
    for unfinished in target.glob(".*"):  # of tasks that were killed while they wrote
        shutil.rmtree(unfinished)
    write_json(target / STATE_FILE, content, indent=None)


# Tables of user state


def event_columns(events: pa.Table, items: AnyArray) -> dict[str, AnyArray]:
    """Return the columns of events that the state keeps: item indices, times, then the others in input order."""
    others = [TIMESTAMP, *(name for name in events.column_names if name not in (USER_ID, ITEM_ID, TIMESTAMP))]
    return {ITEM_ID: items.astype(np.int32)} | {name: events[name].to_numpy() for name in others}


def to_state(events: EventOrder, columns: Mapping[str, AnyArray]) -> pa.Table:
    """Return the state table: per user the id, its hash and the list columns.

    Parameters
    ----------
    events : EventOrder
        Users and the order of their events.
    columns : mapping of str to ndarray [event]
        In input order.
    """
    counts = np.bincount(events.codes, minlength=len(events.users))  # [user]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())  # [user + 1]
    state = {USER_ID: events.users, USER_HASH: pa.array(events.hashes, pa.uint64())}
    for name, column in columns.items():
        state[name + LIST_SUFFIX] = pa.ListArray.from_arrays(offsets, pa.array(column[events.order]))
    return pa.table(state)


def list_columns(state: pa.Table) -> dict[str, pa.ListArray]:
    """Return the list columns of a state or session table."""
    return {name: one_array(state[name]) for name in state.column_names if name.endswith(LIST_SUFFIX)}


def user_hashes(state: pa.Table) -> Hashes:
    """Return the hashes of a state's users, ascending; folders of older releases do not store them."""
    return state[USER_HASH].to_numpy() if USER_HASH in state.column_names else hash_ids(one_array(state[USER_ID]))


def count_events(state: pa.Table) -> int:
    """Return the number of events in a state table."""
    return int(pc.sum(pc.list_value_length(state[ITEM_ID + LIST_SUFFIX])).as_py() or 0)


# Look-up of some users


class UserEvents(NamedTuple):
    """Events of the users that a look-up found, user after user."""

    users: Ints
    """[found user]: index among the requested users."""
    sizes: Ints
    """[found user]: number of events."""
    columns: dict[str, AnyArray]
    """Column name without suffix -> [event]."""


def load_user_events(data: Path, partitions: int, users: pa.Array, hashes: Hashes) -> UserEvents:
    """Return all events of some users, each user's sorted by time.

    Parameters
    ----------
    data : Path
        Data folder with user state.
    partitions : int
        Number of its partitions.
    users, hashes : array [user]
        Distinct users, sorted by hash.
    """
    missing = np.ones(len(users), bool)  # [user]: not found yet

    def look_up(state: pa.Table, begin: int, end: int) -> UserEvents:
        requested = begin + np.flatnonzero(missing[begin:end])
        rows = find_users(state, users.take(pa.array(requested)), hashes[requested])
        found = rows >= 0
        missing[requested[found]] = False
        return _take_users(state, requested[found], rows[found])

    # Newest first: a user who is in a delta is not looked up in older files.
    parts = [look_up(read_arrow(file), 0, len(users)) for file in reversed(state_deltas(data))]
    with ThreadPoolExecutor(_THREADS) as threads:  # every user is in one partition, so threads write to disjoint ranges
        ranges = _partition_ranges(data, partitions, hashes)
        parts += threads.map(lambda part: look_up(read_arrow(part[0]), *part[1:]), ranges)
    names = parts[0].columns if parts else {}
    return UserEvents(
        np.concatenate([np.zeros(0, np.int64), *(part.users for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.sizes for part in parts)]),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in names},
    )


def find_users(state: pa.Table, users: pa.Array, hashes: Hashes) -> Ints:
    """Return the row of each user in a state table, -1 where there is none, [user]."""
    ids, state_hashes = one_array(state[USER_ID]), user_hashes(state)
    rows = np.full(len(users), -1, np.int64)
    position = np.searchsorted(state_hashes, hashes)  # [user]: first row with a hash that is not smaller
    pending = np.flatnonzero(position < len(state_hashes))
    while len(pending):  # one round, and one more for each further user with an equal hash
        pending = pending[state_hashes[position[pending]] == hashes[pending]]
        equal = pc.equal(ids.take(pa.array(position[pending])), users.take(pa.array(pending)))
        same = equal.to_numpy(zero_copy_only=False)
        rows[pending[same]] = position[pending[same]]
        pending = pending[~same]
        position[pending] += 1
        pending = pending[position[pending] < len(state_hashes)]
    return rows


def _partition_ranges(data: Path, partitions: int, hashes: Hashes) -> list[tuple[Path, int, int]]:
    """Return the state files that may contain the users: (file, first user, end of users) per partition."""
    numbers = partition_of(hashes, partitions)  # [user], ascending as the hashes are
    bounds = np.searchsorted(numbers, np.arange(partitions + 1))  # [partition + 1]
    files = [state_path(data, number) for number in range(partitions)]
    ranges = zip(files, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    return [(file, begin, end) for file, begin, end in ranges if begin < end and file.is_file()]


def _take_users(state: pa.Table, users: Ints, rows: Ints) -> UserEvents:
    """Return the events of some rows of a state table; only their part of the memory map is read."""
    sizes, columns = np.zeros(len(rows), np.int64), {}
    for name, column in list_columns(state).items():
        offsets = np.asarray(column.offsets)
        starts = offsets[rows].astype(np.int64)  # [user]
        sizes = offsets[rows + 1] - starts  # [user]
        first = np.concatenate([[0], np.cumsum(sizes)])[:-1]  # [user]: where its events begin in the result
        source = np.arange(sizes.sum()) + np.repeat(starts - first, sizes)  # [event]: position in ``column.values``
        columns[name.removesuffix(LIST_SUFFIX)] = column.values.to_numpy()[source]
    return UserEvents(users, sizes, columns)
