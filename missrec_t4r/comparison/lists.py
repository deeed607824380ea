"""Recommendation lists in parquet, from any system, evaluated as they are.

One row per user with a list column, or one row per recommended item (in the order of the file, or of a column
``rank``). Ids are the raw ones; they are matched as text, so that 7 and "7" are the same item.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM
from missrec_t4r.evaluation.metrics import MISSED
from missrec_t4r.io.arrow_files import is_list, one_array
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, UNKNOWN_ROW, USER_ID

_USERS, _ITEMS = (USER_ID, "user", "session_id", "session"), (ITEM_ID, "item_ids", "items", "item")
RANK: Final = "rank"


class Lists(NamedTuple):
    """The recommendation lists of one file."""

    users: pa.Array
    """[user], str: raw ids, each once."""
    rows: Ints
    """[user, place]: catalogue rows in order, 2 for items that the catalogue lacks, -1 after the end of a list."""
    counts: Mapping[str, int]
    """What is odd about the file."""


def read_lists(path: Path, catalogue: Catalogue) -> Lists:
    """Read a file or folder of lists.

    Raises
    ------
    SchemaError
        No column of users or of items is found.
    DataError
        No readable parquet file, no row, or a user with two lists.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error})", "a parquet file of lists") from error
    if not table.num_rows:
        raise DataError(f"{path} has no row", "a list of items for every user")
    user, items = _columns(path, table)
    if is_list(table[items].type):
        column = one_array(table[items])
        users, lengths = as_text(one_array(table[user])), pc.fill_null(pc.list_value_length(column), 0)
        owner = np.repeat(np.arange(table.num_rows), np.asarray(lengths, np.int64))
        names = as_text(column.flatten())
        if twice := len(users) - len(pc.unique(users)):
            raise DataError(f"{path} has {twice} users with more than one list", "one row per user", "keep one of them")
    else:
        if RANK in table.column_names:
            table = table.sort_by([(RANK, "ascending")])
        coded = as_text(one_array(table[user])).dictionary_encode()
        users, owner = coded.dictionary, np.asarray(coded.indices.fill_null(-1), np.int64)
        order = np.argsort(owner, kind="stable")
        order = order[owner[order] >= 0]
        owner, names = owner[order], as_text(one_array(table[items])).take(pa.array(order))
    codes = np.asarray(names.dictionary_encode().indices.fill_null(-1), np.int64)
    first = np.sort(np.unique(owner * (codes.max(initial=-1) + 2) + codes, return_index=True)[1])
    owner, rows = owner[first], rows_by_text(names, catalogue)[first]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    matrix = np.full((len(users), int(place.max(initial=-1)) + 1), -1, np.int64)
    matrix[owner, place] = rows
    counts = {
        "unknown_items": int((rows == UNKNOWN_ROW).sum()),
        "repeated_items_dropped": len(codes) - len(first),
        "empty_lists": len(users) - len(np.unique(owner)),
    }
    return Lists(users, matrix, counts)


def rank_lists(
    rows: Ints, histories: Sessions, targets: Ints, n_rows: int, top_k: int
) -> tuple[dict[str, Ints], dict[str, Ints]]:
    """Return ranks [session] and the first items [session, top_k] by protocol.

    Lists do not say whether their order depends on which items are in the session: they are not ``kept_strict``.

    Parameters
    ----------
    rows : ndarray [session, place]
        As in `Lists`, one list per session. Under ``excluded`` the session's items are taken out.
    histories : Sessions
        Known items.
    targets : ndarray [session]
    n_rows, top_k : int
    """
    cells = histories.session_of_event * n_rows + histories.values
    seen = np.isin(np.arange(len(rows))[:, None] * n_rows + rows, cells) & (rows >= FIRST_ITEM_ROW)
    order = np.argsort(seen | (rows < 0), axis=1, kind="stable")  # what stays first, in its order
    unseen = np.take_along_axis(np.where(seen, -1, rows), order, axis=1)
    padding = np.full((len(rows), top_k), -1, np.int64)  # also for files of empty lists alone
    ranks, shown = {}, {}
    for protocol, lists in ((EXCLUDED, unseen), (KEPT_WITH_HISTORY_TERM, rows)):
        padded = np.concatenate([lists, padding], axis=1)
        hit = (padded == targets[:, None]) & (targets >= FIRST_ITEM_ROW)[:, None]
        ranks[protocol] = np.where(hit.any(1), hit.argmax(1) + 1, MISSED)
        shown[protocol] = padded[:, :top_k]
    return ranks, shown


def as_text(ids: pa.Array) -> pa.Array:
    """Return raw ids as text; whole numbers that were stored as floats (as pandas does with gaps) without ``.0``.

    Examples
    --------
    >>> as_text(pa.array([7.0, None])).to_pylist(), as_text(pa.array(["7"])).to_pylist()
    (['7', None], ['7'])
    """
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_floating(ids.type) and pc.all(pc.equal(pc.floor(ids), ids)).as_py() in (True, None):
        ids = ids.cast(pa.int64())
    return ids.cast(pa.string())


def rows_by_text(ids: pa.Array, catalogue: Catalogue) -> Ints:
    """Return the catalogue rows of ids, compared as text, [id]; 2 for those that it lacks."""
    places = pc.index_in(as_text(ids), value_set=as_text(one_array(catalogue.items[ITEM_ID])))
    return np.asarray(places.fill_null(UNKNOWN_ROW - FIRST_ITEM_ROW), np.int64) + FIRST_ITEM_ROW


def _columns(path: Path, table: pa.Table) -> tuple[str, str]:
    """Return the names of the columns of users and items."""
    names, nested = table.column_names, [f.name for f in table.schema if is_list(f.type)]
    flat = [name for name in names if name not in nested]
    items = next((name for name in _ITEMS if name in (nested or flat)), None)
    items = nested[0] if items is None and len(nested) == 1 else items
    user = next((name for name in _USERS if name in flat), None)
    user = flat[0] if user is None and nested and len(flat) == 1 else user
    if user is None or items is None:
        raise SchemaError(
            f"{path} has the columns {', '.join(names)}",
            "user_id and item_id: a list of items per user, or one row per recommended item with its rank",
            "rename them",
        )
    return user, items
