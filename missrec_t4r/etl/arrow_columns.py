"""Columns of raw tables in Arrow: ids, times and numbers in normal types, texts that are not UTF-8.

Every engine reads raw files through these functions, so that all have the same ids and times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.errors import SchemaError

_ISO = {"format": "ISO8601"} if pd.__version__ >= "2" else {}
"""pandas 1.5 parses every date by itself; later versions would apply the format of the first one to all."""
YEAR_FIRST = r"\d{4}\D"
"""Start of the dates that are read without a format: of others pandas may guess whether day or month comes first."""
_WHOLE_UP_TO = {pa.float32(): 2**24, pa.float64(): 2**53}
"""Type of floats -> the number up to which all integers differ in it."""
TEXT_TYPES = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}


def normal_ids(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return identifiers as int64 or string.

    Raises
    ------
    SchemaError
        The column holds something else (fractions, dates, booleans, lists).
    """
    kind = column.type
    if kind in TEXT_TYPES:
        require_utf8(column, name)
        texts = column.cast(pa.string())
        return pc.if_else(pc.equal(texts, ""), None, texts)  # an empty id counts as missing
    if pa.types.is_integer(kind):
        return as_int64(column, name)
    if kind in _WHOLE_UP_TO:  # integers with nulls become floats in pandas
        values = pc.if_else(pc.is_finite(column), column, None)
        if (largest := pc.max(pc.abs(values)).as_py() or 0) >= _WHOLE_UP_TO[kind]:
            raise SchemaError(
                f"column {name!r} holds ids up to {largest:.0f} as {kind}, which has one number for several of them",
                "string or integer ids",
                "write them as integers that may be null (Int64 in pandas), or as text",
            )
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise SchemaError(f"column {name!r} holds fractions ({error})", "string or integer ids") from error
    raise SchemaError(f"column {name!r} is of type {kind}", "string or integer ids", "convert the column")


def as_int64(column: Any, name: str) -> Any:
    """Return an Arrow column of integers as int64.

    Raises
    ------
    SchemaError
        A value does not fit.
    """
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"column {name!r} holds integers beyond 64 bits with a sign ({error})", "smaller ones, or text"
        ) from error


def as_category(column: Any, name: str) -> Any:
    """Return an Arrow column of numbers as raw values of a category, int64 or double; NaN and infinity are null.

    Raises
    ------
    SchemaError
        A value does not fit.
    """
    return finite_floats(column, pa.float64()) if pa.types.is_floating(column.type) else as_int64(column, name)


def finite_floats(column: Any, kind: pa.DataType) -> Any:
    """Return an Arrow column of floats in another width, null for NaN, infinity and what is too large for it."""
    if column.type == pa.float16():  # Arrow 14 does not cast these
        column = pa.array(np.asarray(column).astype(np.float32))
    column = column.cast(kind)
    return pc.if_else(pc.is_finite(column), column, None)


def require_utf8(ids: pa.ChunkedArray, name: str) -> None:
    """Refuse ids that are texts, or bytes, and not all UTF-8.

    Raises
    ------
    SchemaError
        Says how many are not.
    """
    if not is_utf8(ids):
        n_broken = len(repaired(ids)[1])
        cure = "convert the export, for example with iconv"
        raise SchemaError(f"{n_broken} ids in column {name!r} are not UTF-8 text", "UTF-8", cure)


def is_utf8(column: pa.ChunkedArray | pa.Array) -> bool:
    """Return whether all texts, or bytes, of a column are valid UTF-8; parquet writers do not check that."""
    try:
        texts = column.cast(pa.large_string()) if column.type in TEXT_TYPES[2:] else column
        texts.validate(full=True)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return False
    return True


def repaired(column: pa.ChunkedArray | pa.Array) -> tuple[list[Any], list[int]]:
    """Return the values of a column, U+FFFD for bytes that are not UTF-8, and the positions of the repaired texts."""
    if is_utf8(column):
        return column.to_pylist(), []
    texts, broken = [], []
    for position, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        text = None if value is None else value.decode(errors="replace")
        texts.append(text)
        if text is not None and text.encode() != value:
            broken.append(position)
    return texts, broken


def text_to_integers(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return int64 if every text is the canonical form of an integer ("12", not "012"), else None."""
    if not pa.types.is_string(column.type):
        return None
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    same = pc.all(pc.equal(numbers.cast(pa.string()), column)).as_py()
    return numbers if same is not False else None


def require_same_ids(events: pa.DataType, items: pa.DataType) -> None:
    """Refuse item ids that are integers in one table and texts in the other.

    Raises
    ------
    SchemaError
        The types differ.
    """
    if events != items:
        found = f"item ids are {events} in the interactions and {items} in the item table"
        raise SchemaError(found, "the same type in both", "convert one of them")


def normal_time(column: pa.ChunkedArray, name: str, time_format: str | None = None) -> pa.ChunkedArray:
    """Return times as sortable numbers: dates become unix seconds, numbers are kept.

    Text columns become unix seconds too. They may mix ISO 8601 dates, with or without a zone (UTC without one), and
    numbers in seconds, milliseconds, microseconds or nanoseconds, distinguished by magnitude; other texts become null.
    With a ``time_format`` such as ``%d/%m/%Y`` all texts are in this format.

    Raises
    ------
    SchemaError
        The column holds neither numbers nor dates.
    """
    kind = column.type
    is_text = kind in TEXT_TYPES[:2]
    if time_format and not is_text:
        raise SchemaError(f"--time-format, and column {name!r} is of type {kind}", "texts", "leave --time-format out")
    if pa.types.is_integer(kind):
        return as_int64(column, name)
    if pa.types.is_floating(kind):
        return finite_floats(column, pa.float64())
    if is_text:
        return _times_of_text(column, name, time_format)
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("s"))
    elif not pa.types.is_timestamp(kind):
        raise SchemaError(f"column {name!r} is of type {kind}", "unix seconds or a date", "convert the column")
    if column.type.unit == "ns":
        column = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False)
    units, per_second = column.cast(pa.int64()), _PER_SECOND[column.type.unit]
    seconds = pc.divide(units, per_second)  # whole ones: 9999-12-31 in microseconds is too large for a float
    if pc.all(pc.equal(pc.multiply(seconds, per_second), units)).as_py() is not False:
        return seconds
    return pc.divide(units.cast(pa.float64(), safe=False), float(per_second))


def _times_of_text(column: pa.ChunkedArray, name: str, time_format: str | None) -> pa.ChunkedArray:
    texts = column.to_pandas().astype("string").str.strip()
    numbers = pd.to_numeric(texts, errors="coerce").astype("float64")
    size = numbers.abs()
    units = np.select([size > 1e17, size > 1e14, size > 1e11], [1e9, 1e6, 1e3], 1.0)
    if time_format:
        numbers = pd.Series(np.nan, texts.index)
        dates = pd.to_datetime(texts, utc=True, errors="coerce", format=time_format)
    else:
        dates = texts.where(numbers.isna() & texts.str.match(YEAR_FIRST, na=False))
        dates = pd.to_datetime(dates, utc=True, errors="coerce", **_ISO)
    seconds = (dates - pd.Timestamp(0, tz="UTC")) // pd.Timedelta(microseconds=1) / 1e6
    times = (numbers / units).fillna(seconds)
    times = times.where(np.isfinite(times))
    if times.isna().all() and texts.notna().any():
        raise SchemaError(
            f"column {name!r} is of type {column.type} and holds texts such as {texts.dropna().iloc[0]!r}",
            f"times in the format {time_format}" if time_format else "unix seconds or a date",
            "state the format of other dates with --time-format, such as --time-format %d/%m/%Y for 31/12/2023",
        )
    seconds = pa.array(times, pa.float64(), from_pandas=True)
    whole = pc.all(pc.equal(pc.floor(seconds), seconds)).as_py()
    return pa.chunked_array([seconds if whole is False else seconds.cast(pa.int64())])
