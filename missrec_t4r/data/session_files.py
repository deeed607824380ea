"""Read the rows of a split; delta files, if any, are merged on read and the latest row per user wins.

A data folder may hold delta files ``deltas/00002.arrow``, …, one per increment: the whole sessions of the users with
new events, and the length of their prefix in every split (columns ``train``, ``valid``, ``test``; 0: no row). They
override all older rows of these users. The parquet files alone are the folder before those increments. The rows read
here are those that the parquet files hold after compaction (``missrec etl --compact``), in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.data.user_hash import hash_ids
from missrec_t4r.io.arrow_files import one_array, read_arrow
from missrec_t4r.io.atomic import read_consistently
from missrec_t4r.io.input_files import files_in
from missrec_t4r.schema import ITEM_LIST, LIST_SUFFIX, SPLITS, USER_ID

DELTA_FOLDER = "deltas"


def delta_files(data: Path) -> list[Path]:
    """Return the delta files of a data folder, oldest first."""
    return sorted((data / DELTA_FOLDER).glob("*.arrow"))


def row_files(folder: str | Path) -> list[Path]:
    """Return the parquet files of a split in the order of their names, without its delta files and hidden files."""
    return files_in(Path(folder), (".parquet",))


def read_rows(folder: str | Path, columns: Sequence[str]) -> pa.Table:
    """Return columns of a split: the latest row of every user, in the order of the user hash.

    Parameters
    ----------
    folder : path
        A folder of session parquet; beside ``train``, ``valid`` and ``test`` of a data folder there may be deltas.
    columns : sequence of str
        Every file must have them.
    """
    folder = Path(folder)
    if folder.name not in SPLITS:
        return _read_parquet(folder, list(columns))
    return read_consistently(folder.parent, lambda data: _merged(data, folder.name, list(columns)))


def take_prefixes(sessions: pa.Table, offsets: Ints, lengths: Ints) -> pa.Table:
    """Truncate all list columns to prefixes and drop the sessions of length 0.

    Parameters
    ----------
    sessions : pyarrow.Table
        One row per session; list columns end in ``-list``.
    offsets, lengths : ndarray [session + 1], ndarray [session]
        Offsets of the sessions in every list column, and the length of each prefix.
    """
    return take_events(sessions, prefix_mask(offsets, lengths), lengths)


def take_events(sessions: pa.Table, keep: Bools, lengths: Ints) -> pa.Table:
    """Leave events out of all list columns, and drop the sessions of which none is left.

    Parameters
    ----------
    sessions : pyarrow.Table
        One row per session; list columns end in ``-list``.
    keep, lengths : ndarray [event], ndarray [session]
        True for the events that stay, and how many of every session do.
    """
    not_empty = lengths > 0
    new_offsets = pa.array(np.concatenate([[0], np.cumsum(lengths[not_empty])]), pa.int32())
    columns = {}
    for name in sessions.column_names:
        column = one_array(sessions[name])
        if name.endswith(LIST_SUFFIX):
            columns[name] = pa.ListArray.from_arrays(new_offsets, _filter(column.flatten(), keep))
        else:
            columns[name] = column.filter(pa.array(not_empty))
    return pa.table(columns)


def prefix_mask(offsets: Ints, lengths: Ints) -> Bools:
    """Return a mask [event], True for the events in the prefix of their session.

    Examples
    --------
    >>> prefix_mask(np.array([0, 2, 5]), np.array([1, 2])).tolist()
    [True, False, True, True, False]
    """
    sizes = np.diff(offsets)
    step = np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], sizes)  # [event], 0 at the first
    return np.asarray(step < np.repeat(lengths, sizes))


def _read_parquet(folder: Path, columns: list[str]) -> pa.Table:
    tables = [pq.read_table(file, columns=columns) for file in row_files(folder)]
    return pa.concat_tables(tables, promote_options="permissive")


def _merged(data: Path, split: str, columns: list[str]) -> pa.Table:
    """Return the rows of the parquet and delta files; every user's row is that of the newest file that has the user."""
    if not (deltas := delta_files(data)):
        return _read_parquet(data / split, columns)
    names = [*dict.fromkeys([USER_ID, *columns])]
    overridden: list[pa.Array] = []  # users of the newer files
    parts: list[pa.Table] = []
    for file in reversed(deltas):
        table = read_arrow(file)
        offsets = np.asarray(one_array(table[ITEM_LIST]).offsets)
        lengths = table[split].to_numpy().astype(np.int64)
        lengths[_is_in(table[USER_ID], overridden)] = 0
        parts.append(take_prefixes(table.select(names), offsets.astype(np.int64), lengths))
        overridden.append(one_array(table[USER_ID]))
    base = _read_parquet(data / split, names)
    unchanged = base.filter(pa.array(~_is_in(base[USER_ID], overridden)))
    rows = pa.concat_tables([unchanged, *(part.cast(base.schema) for part in reversed(parts))])
    order = np.argsort(hash_ids(one_array(rows[USER_ID])), kind="stable")  # fast: merges sorted runs
    return rows.select(columns).take(pa.array(order))


def _is_in(users: pa.ChunkedArray, others: Sequence[pa.Array]) -> Bools:
    """Return a mask [row], True for users that are in ``others``."""
    if not others:
        return np.zeros(len(users), bool)
    mask = pc.is_in(one_array(users), value_set=pa.concat_arrays(others))
    return np.asarray(mask.to_numpy(zero_copy_only=False), bool)


def _filter(values: pa.Array, keep: Bools) -> pa.Array:
    primitive = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    if primitive and not values.null_count:  # NumPy filters numbers faster than Arrow
        return pa.array(values.to_numpy()[keep], values.type)
    return values.filter(pa.array(keep))
