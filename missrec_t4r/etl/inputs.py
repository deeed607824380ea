"""In-memory input: raw tables are renamed, typed, checked, matched with the item table and filtered.

The events become a frame of pandas or of cuDF; from there on the same code serves both. On the GPU `gpu/read.py`
reads them, and what it does not read is read here and copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from missrec_t4r.etl.dataframe import Adapter, Frame
from missrec_t4r.etl.item_table import UnknownItems, Vectors, filter_items, match_events, unique_items
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import read_numbers
from missrec_t4r.etl.sources.table import Paths, read_table, require_column, require_event_columns
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID


class Events(NamedTuple):
    """Complete events in pandas or cuDF: ids as integers or texts, times as numbers, features as they were read."""

    frame: Frame
    features: list[str]
    """Event columns that become list features."""


@dataclass(frozen=True)
class Inputs:
    """Clean events and the items of the catalogue.

    Parameters
    ----------
    events : pandas or cuDF DataFrame
        ``user_id``, ``item_id``, ``timestamp`` and the feature columns, in input order.
    items : pyarrow.Table
        In catalogue order: row ``i`` has item index ``3 + i``.
    vectors : mapping of str to ndarray [item, width]
        Modality vectors, rows as in ``items``.
    features : tuple of str
        Event columns that become list features.
    """

    events: Frame
    items: pa.Table
    vectors: Vectors
    features: tuple[str, ...]


class Summary(NamedTuple):
    """What catalogue, workflow and report need to know of clean events, in whatever pieces the events are."""

    items: pa.Table
    """In catalogue order."""
    vectors: Vectors
    """Modality vectors, rows as in ``items``."""
    features: tuple[str, ...]
    """Event columns that become list features."""
    texts: tuple[str, ...]
    """Those of them that hold texts."""
    categories: Mapping[str, pd.Series]
    """Values of the categorical ones, in the order of their codes."""
    events: int
    users: int
    newest: float
    """Time of the newest event."""


def summarise(clean: Inputs, categorical_columns: Sequence[str]) -> Summary:
    """Return the summary of clean events."""
    frame = clean.events
    return Summary(
        items=clean.items,
        vectors=clean.vectors,
        features=clean.features,
        texts=tuple(name for name in clean.features if frame[name].dtype == object),
        categories=checks.category_values(frame, clean.features, categorical_columns),
        events=len(frame),
        users=int(frame[USER_ID].nunique()),
        newest=float(frame[TIMESTAMP].max()),
    )


def read_tables(
    interactions: Paths,
    items: Path,
    names: Mapping[str, str],
    catalogue_item: str,
    findings: checks.Findings,
    time_format: str | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Return interactions and item table with standard column names, ids as int64 or string, times as numbers.

    Parameters
    ----------
    interactions : path, pattern, folder, or a sequence of them
        Parquet, csv or json lines.
    items : Path
        Item table.
    names : mapping of str to str
        Input column -> ``user_id``, ``item_id`` or ``timestamp``.
    catalogue_item : str
        Id column of the item table.
    findings : Findings
        Gains the columns that are left out.
    time_format : str, optional
        Of text times that are not ISO 8601.

    Raises
    ------
    DataError, SchemaError
        A table cannot be read, lacks a column, or has one of an unsupported type.
    """
    ids = [next(raw for raw, name in names.items() if name == key) for key in (USER_ID, ITEM_ID)]
    events = read_table(interactions, "interactions", text_columns=ids, needed=names, findings=findings)
    require_event_columns(events.column_names, names)
    clashing = [name for name in events.column_names if name in names.values() and name not in names]
    checks.note_taken_names(findings, clashing)
    events = events.drop_columns(clashing) if clashing else events
    events = events.rename_columns([names.get(name, name) for name in events.column_names])

    raw = {name: column for column, name in names.items()}
    return _normal_types(events, read_items(items, catalogue_item, findings), findings, time_format, raw)


def read_items(items: Path, catalogue_item: str, findings: checks.Findings) -> pa.Table:
    """Return the item table with its id column named ``item_id``, ids as they were written.

    Raises
    ------
    DataError, SchemaError
        It cannot be read, or has no id column.
    """
    table = read_table(items, "items", text_columns=[catalogue_item, ITEM_ID], findings=findings)
    if catalogue_item not in table.column_names and ITEM_ID in table.column_names:
        catalogue_item = ITEM_ID
    require_column(table, catalogue_item, "items", "--catalogue-item-column")
    if catalogue_item != ITEM_ID and ITEM_ID in table.column_names:
        findings.add("column_name_taken", 1, f"item column {ITEM_ID!r} is left out: {catalogue_item!r} takes its name")
        table = table.drop_columns([ITEM_ID])
    return table.rename_columns([ITEM_ID if name == catalogue_item else name for name in table.column_names])


def with_normal_ids(items: pa.Table) -> pa.Table:
    """Return an item table with ids as int64 or string."""
    at = items.column_names.index(ITEM_ID)
    return items.set_column(at, ITEM_ID, checks.normal_ids(items[ITEM_ID], ITEM_ID))


def _normal_types(
    events: pa.Table, items: pa.Table, findings: checks.Findings, time_format: str | None, raw: Mapping[str, str]
) -> tuple[pa.Table, pa.Table]:
    """Convert ids and times; text ids become integers only if the ids of the other table are integers.

    Errors name the columns of the events as in the input (``raw``: standard name -> name there).
    """
    event_ids, item_ids = checks.normal_ids(events[ITEM_ID], raw[ITEM_ID]), checks.normal_ids(items[ITEM_ID], ITEM_ID)
    if event_ids.type != item_ids.type:
        event_integers, item_integers = (checks.text_to_integers(ids) for ids in (event_ids, item_ids))
        event_ids = event_ids if event_integers is None else event_integers
        item_ids = item_ids if item_integers is None else item_integers
        if event_ids.type == item_ids.type:
            is_text = event_integers is not None
            checks.note_converted_ids(findings, len(event_ids if is_text else item_ids), events=is_text)
    converted = {
        USER_ID: checks.normal_ids(events[USER_ID], raw[USER_ID]),
        ITEM_ID: event_ids,
        TIMESTAMP: checks.normal_time(events[TIMESTAMP], raw[TIMESTAMP], time_format),
    }
    columns = {name: converted.get(name, events[name]) for name in events.column_names}
    item_columns = {name: item_ids if name == ITEM_ID else items[name] for name in items.column_names}
    return pa.table(columns), pa.table(item_columns)


def to_events(
    events: pa.Table,
    frames: Adapter,
    findings: checks.Findings,
    *,
    drop_columns: Sequence[str],
    categorical_columns: Sequence[str],
) -> Events:
    """Return the complete events of a table of `read_tables` as a frame, with numbers where texts are numbers."""
    features = checks.event_features(events, drop_columns, findings)
    events = read_numbers(events, features, categorical_columns, findings)
    events = checks.number_types(events, features, categorical_columns)
    return Events(frames.from_arrow(checks.complete_events(events, features, findings)), features)


def clean_inputs(
    events: Events,
    item_table: pa.Table,
    vectors: Vectors,
    findings: checks.Findings,
    *,
    drop_duplicates: bool,
    unknown_items: UnknownItems,
    k_core: int,
    min_item_count: int,
    categorical_columns: Sequence[str] = (),
) -> Inputs:
    """Clean the events, match them with the item table, and filter rare users and items.

    Parameters
    ----------
    events : Events
        From `to_events`, or read on the GPU.
    item_table : pyarrow.Table
        From `read_tables`.
    vectors : mapping of str to ndarray [item, width]
        Modality vectors, rows as in ``item_table``.
    findings : Findings
        Gains the data-quality findings.
    drop_duplicates, unknown_items, k_core, min_item_count, categorical_columns
        As in `missrec_t4r.etl.pipeline.etl`.
    """
    frame = checks.clean_events(events.frame, findings, drop_duplicates)
    items, vectors = unique_items(item_table, vectors, findings)
    frame, items, vectors = match_events(frame, items, vectors, unknown_items, findings)
    frame, items, vectors = filter_items(
        frame, items, vectors, k_core=k_core, min_item_count=min_item_count, user_column=USER_ID
    )
    frame = checks.fill_features(frame, events.features, categorical_columns, findings)
    return Inputs(frame, items, vectors, tuple(events.features))
