"""What a data folder keeps of some users, read where it lies: a search by hash, nothing of the other users.

The newest state of a user counts: that of the youngest delta, else that of the user's partition.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.data.session_files import DELTA_FOLDER, one_array
from missrec_t4r.data.user_hash import Hashes, hash_ids, partition_of
from missrec_t4r.etl.engine.sessionize import STATE_FOLDER, USER_HASH, Ints, lists_of, read_arrow
from missrec_t4r.schema import LIST_SUFFIX, USER_ID

_THREADS = 4
"""They wait for the disk, and numpy and Arrow let go of the interpreter."""


class Known(NamedTuple):
    """Users that were found, in the order in which they were found."""

    numbers: Ints
    """[user]: which of the asked ones."""
    sizes: Ints
    """[user]: how many events."""
    values: dict[str, npt.NDArray[Any]]
    """Column -> [event], the events of one user after those of the other."""


def state_deltas(data: Path) -> list[Path]:
    """Return what the deltas of a data folder know of their users, oldest first."""
    return sorted((data / STATE_FOLDER / DELTA_FOLDER).glob("*.arrow"))


def load_user_state(data: Path, partitions: int, users: pa.Array, hashes: Hashes) -> Known:
    """Return the events of some users, time-ordered, as the folder keeps them.

    Parameters
    ----------
    data : Path
        Data folder of the fast path; ``partitions``: how many it has.
    users, hashes : array [user], ndarray [user]
        Users without repeats, in the order of their hash.
    """
    open_ = np.ones(len(users), bool)

    def look(part: pa.Table, begin: int, end: int) -> Known:
        asked = begin + np.flatnonzero(open_[begin:end])
        rows = rows_of(part, users.take(pa.array(asked)), hashes[asked])
        there = rows >= 0
        open_[asked[there]] = False
        return _taken(part, asked[there], rows[there])

    found = [look(read_arrow(file), 0, len(users)) for file in reversed(state_deltas(data))]
    with ThreadPoolExecutor(_THREADS) as threads:  # no user is in two partitions
        found += threads.map(lambda where: look(read_arrow(where[0]), *where[1:]), _files(data, partitions, hashes))
    names = found[0].values if found else {}
    return Known(
        np.concatenate([np.zeros(0, np.int64), *(part.numbers for part in found)]),
        np.concatenate([np.zeros(0, np.int64), *(part.sizes for part in found)]),
        {name: np.concatenate([part.values[name] for part in found]) for name in names},
    )


def rows_of(part: pa.Table, users: pa.Array, hashes: Hashes) -> Ints:
    """Return the row of every user in a state, -1 where there is none, [user]."""
    ids, known = one_array(part[USER_ID]), hashes_of(part)
    rows, at = np.full(len(users), -1, np.int64), np.searchsorted(known, hashes)
    open_ = np.flatnonzero(at < len(known))
    while len(open_):  # a second round is for two users with one hash
        open_ = open_[known[at[open_]] == hashes[open_]]
        same = pc.equal(ids.take(pa.array(at[open_])), users.take(pa.array(open_))).to_numpy(zero_copy_only=False)
        rows[open_[same]] = at[open_[same]]
        open_ = open_[~same]
        at[open_] += 1
        open_ = open_[at[open_] < len(known)]
    return rows


def hashes_of(part: pa.Table) -> Hashes:
    """Return the hashes of a state's users, ascending; folders that were written before they were kept have none."""
    return part[USER_HASH].to_numpy() if USER_HASH in part.column_names else hash_ids(one_array(part[USER_ID]))


def _files(data: Path, partitions: int, hashes: Hashes) -> list[tuple[Path, int, int]]:
    """Return the states of the partitions that may know the users, and which of them to ask each for."""
    numbers = partition_of(hashes, partitions)
    bounds = np.searchsorted(numbers, np.arange(partitions + 1))
    files = [data / STATE_FOLDER / f"{number:05}.arrow" for number in range(partitions)]
    asked = zip(files, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    return [(file, begin, end) for file, begin, end in asked if begin < end and file.is_file()]


def _taken(part: pa.Table, numbers: Ints, rows: Ints) -> Known:
    sizes, values = np.zeros(len(rows), np.int64), {}
    for name, column in lists_of(part).items():
        offsets = np.asarray(column.offsets)
        starts = offsets[rows].astype(np.int64)
        sizes = offsets[rows + 1] - starts
        at = np.arange(sizes.sum()) + np.repeat(starts - np.concatenate([[0], np.cumsum(sizes)])[:-1], sizes)
        values[name.removesuffix(LIST_SUFFIX)] = column.values.to_numpy()[at]
    return Known(numbers, sizes, values)
