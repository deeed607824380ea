"""Rows of a split: its parquet files and, where nights stand beside them, the newest row of every user.

A data folder may hold ``deltas/00002.arrow``, …: whole sessions of the users of a night, oldest first, and how long
their prefix in every split is (columns ``train``, ``valid``, ``test``; 0: no row). They take the place of all older
rows of these users. The parquet files alone are the folder as it was before those nights, complete in themselves; the
rows read here are those that the parquet files have after ``missrec etl --compact``, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.data.user_hash import hash_ids
from missrec_t4r.io.atomic import read_consistently
from missrec_t4r.schema import LIST_SUFFIX, SPLITS, USER_ID

DELTA_FOLDER = "deltas"
Ints = npt.NDArray[np.int64]


def delta_files(data: Path) -> list[Path]:
    """Return the deltas of a data folder, oldest first."""
    return sorted((data / DELTA_FOLDER).glob("*.arrow"))


def row_files(folder: str | Path) -> list[Path]:
    """Return the parquet files of a split in the order of their names; those that deltas replace rows of included."""
    return sorted(Path(folder).glob("*.parquet"))


def read_rows(folder: str | Path, columns: Sequence[str]) -> pa.Table:
    """Return columns of a split's rows, newest rows of all users, in the order of the users' hash.

    Parameters
    ----------
    folder : path
        A folder of session parquet; ``train``, ``valid`` and ``test`` of a data folder may have deltas beside them.
    columns : sequence of str
        They must be there, in every file.
    """
    folder = Path(folder)
    if folder.name not in SPLITS or not delta_files(folder.parent):
        return _plain(folder, list(columns))
    return read_consistently(folder.parent, lambda data: _merged(data, folder.name, list(columns)))


def take_prefixes(sessions: pa.Table, offsets: Ints, lengths: Ints) -> pa.Table:
    """Cut all list columns to prefixes and leave out the sessions of length 0.

    Parameters
    ----------
    sessions : pyarrow.Table
        One row per session; list columns end in ``-list``.
    offsets, lengths : ndarray [session + 1], ndarray [session]
        Where the sessions' values lie in every list column, and how many of each to keep.
    """
    keep, chosen = inside(offsets, lengths), lengths > 0
    cut = pa.array(np.concatenate([[0], np.cumsum(lengths[chosen])]), pa.int32())
    columns = {}
    for name in sessions.column_names:
        column = one_array(sessions[name])
        if name.endswith(LIST_SUFFIX):
            columns[name] = pa.ListArray.from_arrays(cut, _kept(column.flatten(), keep))
        else:
            columns[name] = column.filter(pa.array(chosen))
    return pa.table(columns)


def inside(offsets: Ints, lengths: Ints) -> npt.NDArray[np.bool_]:
    """Return which events belong to the prefixes of their sessions, [event].

    Examples
    --------
    >>> inside(np.array([0, 2, 5]), np.array([1, 2])).tolist()
    [True, False, True, True, False]
    """
    sizes = np.diff(offsets)
    step = np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], sizes)
    return np.asarray(step < np.repeat(lengths, sizes))


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array, without a copy if it is one."""
    if isinstance(column, pa.ChunkedArray) and column.num_chunks == 1:
        return column.chunk(0)
    combined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _plain(folder: Path, columns: list[str]) -> pa.Table:
    tables = [pq.read_table(file, columns=columns) for file in row_files(folder)]
    return pa.concat_tables(tables, promote_options="permissive")


def _merged(data: Path, split: str, columns: list[str]) -> pa.Table:
    """Return the rows of parquet files and deltas; of every user those of the newest file that knows them."""
    names = [*dict.fromkeys([USER_ID, *columns])]
    newer: list[pa.Array] = []
    parts: list[pa.Table] = []
    for file in reversed(delta_files(data)):
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        offsets = np.asarray(next(one_array(table[n]) for n in table.column_names if n.endswith(LIST_SUFFIX)).offsets)
        lengths = table[split].to_numpy().astype(np.int64)
        lengths[_among(table[USER_ID], newer)] = 0
        parts.append(take_prefixes(table.select(names), offsets.astype(np.int64), lengths))
        newer.append(one_array(table[USER_ID]))
    plain = _plain(data / split, names)
    kept = plain.filter(pa.array(~_among(plain[USER_ID], newer)))
    rows = pa.concat_tables([kept, *(part.cast(plain.schema) for part in reversed(parts))])
    order = np.argsort(hash_ids(one_array(rows[USER_ID])), kind="stable")  # merges runs that are in order
    return rows.select(columns).take(pa.array(order))


def _among(users: pa.ChunkedArray, others: Sequence[pa.Array]) -> npt.NDArray[np.bool_]:
    """Return which users are among others, [row]."""
    if not others:
        return np.zeros(len(users), bool)
    found = pc.is_in(one_array(users), value_set=pa.concat_arrays(others))
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def _kept(values: pa.Array, keep: npt.NDArray[np.bool_]) -> pa.Array:
    primitive = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    if primitive and not values.null_count:  # numpy compresses numbers faster than Arrow
        return pa.array(values.to_numpy()[keep], values.type)
    return values.filter(pa.array(keep))
