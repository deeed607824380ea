"""User state: all events of every user, sorted by time and uncut, and random access to the events of some users.

A data folder of the out-of-core engine keeps it, so that an incremental update never reads old input again:

    state/state.json            types, category values, boundaries and partitions of the folder
    state/inputs.json           SHA-256 digests of the event files of the first run (`versions.write_inputs`)
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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.arrays import Ints
from missrec_t4r.data.session_files import DELTA_FOLDER
from missrec_t4r.data.user_hash import Hashes, hash_ids, partition_of
from missrec_t4r.etl.engine.ordering import EventOrder, order_events
from missrec_t4r.io.arrow_files import one_array, read_arrow
from missrec_t4r.io.atomic import link_or_copy
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


def state_schema(folder: str | Path) -> pa.Schema:
    """Return the schema of the user state in a data folder or working folder."""
    return read_arrow(next((Path(folder) / STATE_FOLDER).glob("*.arrow"))).schema


def state_deltas(data: Path) -> list[Path]:
    """Return the state files of a data folder's deltas, oldest first."""
    return sorted((data / STATE_FOLDER / DELTA_FOLDER).glob("*.arrow"))


def link_state(work: Path, out: Path, content: Mapping[str, Any]) -> None:
    """Link the state files of a working folder into the new data folder; add what its partitions have in common."""
    target = out / STATE_FOLDER
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed here
    target.mkdir()
    for file in (work / STATE_FOLDER).glob("[0-9]*"):  # not what tasks were writing when they were killed
        link_or_copy(file, target / file.name)
    write_json(target / STATE_FILE, content, indent=None)


# Tables of user state


def to_state(events: pa.Table, by_user: EventOrder | None = None) -> pa.Table:
    """Return the user state of events: per user the id, its hash and the list columns; ``by_user``: their order."""
    if by_user is None:
        by_user = order_events(one_array(events[USER_ID]), events[TIMESTAMP].to_numpy())
    counts = np.bincount(by_user.codes, minlength=len(by_user.users))  # [user]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())  # [user + 1]
    state = {USER_ID: by_user.users, USER_HASH: pa.array(by_user.hashes, pa.uint64())}
    for name in events.column_names:
        if name != USER_ID:
            values = pa.array(events[name].to_numpy()[by_user.order])
            state[name + LIST_SUFFIX] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(state)


def to_events(state: pa.Table) -> pa.Table:
    """Return the events of a state table, user after user."""
    lists = list_columns(state)
    sizes = lists[ITEM_ID + LIST_SUFFIX].value_lengths().to_numpy()  # [user]
    users = one_array(state[USER_ID]).take(pa.array(np.repeat(np.arange(len(sizes)), sizes)))
    return pa.table(
        {USER_ID: users} | {name.removesuffix(LIST_SUFFIX): column.flatten() for name, column in lists.items()}
    )


def bare_state(state: pa.Table) -> pa.Table:
    """Return ids and list columns of a state table, whose hashes folders of older releases lack."""
    return state.select([USER_ID, *list_columns(state)])


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


def load_users(data: Path, partitions: int, users: pa.Array, hashes: Hashes) -> pa.Table | None:
    """Return the state of some users, without hashes and in no order; None if the folder has none of them.

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

    def look_up(file: Path, begin: int, end: int) -> pa.Table:
        state, requested = read_arrow(file), begin + np.flatnonzero(missing[begin:end])
        rows = find_users(state, users.take(pa.array(requested)), hashes[requested])
        missing[requested[rows >= 0]] = False
        return bare_state(state).take(pa.array(rows[rows >= 0]))

    # Newest first: a user who is in a delta is not looked up in older files.
    parts = [look_up(file, 0, len(users)) for file in reversed(state_deltas(data))]
    with ThreadPoolExecutor(_THREADS) as threads:  # every user is in one partition, so threads write to disjoint ranges
        parts += threads.map(lambda part: look_up(*part), _partition_ranges(data, partitions, hashes))
    return pa.concat_tables(parts) if parts else None


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
