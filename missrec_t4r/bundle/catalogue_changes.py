"""The items and vectors of a catalogue update: read, checked, and compared with the catalogue."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.arrays import Bools, Floats, Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError, ModalityError
from missrec_t4r.io.arrow_files import one_array, unequal
from missrec_t4r.io.npy_files import read_npy
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, RETIRED, TRAIN_COUNT, UNKNOWN_ROW

log = logging.getLogger(__name__)

_INTEGER = "^(0|-?[1-9][0-9]*)$"
"""How an integer is written: without a plus, spaces or leading zeros."""
_AS_WRITTEN = "write the ids as the item table has them"


class Changes(NamedTuple):
    """Items to add, change or retire."""

    table: pa.Table
    """One row per item: ``item_id`` and any columns."""
    rows: Ints
    """[item]: an existing item's row of the catalogue, a new item's next free one."""
    vectors: Mapping[str, Floats]
    """Modality -> [item, width]; a row of NaN where no vector was given."""

    @classmethod
    def of(cls, table: pa.Table, modalities: Mapping[str, Path | Floats], catalogue: Catalogue) -> Changes:
        """Check a table and its vectors against the catalogue.

        Raises
        ------
        DataError, ModalityError
            They do not fit it.
        """
        rows = _rows_of(catalogue, table)
        vectors = {name: _vectors(name, source, catalogue, len(rows)) for name, source in modalities.items()}
        return cls(table, rows, vectors)

    def only(self, chosen: Bools) -> Changes:
        """Return the chosen items."""
        vectors = {name: vectors[chosen] for name, vectors in self.vectors.items()}
        return Changes(self.table.filter(pa.array(chosen)), self.rows[chosen], vectors)

    def has_vector(self, modality: str) -> Bools:
        """Return which items come with a vector, [item]."""
        if modality not in self.vectors:
            return np.zeros(len(self.rows), bool)
        return ~np.isnan(self.vectors[modality]).any(1)

    def column(self, name: str, dtype: pa.DataType) -> pa.Array:
        """Return a column of the table in the catalogue's type."""
        column = one_array(self.table[name])
        try:
            return column.cast(dtype)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"column {name!r} of type {column.type}", f"{dtype}, as in the catalogue") from error

    def with_old_vectors(self, catalogue: Catalogue) -> dict[str, int]:
        """Return by modality how many known items have another content for its encoder and bring no vector of it."""
        counts = {}
        for name, modality in catalogue.modalities.items():
            read = [column for column in columns_of(modality.encoder) if column in self.table.column_names]
            content = Changes(self.table.select([ITEM_ID, *read]), self.rows, {})
            is_old = self.rows < catalogue.n_rows
            counts[name] = int((content.differing(catalogue) & is_old & ~self.has_vector(name)).sum())
        return {name: count for name, count in counts.items() if count}

    def differing(self, catalogue: Catalogue) -> Bools:
        """Return which items are new, or have another value or vector than the catalogue, [item]."""
        is_old = self.rows < catalogue.n_rows
        old_rows = self.rows[is_old]
        changed = np.zeros(len(old_rows), bool)
        for name in self.table.column_names:
            if name in (ITEM_ID, TRAIN_COUNT):
                continue
            if name in catalogue.items.column_names:
                old = one_array(catalogue.items[name]).take(pa.array(old_rows - FIRST_ITEM_ROW))
                changed |= unequal(old, self.column(name, old.type).filter(pa.array(is_old)))
            else:
                changed |= self.table[name].is_valid().to_numpy()[is_old]
        for name, vectors in self.vectors.items():
            modality = catalogue.modalities[name]
            differs = (modality.vectors[old_rows] != vectors[is_old]).any(1) | ~modality.present[old_rows]
            changed |= differs & self.has_vector(name)[is_old]
        result = ~is_old
        result[is_old] = changed
        return result


def columns_of(encoder: Mapping[str, Any]) -> list[str]:
    """Return the columns of the item table that an encoder has read."""
    return [name for name in (*encoder.get("columns", ()), encoder.get("column")) if name]


def read_items(items: str | Path | pa.Table, item_column: str = ITEM_ID) -> pa.Table:
    """Return the table of items to add, change or retire; its id column gets the name ``item_id``.

    The unnamed row index that pandas may have written is left out.

    Raises
    ------
    DataError
        The file cannot be read, has no such column or missing ids, or ``retired`` is not true or false.
    """
    if isinstance(items, pa.Table):
        table, name = items, "the table"
    else:
        try:
            table, name = pq.read_table(items), str(items)
        except (OSError, pa.ArrowInvalid) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise DataError(f"{items} cannot be read ({reason})", "a parquet file with a column of item ids") from error
    if item_column not in table.column_names:
        found = f"{name} has columns {table.column_names}"
        raise DataError(found, f"a column {item_column!r}", "name yours with --item-column")
    if item_column != ITEM_ID and ITEM_ID in table.column_names:
        log.info(f"{name}: column {ITEM_ID} is left out, {item_column} holds the ids")
        table = table.drop_columns([ITEM_ID])
    if index := [name for name in table.column_names if name.startswith("__index_level_")]:
        log.info(f"{name}: {', '.join(index)}, a row index of pandas, is left out")
        table = table.drop_columns(index)
    if missing := table[item_column].null_count:
        raise DataError(f"{missing} of {table.num_rows} items without an id", "one id per row", "leave these rows out")
    if RETIRED in table.column_names and not pa.types.is_boolean(dtype := table[RETIRED].type):
        raise DataError(f"column {RETIRED!r} of type {dtype}", "true or false", "convert it, or leave it out")
    return table.rename_columns([ITEM_ID if name == item_column else name for name in table.column_names])


def _rows_of(catalogue: Catalogue, table: pa.Table) -> Ints:
    """Return the catalogue row of every row of the table: an existing item's own, a new item's next free one."""
    if ITEM_ID not in table.column_names or not table.num_rows:
        raise DataError(
            f"items with columns {table.column_names}, {table.num_rows} rows", "a column item_id and at least one row"
        )
    ids = table[ITEM_ID].combine_chunks()
    id_type = catalogue.items[ITEM_ID].type
    try:
        if pa.types.is_string(id_type) and not _is_text(ids.type):  # as texts, 7 and "007" would be two items
            raise pa.ArrowInvalid(f"{ids.type} are not texts")
        if pa.types.is_boolean(ids.type) or pa.types.is_temporal(ids.type):  # Arrow makes integers of them
            raise pa.ArrowInvalid(f"{ids.type} are not ids")
        if pa.types.is_integer(id_type) and _is_text(ids.type):
            _require_integers(ids.cast(pa.string()))
        ids = ids.cast(id_type)
    except pa.ArrowInvalid as error:
        raise DataError(f"item ids of type {ids.type}", f"{id_type}, as in the catalogue", _AS_WRITTEN) from error
    if ids.null_count or len(ids.unique()) != len(ids):
        raise DataError("the new items hold missing or repeated ids", "one row per item")
    rows = catalogue.rows_of(ids).copy()
    new = rows == UNKNOWN_ROW
    rows[new] = catalogue.n_rows + np.arange(new.sum())
    return rows


def _require_integers(ids: pa.Array) -> None:
    """Refuse text ids that are not written as an integer is, as `missrec etl` does: "077" is not 77."""
    others = ids.drop_null().filter(pc.invert(pc.match_substring_regex(ids.drop_null(), _INTEGER)))
    if len(others):
        found = f"the item id {others[0].as_py()!r}, a text"
        raise DataError(found, "integers, as in the catalogue: 77 or '77'", _AS_WRITTEN)
    log.info(f"{len(ids):,} item ids are texts, and integers in the catalogue: they are read as integers")


def _is_text(dtype: pa.DataType) -> bool:
    values = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return str(values) in ("string", "large_string", "string_view")


def _vectors(name: str, source: Path | Floats, catalogue: Catalogue, n_items: int) -> Floats:
    if name not in catalogue.modalities:
        raise ModalityError(f"modality {name!r}", f"one of {', '.join(catalogue.modalities)}: the model has no other")
    try:
        vectors = read_npy(source) if isinstance(source, Path) else source
    except (OSError, ValueError) as error:
        raise ModalityError(
            f"{source} cannot be read ({error})", "a .npy file of numbers", "check --modality"
        ) from error
    expected = n_items, catalogue.modalities[name].width
    if vectors.shape != expected or vectors.dtype.kind != "f":
        raise ModalityError(f"modality {name!r} has {vectors.dtype} of shape {vectors.shape}", f"numbers {expected}")
    whole = np.isnan(vectors).all(1) | np.isfinite(vectors).all(1)
    if not whole.all():
        raise ModalityError(f"modality {name!r} holds NaN or infinity in row {int(np.argmin(whole))}", "whole vectors")
    return vectors.astype(np.float32)
