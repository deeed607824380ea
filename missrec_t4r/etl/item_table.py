"""Item table -> catalogue: vocabulary in the order of the table, modality vectors, popularity; item filters.

Item i of the table gets item index 3 + i and keeps it. Items that occur only in events are appended in the order of
their first event (or their events are dropped) and have no modality. An incremental update appends new rows of the item
table after the old items, and gives old items the values of their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.arrays import Floats
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import ConfigError, DataError, ModalityError, SchemaError
from missrec_t4r.etl.arrow_columns import normal_ids, require_same_ids
from missrec_t4r.etl.dataframe import Array, Frame, adapter_of
from missrec_t4r.etl.event_arithmetic import core
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.io.arrow_files import one_array, unequal, with_column
from missrec_t4r.io.npy_files import read_npy
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, ROW, TRAIN_COUNT, USER_ID

UnknownItems = Literal["append", "drop"]
Vectors = Mapping[str, Floats]
"""Modality -> vectors, [item, width], rows as in the item table."""
PRECOMPUTED = "precomputed"
"""Name of the encoder of vectors that were given as a file."""
_RESERVED = ((FIRST_ITEM_ROW, 0), (0, 0))
"""Rows before the items', by which vectors [item, width] become [item index, width]."""


# Reading


def read_modalities(files: Mapping[str, Path], n_items: int) -> dict[str, Floats]:
    """Read modality vectors from .npy files whose rows follow the item table.

    Raises
    ------
    ModalityError
        A file is missing or unreadable, has the wrong number of rows, or holds NaN or infinity.
    """
    return {name: _read_vectors(name, Path(file), n_items) for name, file in files.items()}


def _read_vectors(name: str, file: Path, n_items: int) -> Floats:
    if not name.isidentifier() or name == "presence":
        raise ModalityError(f"a modality is called {name!r}", "letters, digits and _, and not 'presence'")
    try:
        vectors = read_npy(file)
    except (OSError, ValueError) as error:
        raise ModalityError(
            f"the vectors of modality {name!r} cannot be read from {file} ({error})",
            "a .npy file of numbers",
            "check the path given with --modality",
        ) from error
    if vectors.ndim != 2 or vectors.shape[0] != n_items:
        raise ModalityError(
            f"modality {name!r} has shape {vectors.shape} in {file}",
            f"{n_items} rows, one per item of the item table",
            "extract the vectors again for this item table",
        )
    if vectors.dtype.kind not in "fiu":
        raise ModalityError(f"modality {name!r} holds {vectors.dtype}", "numbers", "save the vectors as float32")
    vectors = vectors.astype(np.float32)
    if not (finite := np.isfinite(vectors).all(1)).all():
        row = int(np.flatnonzero(~finite)[0])
        raise ModalityError(
            f"modality {name!r} holds NaN or infinity in row {row} of {file}",
            "finite numbers",
            "repair the row, or set it to zero if the item lacks the modality",
        )
    return vectors


def modality_files(
    given: Mapping[str, str | Path] | None, fingerprints: Mapping[str, str] | None = None
) -> dict[str, Path]:
    """Return the files of ``--modality``.

    Raises
    ------
    ConfigError
        A fingerprint is empty, or that of a modality without vectors.
    """
    files = {name: Path(file) for name, file in (given or {}).items()}
    for name, text in (fingerprints or {}).items():
        if name not in files or not text.strip():
            raise ConfigError(
                f"--fingerprint {name}={text}",
                f"NAME=TEXT with a name among {sorted(files)}",
                "give the vectors with --modality, and the name of their encoder",
            )
    return files


# Rows of the item table


def unique_items(items: pa.Table, vectors: Vectors, findings: Findings) -> tuple[pa.Table, Vectors]:
    """Leave out rows without id and repeated ids, in the table and in the vectors; the first row of an id is kept.

    Raises
    ------
    DataError
        No row has an id.
    """
    codes = one_array(items[ITEM_ID]).dictionary_encode().indices.fill_null(-1).to_numpy()  # [item]
    distinct, first = np.unique(codes, return_index=True)
    kept, null = np.sort(first[distinct >= 0]), int((codes < 0).sum())
    findings.add("null_items", null, "rows of the item table without an id are left out")
    repeated = len(codes) - null - len(kept)
    findings.add("duplicate_items", repeated, "of several rows with the same id the first is kept")
    if not len(kept):
        raise DataError("no row of the item table has an id", "at least one item", "check --item-column")
    return take_items(items, vectors, kept)


def match_events(
    events: Frame, items: pa.Table, vectors: Vectors, settings: Mapping[str, Any], findings: Findings
) -> tuple[Frame, pa.Table, Vectors]:
    """Match events with the item table: items that occur only in events are appended, or their events are dropped.

    Raises
    ------
    SchemaError
        Ids are integers in one table and strings in the other.
    DataError
        No event is left.
    """
    adapter = adapter_of(events)
    table_type, event_type = items[ITEM_ID].type, pa.string() if events[ITEM_ID].dtype == object else pa.int64()
    require_same_ids(event_type, table_type)
    in_table = events[ITEM_ID].isin(adapter.from_arrow(items.select([ITEM_ID]))[ITEM_ID])
    unknown_ids = events[ITEM_ID][~in_table].drop_duplicates()
    note_unknown_items(findings, settings, len(unknown_ids), int((~in_table).sum()), len(events))
    if settings["unknown_items"] == "append":
        return events, *append_items(items, vectors, adapter.to_arrow(unknown_ids).cast(table_type))
    events = events[in_table].reset_index(drop=True)
    if not len(events):
        raise DataError("no event is on an item of the item table", "matching ids", "check both id columns")
    return events, items, vectors


def note_unknown_items(
    findings: Findings, settings: Mapping[str, Any], n_unknown: int, unknown_events: int, events: int
) -> None:
    """Add the findings of items that occur only in events: how many, of events on them, and of all events."""
    if settings["unknown_items"] == "drop":
        findings.add("orphan_events", unknown_events, f"events on {n_unknown} items without a row are left out")
        return
    findings.add("orphan_items", n_unknown, f"items that occur only in events ({unknown_events}) were appended")
    if unknown_events == events:
        findings.add("no_item_matches", n_unknown, "no event is on an item of the item table; are the ids the same?")


def append_items(items: pa.Table, vectors: Vectors, ids: pa.Array) -> tuple[pa.Table, Vectors]:
    """Append items of which only the id is known; they have no modality."""
    items = pa.concat_tables([items, pa.table({ITEM_ID: ids})], promote_options="default")
    blank = {name: np.zeros((len(ids), array.shape[1]), np.float32) for name, array in vectors.items()}
    return items, {name: np.concatenate([array, blank[name]]) for name, array in vectors.items()}


def take_items(items: pa.Table, vectors: Vectors, rows: npt.NDArray[np.intp]) -> tuple[pa.Table, Vectors]:
    """Return some rows of the item table and of its vectors."""
    return items.take(pa.array(rows)), {name: array[rows] for name, array in vectors.items()}


def filter_items(
    events: Frame, items: pa.Table, vectors: Vectors, settings: Mapping[str, Any]
) -> tuple[Frame, pa.Table, Vectors]:
    """Leave out rare items once, then rare users and items until nothing changes, in events and item table.

    Raises
    ------
    DataError
        Nothing is left.
    """
    if not filters_rare(settings):
        return events, items, vectors
    adapter = adapter_of(events)
    users, of_items = (adapter.factorize(events[name])[0] for name in (USER_ID, ITEM_ID))
    events = events.take(frequent_events(users, of_items, settings, adapter.xp))
    in_events = adapter.to_arrow(events[ITEM_ID].drop_duplicates())
    kept = np.flatnonzero(pc.is_in(items[ITEM_ID], in_events))
    return (events.reset_index(drop=True), *take_items(items, vectors, kept))


def filters_rare(settings: Mapping[str, Any]) -> bool:
    """Whether rare users or items are left out."""
    return bool(max(settings["k_core"], settings["min_item_count"]) > 0)


def frequent_events(users: Array, items: Array, settings: Mapping[str, Any], xp: Any = np) -> Array:
    """Return the events that are left without rare items, and then without rare users and items, [kept event], int.

    Parameters
    ----------
    users, items : Array [event], int
        Codes of users and items.
    settings : mapping
        ``k_core`` and ``min_item_count``, as in ``etl.json``.
    xp : module
        numpy or cupy.

    Raises
    ------
    DataError
        None is left.
    """
    k_core, min_item_count = settings["k_core"], settings["min_item_count"]
    kept = xp.flatnonzero(xp.bincount(items)[items] >= min_item_count)
    if len(kept):  # cupy counts no empty array
        kept = kept[core([users[kept], items[kept]], k_core, xp=xp)]
    if not len(kept):
        raise DataError(
            f"--k-core {k_core} with --min-item-count {min_item_count} leaves no event",
            "at least one",
            "lower the numbers",
        )
    return kept


# Catalogue


def build_catalogue(
    items: pa.Table, vectors: Vectors, files: Mapping[str, Path], fingerprints: Mapping[str, str] | None = None
) -> Catalogue:
    """Return the catalogue, popularity still 0; items with an all-zero vector lack the modality.

    Parameters
    ----------
    items, vectors : pyarrow.Table, mapping of str to ndarray [item, width]
        Item table and modality vectors, finite numbers (`read_modalities`).
    files : mapping of str to Path
        Where the vectors come from, noted in the catalogue.
    fingerprints : mapping of str to str, optional
        Names of their encoders.
    """
    modalities = {}
    for name, array in vectors.items():
        padded = np.pad(array, _RESERVED)
        encoder = {"name": PRECOMPUTED, "file": Path(files[name]).name}
        if fingerprints and name in fingerprints:
            encoder["fingerprint"] = fingerprints[name]
        modalities[name] = Modality(padded, padded.any(1), encoder)
    catalogue = Catalogue(_with_counts(items, np.zeros(items.num_rows)), modalities, checked=True)
    _ = catalogue.retired  # refused here if it is of another type, and not after a training
    return catalogue


def with_train_count(catalogue: Catalogue, counts: npt.ArrayLike) -> Catalogue:
    """Return the catalogue with training counts per item, [item], and the columns item_id and train_count first."""
    return Catalogue(_with_counts(catalogue.items, counts), catalogue.modalities, checked=True)


def _with_counts(items: pa.Table, counts: npt.ArrayLike) -> pa.Table:
    """Return the item table of a catalogue: its two own columns, then those of the input but what names a row."""
    others = {name: items[name] for name in items.column_names if name not in (ITEM_ID, TRAIN_COUNT, ROW)}
    return pa.table({ITEM_ID: items[ITEM_ID], TRAIN_COUNT: pa.array(np.asarray(counts, np.int64)), **others})


# Incremental update


def merge_new_items(
    old: Catalogue, table: pa.Table | None, files: Mapping[str, Path], findings: Findings
) -> tuple[pa.Table, Vectors, int]:
    """Return the old items followed by the new rows of an item table, their vectors, and the number of rows used.

    A row of an old item replaces the item's values, in the columns that the table has. The item takes the row's vectors
    where its values change or it had none; beside equal values its vectors stay, as those of the other items do.

    Parameters
    ----------
    old : Catalogue
        Of the data folder.
    table : pyarrow.Table, optional
        Item table of an incremental update.
    files : mapping of str to Path
        Modality vectors whose rows follow ``table``.
    findings : Findings
        Gains the data-quality findings of ``table``.

    Raises
    ------
    ConfigError, SchemaError, ModalityError
        The table or its vectors do not fit the catalogue.
    """
    old_items = old.items.drop_columns([TRAIN_COUNT])
    vectors = {name: modality.vectors[FIRST_ITEM_ROW:] for name, modality in old.modalities.items()}
    if table is None:
        if files:
            raise ConfigError("vectors are given without an item table", "both or none", "add --items")
        return old_items, vectors, 0
    table, new_vectors = _rows_like(old, table, files, findings)
    item_index = old.rows_of(table[ITEM_ID].combine_chunks())  # [new row]
    try:
        stacked = pa.concat_tables([old_items, table], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"the item table differs in a type ({error})", "types as in the catalogue") from error
    known, added = np.flatnonzero(item_index >= FIRST_ITEM_ROW), np.flatnonzero(item_index < FIRST_ITEM_ROW)
    index = item_index[known]  # [known row]
    before, after = pa.array(index - FIRST_ITEM_ROW), pa.array(old.n_items + known)  # [known row]: rows of ``stacked``
    differs = np.zeros(len(known), bool)  # [known row]
    for name in (name for name in table.column_names if name != ITEM_ID):
        column = one_array(stacked[name])
        differs |= unequal(column.take(before), column.take(after))
    other_vectors = np.zeros(len(known), bool)
    for name, array in new_vectors.items():
        modality = old.modalities[name]
        differs |= ~modality.present[index] & array[known].any(1)
        other_vectors |= (modality.vectors[index] != array[known]).any(1)
    n_used = len(added) + int(differs.sum())
    findings.add("changed_items", int(differs.sum()), "items whose row differs from the catalogue have the new values")
    n_kept = int((other_vectors & ~differs).sum())
    findings.add("vectors_kept", n_kept, "items with other vectors but the same row keep the vectors that they had")
    if not n_used:
        return old_items, vectors, 0
    source = np.concatenate([np.arange(old.n_items), old.n_items + added])  # [item]: row of ``stacked``
    replaced = source.copy()
    replaced[index - FIRST_ITEM_ROW] = old.n_items + known
    items = {
        name: column.take(pa.array(replaced if name in table.column_names else source))
        for name, column in zip(stacked.column_names, stacked.columns, strict=True)
    }
    merged = {}
    for name, array in vectors.items():
        new = new_vectors.get(name, np.zeros((table.num_rows, array.shape[1]), np.float32))
        merged[name] = np.concatenate([array, new[added]])
        if name in new_vectors:
            merged[name][index[differs] - FIRST_ITEM_ROW] = new[known[differs]]
    return pa.table(items), merged, n_used


def _rows_like(
    old: Catalogue, table: pa.Table, files: Mapping[str, Path], findings: Findings
) -> tuple[pa.Table, Vectors]:
    """Return a new item table and its vectors, one row per id, with ids and widths as in the catalogue."""
    id_type = old.items[ITEM_ID].type
    ids = checks.ids_like(normal_ids(table[ITEM_ID], ITEM_ID), id_type)
    if id_type != ids.type:
        raise SchemaError(f"item ids are {ids.type} in the item table", f"{id_type} as in the catalogue")
    vectors = read_modalities(files, table.num_rows)
    widths = {name: modality.width for name, modality in old.modalities.items()}
    for name, array in vectors.items():
        if widths.get(name) != array.shape[1]:
            raise ModalityError(f"modality {name!r} of width {array.shape[1]}", f"one of the catalogue's: {widths}")
    columns = [name for name in table.column_names if name not in (ROW, TRAIN_COUNT)]
    return unique_items(with_column(table, ITEM_ID, ids).select(columns), vectors, findings)


def extend_catalogue(old: Catalogue, items: pa.Table, vectors: Vectors) -> Catalogue:
    """Return the old catalogue with further items; encoders, their fitted state and variants are kept.

    Parameters
    ----------
    old : Catalogue
        Of the version before.
    items, vectors : pyarrow.Table, mapping of str to ndarray [item, width]
        Old items followed by new ones.
    """
    pad = ((0, items.num_rows - old.n_items), (0, 0))
    modalities = {}
    for name, modality in old.modalities.items():
        padded = np.pad(vectors[name], _RESERVED)
        present = padded.any(1)
        present[: old.n_rows] |= modality.present & (padded[: old.n_rows] == modality.vectors).all(1)
        variants = {variant: np.pad(array, pad) for variant, array in modality.variants.items()}
        modalities[name] = replace(modality, vectors=padded, present=present, variants=variants)
    return Catalogue(_with_counts(items, np.zeros(items.num_rows)), modalities, checked=True)
