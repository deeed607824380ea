"""Read the bundle's item table and request transform; used by the server's first model, which needs no torch."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.bundle.id_encoder import SessionTransform
from missrec_t4r.bundle.manifest import ITEMS_FILE
from missrec_t4r.errors import BundleError
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.schema import ITEM_ID, SESSION_TRANSFORM_FILE


def load_items(folder: Path) -> pa.Table:
    """Return the item table in row order, starting with row 3.

    Raises
    ------
    BundleError
        The file is missing, is no parquet, or has no column ``item_id``.
    """
    file = folder / ITEMS_FILE
    try:
        items = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise BundleError(f"{file} cannot be read ({error})", "a parquet file", "export the bundle again") from error
    if ITEM_ID not in items.column_names:
        raise BundleError(
            f"{file} has columns {items.column_names}", f"a column {ITEM_ID!r}", "export the bundle again"
        )
    return items


def load_session_transform(folder: Path, items: pa.Table | None = None) -> SessionTransform:
    """Return the request transform of a bundle."""
    return SessionTransform.load(
        folder / SESSION_TRANSFORM_FILE, vocabulary_of(load_items(folder) if items is None else items)
    )


def vocabulary_of(items: pa.Table) -> pa.Array:
    """Return the raw ids of an item table in row order, starting with row 3."""
    return one_array(items[ITEM_ID])
