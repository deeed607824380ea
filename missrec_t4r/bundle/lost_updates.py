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
    if before[ITEM_ID].type != after[ITEM_ID].type:
        return
    known = pc.is_in(before[ITEM_ID], value_set=after[ITEM_ID].combine_chunks())
    added = pc.and_not(pc.equal(before[TRAIN_COUNT], 0), known)
    if ids := before.filter(added)[ITEM_ID].to_pylist():
        log.warning(f"no longer in the catalogue, without events in training: {_named(ids)}; {_CURE}")
    recommended = after.filter(pc.invert(_retired(after)))[ITEM_ID].combine_chunks()
    back = pc.and_(_retired(before), pc.is_in(before[ITEM_ID], value_set=recommended))
    if ids := before.filter(back)[ITEM_ID].to_pylist():
        log.warning(f"retired in the bundle that is replaced, and recommended again: {_named(ids)}; {_CURE}")


def _retired(items: pa.Table) -> pa.ChunkedArray:
    if RETIRED in items.column_names:
        return pc.fill_null(items[RETIRED], False)
    return pc.less(items[TRAIN_COUNT], 0)  # none


def _named(ids: Sequence[object]) -> str:
    examples = ", ".join(map(str, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids):,} {'items' if len(ids) > 1 else 'item'} ({examples})"
