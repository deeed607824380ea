"""What ``missrec catalogue update`` did to a bundle, and the bundle in its place lacks.

A training knows the item table of its data folder; what was added or retired since, in the bundle or the deployment
alone, ends with the next export or deploy, unless the item table has it too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.bundle.item_table import load_items
from missrec_t4r.errors import BundleError
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.schema import ITEM_ID, RETIRED, TRAIN_COUNT

log = logging.getLogger(__name__)

_CURE = "give them in the item table of the data folder, or repeat missrec catalogue update"


def warn_of_lost_updates(old: Path, new: Path) -> None:
    """Log which new and retired items of an old bundle the new one does not have as such.

    Parameters
    ----------
    old : Path
        Bundle that is replaced; nothing is logged if it cannot be read.
    new : Path
        Bundle in its place.
    """
    try:
        before, after = load_items(old), load_items(new)
    except BundleError:
        return
    old_ids, new_ids = (_ids(items) for items in (before, after))
    if old_ids.type != new_ids.type:
        log.warning(f"item ids are of type {new_ids.type}, not {old_ids.type}: clients connect again, and send these")
        return
    added = pc.and_not(pc.equal(before[TRAIN_COUNT], 0), pc.is_in(old_ids, value_set=new_ids))
    if ids := old_ids.filter(one_array(added)).to_pylist():
        log.warning(f"no longer in the catalogue, without events in training: {_named(ids)}; {_CURE}")
    if RETIRED in after.column_names:  # a row that says false is what somebody wants
        new_ids = new_ids.filter(pc.is_null(one_array(after[RETIRED])))
    back = pc.and_(_retired(before), pc.is_in(old_ids, value_set=new_ids))
    if ids := old_ids.filter(one_array(back)).to_pylist():
        log.warning(f"retired in the bundle that is replaced, and recommended again: {_named(ids)}; {_CURE}")


def _ids(items: pa.Table) -> pa.Array:
    ids = one_array(items[ITEM_ID])
    return ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())


def _retired(items: pa.Table) -> pa.ChunkedArray:
    if RETIRED in items.column_names:
        return pc.fill_null(items[RETIRED], False)
    return pc.less(items[TRAIN_COUNT], 0)  # none


def _named(ids: Sequence[object]) -> str:
    examples = ", ".join(map(str, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids):,} {'items' if len(ids) > 1 else 'item'} ({examples})"
