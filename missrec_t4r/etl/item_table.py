"""Raw item table -> Catalogue: vocabulary in the order of the table, presence masks, popularity; item filters.

Item i of the table gets row 3 + i and keeps it. Items that only events know are appended in the order of their
first event (or left out, on request) and have no modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import ConfigError, DataError, ModalityError, SchemaError
from missrec_t4r.etl import item_table as catalogues
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, ROW, TRAIN_COUNT

UnknownItems = Literal["append", "drop"]
Vectors = Mapping[str, npt.NDArray[np.float32]]
"""Modality vectors as files have them: one row per line of the raw item table."""


def read_modalities(files: Mapping[str, Path], n_lines: int) -> dict[str, npt.NDArray[np.float32]]:
    """Read ``name=file.npy`` vectors whose rows follow the item table.

    Raises
    ------
    ModalityError
        A file is missing or unreadable, has the wrong number of rows, or holds NaN or infinity.
    """
    return {name: _read_vectors(name, Path(file), n_lines) for name, file in files.items()}


def _read_vectors(name: str, file: Path, n_lines: int) -> npt.NDArray[np.float32]:
    if not name.isidentifier() or name == "presence":
        raise ModalityError(f"a modality is called {name!r}", "letters, digits and _, and not 'presence'")
    try:
        vectors = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ModalityError(
            f"the vectors of modality {name!r} cannot be read from {file} ({error})",
            "a .npy file of numbers",
            "check the path given with --modality",
        ) from error
    if vectors.ndim != 2 or vectors.shape[0] != n_lines:
        raise ModalityError(
            f"modality {name!r} has shape {vectors.shape} in {file}",
            f"{n_lines} rows, one per line of the item table",
            "extract the vectors again for this item table",
        )
    if vectors.dtype.kind not in "fiu":
        raise ModalityError(f"modality {name!r} holds {vectors.dtype}", "numbers", "save the vectors as float32")
    vectors = vectors.astype(np.float32)
    if not (finite := np.isfinite(vectors).all(1)).all():
        line = int(np.flatnonzero(~finite)[0])
        raise ModalityError(
            f"modality {name!r} holds NaN or infinity in row {line} of {file}",
            "finite numbers",
            "repair the row, or set it to zero to say that the item lacks the modality",
        )
    return vectors


def unique_items(items: pa.Table, vectors: Vectors, findings: Findings) -> tuple[pa.Table, Vectors]:
    """Leave out lines without id and later lines of the same id, in the table and in the vectors.

    Raises
    ------
    DataError
        No line has an id.
    """
    ids = items[ITEM_ID].to_pandas()
    null, doubled = ids.isna(), ids.duplicated()
    findings.add("null_items", int(null.sum()), "lines of the item table without an id are left out")
    findings.add("duplicate_items", int((doubled & ~null).sum()), "of several lines with one id the first is kept")
    keep = np.flatnonzero(~null & ~doubled)
    if not len(keep):
        raise DataError("no line of the item table has an id", "at least one item", "check --item-column")
    return _take_items(items, vectors, keep)


def match_events(
    events: pd.DataFrame, items: pa.Table, vectors: Vectors, unknown: UnknownItems, findings: Findings
) -> tuple[pd.DataFrame, pa.Table, Vectors]:
    """Bring events and item table together: items that only events know are appended or dropped.

    Raises
    ------
    SchemaError
        Ids are integers in one table and strings in the other.
    DataError
        No event is left.
    """
    in_table, in_events = items[ITEM_ID].type, pa.array(events[ITEM_ID]).type
    if in_table != in_events:
        raise SchemaError(
            f"item ids are {in_events} in the interactions and {in_table} in the item table",
            "the same type in both",
            "convert one of them",
        )
    known = events[ITEM_ID].isin(items[ITEM_ID].to_pandas())
    orphans = events[ITEM_ID][~known].drop_duplicates()
    if unknown == "drop":
        findings.add(
            "orphan_events", int((~known).sum()), f"events on {len(orphans)} items without a line are left out"
        )
        events = events[known].reset_index(drop=True)
        if events.empty:
            raise DataError("no event is on an item of the item table", "matching ids", "check both id columns")
        return events, items, vectors
    findings.add("orphan_items", len(orphans), f"items that only events know ({int((~known).sum())}) were appended")
    if len(orphans) == events[ITEM_ID].nunique():
        findings.add("no_item_matches", len(orphans), "no event is on an item of the item table; are the ids the same?")
    added = pa.table({ITEM_ID: pa.array(orphans, in_table)})
    items = pa.concat_tables([items, added], promote_options="default")
    blank = {name: np.zeros((len(orphans), array.shape[1]), np.float32) for name, array in vectors.items()}
    return events, items, {name: np.concatenate([array, blank[name]]) for name, array in vectors.items()}


def filter_items(
    events: pd.DataFrame, items: pa.Table, vectors: Vectors, *, k_core: int, min_item_count: int, user_column: str
) -> tuple[pd.DataFrame, pa.Table, Vectors]:
    """Leave out rare items (once) and rare users and items (until nothing changes), in events and catalogue.

    Raises
    ------
    DataError
        Nothing is left.
    """
    if max(k_core, min_item_count) <= 0:
        return events, items, vectors
    if min_item_count > 0:
        events = _frequent(events, ITEM_ID, min_item_count)
    before = -1
    while k_core > 0 and before != len(events):
        before = len(events)
        events = _frequent(_frequent(events, user_column, k_core), ITEM_ID, k_core)
    if events.empty:
        raise DataError(
            f"k_core={k_core} with min_item_count={min_item_count} leaves no event", "at least one", "lower the numbers"
        )
    keep = np.flatnonzero(items[ITEM_ID].to_pandas().isin(events[ITEM_ID]).to_numpy())
    return (events.reset_index(drop=True), *_take_items(items, vectors, keep))


def check_fingerprints(fingerprints: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Refuse a fingerprint of a modality that was not given, and an empty one.

    Raises
    ------
    ConfigError
        Either is so.
    """
    for name, stated in fingerprints.items():
        if name not in files or not stated.strip():
            raise ConfigError(
                f"--fingerprint {name}={stated}",
                f"NAME=TEXT with a name among {sorted(files)}",
                "give the vectors with --modality and say whose they are",
            )


def build_catalogue(
    items: pa.Table, vectors: Vectors, files: Mapping[str, Path], fingerprints: Mapping[str, str] | None = None
) -> Catalogue:
    """Return the catalogue with zero popularity; all-zero vectors mean that the item lacks the modality."""
    reserved = [name for name in (ROW, TRAIN_COUNT) if name in items.column_names]
    items = items.drop_columns(reserved) if reserved else items
    modalities = {}
    for name, array in vectors.items():
        full = np.concatenate([np.zeros((FIRST_ITEM_ROW, array.shape[1]), np.float32), array])
        encoder = {"name": "precomputed", "file": Path(files[name]).name}
        if fingerprints and name in fingerprints:
            encoder["fingerprint"] = fingerprints[name]
        modalities[name] = Modality(full, full.any(1), encoder)
    return with_train_count(Catalogue(items.append_column(TRAIN_COUNT, _zeros(items)), {}), _zeros(items), modalities)


def with_train_count(
    catalogue: Catalogue, counts: npt.ArrayLike, modalities: Mapping[str, Modality] | None = None
) -> Catalogue:
    """Return the catalogue with another popularity, item_id and train_count leading."""
    others = [name for name in catalogue.items.column_names if name not in (ITEM_ID, TRAIN_COUNT)]
    columns = {ITEM_ID: catalogue.items[ITEM_ID], TRAIN_COUNT: pa.array(np.asarray(counts, np.int64))}
    table = pa.table(columns | {name: catalogue.items[name] for name in others})
    return Catalogue(table, catalogue.modalities if modalities is None else modalities)


def extended_catalogue(old: Catalogue, items: pa.Table, vectors: Vectors) -> Catalogue:
    """Return the old catalogue with further items; encoders, their state and variants stay."""
    more = items.num_rows - old.n_items
    modalities = {}
    for name, modality in old.modalities.items():
        full = np.concatenate([np.zeros((FIRST_ITEM_ROW, modality.width), np.float32), vectors[name]])
        present = full.any(1)
        present[: old.n_rows] |= modality.present
        pad = ((0, more), (0, 0))
        variants = {variant: np.pad(array, pad) for variant, array in modality.variants.items()}
        modalities[name] = replace(modality, vectors=full, present=present, variants=variants)
    table = items.append_column(TRAIN_COUNT, pa.array(np.zeros(items.num_rows, np.int64)))
    return Catalogue(table.select([ITEM_ID, TRAIN_COUNT, *[n for n in items.column_names if n != ITEM_ID]]), modalities)


def _zeros(items: pa.Table) -> pa.Array:
    return pa.array(np.zeros(items.num_rows, np.int64))


def _frequent(events: pd.DataFrame, column: str, least: int) -> pd.DataFrame:
    return events[events.groupby(column)[column].transform("size") >= least]


def _take_items(items: pa.Table, vectors: Vectors, keep: npt.NDArray[np.intp]) -> tuple[pa.Table, Vectors]:
    return items.take(pa.array(keep)), {name: array[keep] for name, array in vectors.items()}


# The item table of an update: new lines after the old items, and lines for items that only events knew


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
