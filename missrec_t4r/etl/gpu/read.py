"""Events of parquet files as frames of the GPU: the plan of the columns, checks, and normal types.

Ids become integers or texts, times numbers, as `inputs.read_tables` makes them on the CPU. What
takes more than that is left to the CPU's readers (`NotPlainError`). Types that depend on all events (`Seen`) are
decided after all were read, so that partitions of the events get the types that the whole has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.etl.arrow_columns import is_utf8, normal_ids
from missrec_t4r.etl.dataframe import Frame, Series
from missrec_t4r.etl.gpu.device import CudfDevice
from missrec_t4r.etl.inputs import Events
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import Notations
from missrec_t4r.etl.sources.table import PARQUET_SUFFIXES
from missrec_t4r.etl.task import Run
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

_MICROSECONDS = 1_000_000


class NotPlainError(Exception):
    """Files that only the CPU's readers understand; the message says why."""


class Columns(NamedTuple):
    """What is read of the files; JSON-able."""

    raw: dict[str, str]
    """Column of the events -> column of the files; user, item and time first."""
    features: list[str]
    """Event columns that become list features."""
    texts: list[str]
    """Columns of the events that hold texts."""
    integers: list[str]
    """Features of integers and Booleans that are not categories."""
    categorical: list[str]
    """Features that are categories although they may look like numbers."""
    time: str
    """Type of the times: ``date``, ``int64`` or ``float64``."""


class Seen(NamedTuple):
    """What types and findings depend on, of some or all events; JSON-able."""

    nulls: dict[str, int]
    """Events without user, item or time."""
    whole_seconds: bool
    """Of dates: no event has a fraction of a second."""
    with_nulls: list[str]
    """Features of integers and Booleans that have a null: as in pandas they become floats."""


def plan_columns(run: Run, items: pa.Table, findings: checks.Findings) -> Columns:
    """Return the columns to read, from the schemas of the files.

    Parameters
    ----------
    run : Run
        Of the interactions.
    items : pyarrow.Table
        Item table.
    findings : Findings
        Gains what the CPU would find.

    Raises
    ------
    NotPlainError
        The CPU has to read these files: another format, or types to be converted.
    SchemaError
        A column to drop is missing.
    """
    names, categorical = run.names, run.settings["categorical_columns"]
    noted = checks.Findings()  # of files that are read here, and not by the CPU
    schema = _plain_schema(run.files, names)
    left_out = checks.row_indexes(schema.names, names, noted) + checks.taken_names(schema.names, names, noted)
    kept = [name for name in schema.names if name not in left_out]
    empty = pa.table({names.get(name, name): pa.array([], _decoded(schema.field(name).type)) for name in kept})
    features = checks.event_features(empty, run.settings["drop_columns"], noted)
    item_kind, item_type = (normal_ids(table[ITEM_ID], ITEM_ID).type for table in (empty, items))
    if item_kind != item_type:
        raise NotPlainError(f"item ids are {item_kind} in the events and {item_type} in the item table")
    findings.found += noted.found
    raw = {name: raw for raw, name in names.items()} | {name: name for name in features}
    columns, time = [*checks.KEYS, *features], empty[TIMESTAMP].type
    kinds = {name: empty[name].type for name in features}
    numbers = [name for name in features if name not in categorical]
    return Columns(
        {name: raw[name] for name in columns},
        features,
        [name for name in columns if pa.types.is_string(empty[name].type)],
        [name for name in numbers if pa.types.is_integer(kinds[name]) or pa.types.is_boolean(kinds[name])],
        list(categorical),
        "date" if pa.types.is_timestamp(time) else "float64" if pa.types.is_floating(time) else "int64",
    )


def read_events(device: CudfDevice, files: Sequence[Path], columns: Columns, findings: checks.Findings) -> Events:
    """Return the complete events of all files.

    Raises
    ------
    NotPlainError
        The CPU has to read these files: texts that are numbers or no UTF-8.
    DataError
        No event is complete.
    """
    frame, seen, texts = read_complete(device, files, columns)
    refuse_number_texts({name: [seen_texts] for name, seen_texts in texts.items()})
    checks.note_incomplete(findings, seen.nulls)
    checks.require_events(len(frame))
    return Events(with_types(frame, columns, seen), columns.features)


def read_complete(
    device: CudfDevice, files: Sequence[Path], columns: Columns, row_groups: Sequence[int] | None = None
) -> tuple[Frame, Seen, dict[str, list[str] | None]]:
    """Return the events that have user, item and time, what was seen of all, and the texts that may be numbers.

    Dates are microseconds, and features have the types of the files.

    Returns
    -------
    frame : Frame
    seen : Seen
    texts : dict
        Text feature -> its distinct texts, or None if they are not numbers.

    Raises
    ------
    NotPlainError
        Texts are not UTF-8.
    """
    frame = device.read_parquet(files, list(columns.raw.values()), row_groups)
    frame = frame.rename(columns={raw: name for name, raw in columns.raw.items()})[list(columns.raw)]
    maybe_numbers: dict[str, list[str] | None] = {}
    for name in columns.texts:
        distinct = _distinct_texts(device, frame[name], name)
        if name in columns.features and name not in columns.categorical:
            texts = distinct.to_pylist()
            maybe_numbers[name] = texts if Notations(texts).possible else None
    return *_complete(_normal(frame, device), columns), maybe_numbers


def refuse_number_texts(parts: dict[str, list[list[str] | None]]) -> None:
    """Refuse features whose texts are numbers, which the CPU parses; ``parts``: from `read_complete`, part by part.

    Raises
    ------
    NotPlainError
        There is one.
    """
    for name, texts in parts.items():
        if None not in texts and Notations(text for part in texts for text in part or ()).chosen:
            raise NotPlainError(f"the texts of column {name!r} are numbers")


def all_seen(parts: Iterable[Seen]) -> Seen:
    """Return what was seen of all parts together."""
    parts = list(parts)
    nulls = {name: sum(part.nulls[name] for part in parts) for name in checks.KEYS}
    with_nulls = sorted({name for part in parts for name in part.with_nulls})
    return Seen(nulls, all(part.whole_seconds for part in parts), with_nulls)


def with_types(frame: Frame, columns: Columns, seen: Seen) -> Frame:
    """Return complete events with the types that all events have: seconds, and floats for integers with nulls."""
    made = {name: frame[name].astype("float64") for name in seen.with_nulls}
    if columns.time == "date":
        micros = frame[TIMESTAMP]
        made[TIMESTAMP] = micros // _MICROSECONDS if seen.whole_seconds else micros / _MICROSECONDS
    return frame.assign(**made)


def _plain_schema(files: Sequence[Path], names: dict[str, str]) -> pa.Schema:
    """Return the schema of parquet files that are alike."""
    if others := [file for file in files if not file.name.endswith(PARQUET_SUFFIXES)]:
        raise NotPlainError(f"{others[0]} is not parquet")
    try:
        schemas = [pq.read_schema(file) for file in files]
        rows = sum(pq.read_metadata(file).num_rows for file in files)
    except Exception as error:
        raise NotPlainError(f"a file cannot be read ({error})") from error
    schema = schemas[0]
    types = dict(zip(schema.names, schema.types, strict=True))
    if any(dict(zip(other.names, other.types, strict=True)) != types for other in schemas):
        raise NotPlainError("the files have different columns or types")
    if not rows or [raw for raw in names if raw not in schema.names] or len(set(schema.names)) < len(schema.names):
        raise NotPlainError("there is no row, or a column is missing or there twice")
    for name, kind in zip(schema.names, schema.types, strict=True):
        if odd_kind := _not_plain(kind, names.get(name)):
            raise NotPlainError(f"column {name!r} is {kind}, which is {odd_kind}")
    return schema


def _not_plain(kind: pa.DataType, role: str | None) -> str:
    """Return what the CPU's readers do with a type; empty if nothing."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return "decoded"
    if kind in (pa.float16(), pa.uint64()):
        return "checked value by value"
    text, integer = types.is_string(kind) or types.is_large_string(kind), types.is_integer(kind)
    time = integer or types.is_floating(kind) or (types.is_timestamp(kind) and kind.tz is None)
    if (role in (USER_ID, ITEM_ID) and not (text or integer)) or (role == TIMESTAMP and not time):
        return "converted"
    return ""


def _decoded(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_large_string(kind) else kind


def _distinct_texts(device: CudfDevice, column: Series, name: str) -> pa.Array:
    """Return the distinct texts; refuse those that are not UTF-8, which the CPU repairs."""
    distinct = device.to_arrow(column.drop_duplicates())
    if not is_utf8(distinct):
        raise NotPlainError(f"texts of column {name!r} are not UTF-8")
    return distinct


def _normal(frame: Frame, device: CudfDevice) -> Frame:
    """Return the frame with nulls for empty ids and times that are no number, and dates in microseconds."""
    columns = {}
    for name in (USER_ID, ITEM_ID):
        if device.is_text(frame[name]):
            columns[name] = frame[name].where(frame[name] != "")
    time = frame[TIMESTAMP]
    if time.dtype.kind == "f":
        columns[TIMESTAMP] = checks.finite(time)
    elif time.dtype.kind == "M":
        columns[TIMESTAMP] = time.astype("datetime64[us]")
    return frame.assign(**columns)


def _complete(frame: Frame, columns: Columns) -> tuple[Frame, Seen]:
    """Return the events that have user, item and time, with ids as integers or texts and dates as microseconds."""
    whole, usable, nulls = True, None, {}
    if columns.time == "date":
        whole = bool((frame[TIMESTAMP].dropna().astype("int64") % _MICROSECONDS == 0).all())
    for name in checks.KEYS:
        valid = frame[name].notna()
        nulls[name] = len(frame) - int(valid.sum())
        usable = valid if usable is None else usable & valid
    frame = frame[usable].reset_index(drop=True)
    with_nulls = [name for name in columns.integers if int(frame[name].isna().sum())]
    made = {name: frame[name].astype("int64") for name in (USER_ID, ITEM_ID) if name not in columns.texts}
    made[TIMESTAMP] = frame[TIMESTAMP].astype("float64" if columns.time == "float64" else "int64")
    return frame.assign(**made), Seen(nulls, whole, with_nulls)
