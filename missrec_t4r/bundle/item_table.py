"""Read the bundle's item table and request transform; used by the server's first model, which needs no torch."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.bundle.id_encoder import SessionTransform
from missrec_t4r.bundle.manifest import CATALOGUE_FILE, ITEMS_FILE, REMEDY
from missrec_t4r.bundle.validate import check_contents
from missrec_t4r.errors import BundleError
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.io.parquet_limits import decoded_bytes, inspect
from missrec_t4r.io.tensor_checks import header_of
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, RETIRED, SESSION_TRANSFORM_FILE, TRAIN_COUNT

MOST_TABLE = 8 << 30
"""Most bytes of the item table in memory."""
_SMALL_TABLE = 64 << 20
"""Bytes in memory that any table may take."""
_MOST_PACKED = 100
"""How many times its file's size a larger table may take in memory; those of shops take five to ten times."""
_LONGEST_ID = 1 << 14
"""Most bytes of an item id: every response holds ten of them."""


def load_items(folder: Path) -> pa.Table:
    """Return the item table in row order, starting with row 3.

    Its rows and its size in memory are compared with the catalogue's before any of it is decoded.

    Raises
    ------
    BundleError
        The file is missing, is not parquet, has other rows than the catalogue, would take more memory than any table of
        such a file, or has no columns ``item_id`` and ``train_count`` of the right types.
    """
    file = folder / ITEMS_FILE
    if not file.is_file():
        raise BundleError(f"{folder} holds no {ITEMS_FILE}", "a bundle folder", "write one with `missrec export`")
    try:
        contents = inspect(file)
        n_items = _n_rows(folder) - FIRST_ITEM_ROW
        if contents.rows != n_items:
            raise BundleError(
                f"{file} has {contents.rows} rows", f"{n_items}, one per item of {CATALOGUE_FILE}", REMEDY
            )
        most = min(max(_SMALL_TABLE, _MOST_PACKED * file.stat().st_size), MOST_TABLE)
        if (size := decoded_bytes(file, contents, most)) > most:
            raise BundleError(f"{file} takes {size} bytes of memory or more", f"at most {most}", REMEDY)
        items = pq.read_table(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BundleError(f"{file} cannot be read: it {error}", "a parquet file", REMEDY) from error
    if problem := _problem(items):
        raise BundleError(f"{file} {problem}", "what `missrec export` writes", REMEDY)
    return items


def _n_rows(folder: Path) -> int:
    """Return the rows of the catalogue's vectors, which take bytes in their file: no claim."""
    file = folder / CATALOGUE_FILE
    check_contents(file)
    tables = [tensor.shape for name, tensor in header_of(file).items() if name.endswith(".vectors")]
    return max((shape[0] for shape in tables if shape), default=FIRST_ITEM_ROW)


def _problem(items: pa.Table) -> str:
    """Return what is wrong with the columns that the model reads; empty if nothing is."""
    names = items.column_names
    if ITEM_ID not in names or TRAIN_COUNT not in names or len(set(names)) != len(names):
        return f"has columns {names}"
    ids, counts = items[ITEM_ID], items[TRAIN_COUNT]
    if not (pa.types.is_integer(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        return f"has item ids of type {ids.type}"
    if ids.null_count or counts.null_count or not pa.types.is_integer(counts.type) or pc.min(counts).as_py() < 0:
        return "has missing item ids, or counts that are not whole numbers from 0 on"
    if not pa.types.is_integer(ids.type) and pc.max(pc.binary_length(ids)).as_py() > _LONGEST_ID:
        return f"has an item id of more than {_LONGEST_ID} bytes"
    if RETIRED in names and not pa.types.is_boolean(items[RETIRED].type):
        return f"has a column {RETIRED!r} of type {items[RETIRED].type}"
    return ""


def load_session_transform(folder: Path, items: pa.Table | None = None) -> SessionTransform:
    """Return the request transform of a bundle."""
    return SessionTransform.load(
        folder / SESSION_TRANSFORM_FILE, vocabulary_of(load_items(folder) if items is None else items)
    )


def vocabulary_of(items: pa.Table) -> pa.Array:
    """Return the raw ids of an item table in row order, starting with row 3."""
    return one_array(items[ITEM_ID])
