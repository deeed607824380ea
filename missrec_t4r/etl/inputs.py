"""In-memory input: raw tables are renamed, typed, checked, matched with the item table and filtered.

The events become a frame of pandas or of cuDF; from there on the same code serves both. On the GPU `gpu/read.py`
reads them, and what it does not read is read here and copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from missrec_t4r.etl.arrow_columns import normal_ids, normal_time
from missrec_t4r.etl.dataframe import Adapter, Frame, adapter_of
from missrec_t4r.etl.item_table import Vectors, filter_items, match_events, unique_items
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import read_numbers
from missrec_t4r.etl.sources.table import read_table, require_column, require_event_columns
from missrec_t4r.etl.task import Task
from missrec_t4r.io.arrow_files import with_column
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID


class Events(NamedTuple):
    """Complete events in pandas or cuDF: ids as integers or texts, times as numbers, features as they were read."""

    frame: Frame
    features: list[str]
    """Event columns that become list features."""


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


def read_tables(task: Task, frames: Adapter) -> tuple[Events, pa.Table]:
    """Return the complete events as a frame and the item table, both read by Arrow.

    Ids are int64 or string, times numbers, and texts of numbers are numbers.

    Raises
    ------
    DataError, SchemaError
        A table cannot be read, lacks a column, or has one of an unsupported type.
    """
    names, findings, settings = task.names, task.findings, task.settings
    raw = {name: column for column, name in names.items()}  # names of the input, for error messages
    events = read_table(
        task.files, "interactions", text_columns=[raw[USER_ID], raw[ITEM_ID]], needed=names, findings=findings
    )
    require_event_columns(events.column_names, names)
    clashing = checks.taken_names(events.column_names, names, findings)
    events = events.drop_columns(clashing) if clashing else events
    events = events.rename_columns([names.get(name, name) for name in events.column_names])
    items = read_items(task.items, settings["catalogue_item_column"], findings)
    item_ids = normal_ids(items[ITEM_ID], ITEM_ID)
    event_ids = normal_ids(events[ITEM_ID], raw[ITEM_ID])
    event_ids = checks.ids_like(event_ids, item_ids.type, findings, events=True)
    items = with_column(items, ITEM_ID, checks.ids_like(item_ids, event_ids.type, findings))
    converted = {
        USER_ID: normal_ids(events[USER_ID], raw[USER_ID]),
        ITEM_ID: event_ids,
        TIMESTAMP: normal_time(events[TIMESTAMP], raw[TIMESTAMP], settings["time_format"]),
    }
    events = pa.table({name: converted.get(name, events[name]) for name in events.column_names})
    categorical_columns = settings["categorical_columns"]
    features = checks.event_features(events, settings["drop_columns"], findings)
    events = read_numbers(events, features, categorical_columns, findings)
    events = checks.number_types(events, features, categorical_columns)
    return Events(frames.from_arrow(checks.complete_events(events, features, findings)), features), items


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
    return name_item_column(table, catalogue_item, findings)


def name_item_column(items: pa.Table, column: str, findings: checks.Findings) -> pa.Table:
    """Return an item table with its id column named ``item_id``; another one of that name is left out."""
    if column != ITEM_ID and ITEM_ID in items.column_names:
        findings.add("column_name_taken", 1, f"item column {ITEM_ID!r} is left out: {column!r} takes its name")
        items = items.drop_columns([ITEM_ID])
    return items.rename_columns([ITEM_ID if name == column else name for name in items.column_names])


def with_normal_ids(items: pa.Table) -> pa.Table:
    """Return an item table with ids as int64 or string."""
    return with_column(items, ITEM_ID, normal_ids(items[ITEM_ID], ITEM_ID))


def clean_inputs(
    events: Events, items: pa.Table, vectors: Vectors, settings: Mapping[str, Any], findings: checks.Findings
) -> tuple[Frame, Summary]:
    """Clean the events, match them with the item table, and filter rare users and items.

    Parameters
    ----------
    events : Events
        From `read_tables`, or read on the GPU.
    items, vectors : pyarrow.Table, mapping of str to ndarray [item, width]
        Item table with normal ids, and its modality vectors.
    settings : mapping
        As in ``etl.json``.
    findings : Findings
        Gains the data-quality findings.

    Returns
    -------
    events : Frame
        ``user_id``, ``item_id``, ``timestamp`` and the features, in input order.
    summary : Summary
    """
    features, categorical_columns = events.features, settings["categorical_columns"]
    frame = checks.clean_events(events.frame, findings, settings["drop_duplicates"])
    items, vectors = unique_items(items, vectors, findings)
    frame, items, vectors = match_events(frame, items, vectors, settings, findings)
    frame, items, vectors = filter_items(frame, items, vectors, settings)
    for name, nulls in checks.count_nulls(frame, features).items():
        if nulls:
            checks.note_nulls(findings, name, nulls, text=adapter_of(frame).is_text(frame[name]))
    frame = checks.without_nulls(frame, features, categorical_columns)
    values = checks.count_values(frame, features, categorical_columns)
    return frame, Summary(
        items=items,
        vectors=vectors,
        features=tuple(features),
        texts=tuple(name for name in features if frame[name].dtype == object),
        categories={name: checks.by_frequency(counts) for name, counts in values.items()},
        events=len(frame),
        users=int(frame[USER_ID].nunique()),
        newest=float(frame[TIMESTAMP].max()),
    )
