"""The item table of an update: new lines after the old items, and lines for items that only events knew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, ModalityError, SchemaError
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, TRAIN_COUNT
from missrec_t4r.workflows import catalogue as catalogues
from missrec_t4r.workflows import checks


def with_lines(
    old: Catalogue, table: pa.Table | None, files: Mapping[str, Path], findings: checks.Findings
) -> tuple[pa.Table, catalogues.Vectors, int]:
    """Return the old items followed by the new lines of the item table, their vectors, and how many lines count.

    Raises
    ------
    ConfigError, SchemaError, ModalityError
        The table or its vectors do not fit the catalogue.
    """
    known = old.items.drop_columns([TRAIN_COUNT])
    vectors = {name: modality.vectors[FIRST_ITEM_ROW:] for name, modality in old.modalities.items()}
    if table is None:
        if files:
            raise ConfigError("vectors are given without an item table", "both or none", "add --items")
        return known, vectors, 0
    ids = checks.normal_ids(table[ITEM_ID], ITEM_ID)
    if pa.types.is_string(ids.type) and old.id_type == "int64":
        ids = checks.text_to_integers(ids) or ids
    if ids.type != known[ITEM_ID].type:
        raise SchemaError(f"item ids are {ids.type} in the item table", f"{known[ITEM_ID].type} as in the catalogue")
    table = table.set_column(table.column_names.index(ITEM_ID), ITEM_ID, ids)
    given: catalogues.Vectors = catalogues.read_modalities(files, table.num_rows)
    for name, array in given.items():
        if name not in vectors or vectors[name].shape[1] != array.shape[1]:
            widths = {known_name: part.shape[1] for known_name, part in vectors.items()}
            raise ModalityError(f"modality {name!r} of width {array.shape[1]}", f"one of the catalogue's: {widths}")
    table, given = catalogues.unique_items(table, given, findings)
    rows = old.rows_of(table[ITEM_ID].combine_chunks())
    shared = [name for name in table.column_names if name in known.column_names]
    try:
        both = pa.concat_tables([known, table.select(shared)], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"the item table differs in a type ({error})", "types as in the catalogue") from error
    new = np.flatnonzero(rows < FIRST_ITEM_ROW)
    order = np.arange(old.n_items)
    told = np.flatnonzero((rows >= FIRST_ITEM_ROW) & _empty(known)[np.maximum(rows - FIRST_ITEM_ROW, 0)])
    order[rows[told] - FIRST_ITEM_ROW] = old.n_items + told  # only events knew these items; now they have a line
    if not len(new) + len(told):
        return known, vectors, 0
    order = np.concatenate([order, old.n_items + new])
    blank = {name: np.zeros((table.num_rows, array.shape[1]), np.float32) for name, array in vectors.items()}
    grown = {name: np.concatenate([array, given.get(name, blank[name])])[order] for name, array in vectors.items()}
    return both.take(pa.array(order)), grown, len(new) + len(told)


def _empty(items: pa.Table) -> np.ndarray[Any, Any]:
    """Return which items nothing is known of but their id, [item]."""
    empty = np.ones(items.num_rows, bool)
    for name in items.column_names:
        if name != ITEM_ID:
            empty &= items[name].is_null().to_numpy()
    return empty
