"""Read JSON lines, plain or gzip, as Arrow columns: with pyarrow's reader, or line by line if that refuses the file.

Broken lines are counted and dropped up to a maximum share; a truncated file is refused. Numbers in a text column become
texts, so that ids of mixed types get one type.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.json as pajson

from missrec_t4r.errors import DataError
from missrec_t4r.etl.quality.checks import Findings

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json", ".json.gz")
_BLOCK = 16 * 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character beyond 16 bits; alone, where a text was cut off, it is none, and becomes a question mark."""


def read_columns(file: Path, schema: pa.Schema, findings: Findings) -> pa.Table:
    """Return the fields of a schema; other fields are skipped, missing values are null.

    Parameters
    ----------
    schema : pyarrow.Schema
        Names and types.
    findings : Findings
        Receives broken lines and values of another type.

    Raises
    ------
    DataError
        As `records` raises it.
    """
    if (table := _by_arrow(file, schema, "ignore")) is not None:
        return table.select(schema.names)
    wrong: Counter[str] = Counter()
    rows: dict[str, list[Any]] = {name: [] for name in schema.names}
    for record in records(file, findings):
        for field in schema:
            rows[field.name].append(_value(record.get(field.name), field, wrong))
    for name, count in wrong.items():
        kind = schema.field(name).type
        findings.add("wrong_type", count, f"{file.name}: values of {name!r} that are not {kind}: null")
    return pa.table(rows, schema=schema)


def read_all(file: Path, text_columns: Sequence[str] = ()) -> pa.Table:
    """Return all fields; those of ``text_columns`` as text, whatever their types."""
    table = _by_arrow(file, pa.schema([(name, pa.string()) for name in text_columns]), "infer")
    if table is not None:
        return table
    rows = list(records(file, Findings(), 0.0))
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    for name in columns.keys() & set(text_columns):
        columns[name] = pa.array([_text(value) for value in columns[name]], pa.string())
    try:
        return pa.table(columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(
            f"a field of {file} has values of several types, or too large ones ({error})",
            "one type per field",
            "repair the export",
        ) from error


def _by_arrow(file: Path, schema: pa.Schema, others: str) -> pa.Table | None:
    """Return what pyarrow reads of a file; None if it refuses it: reading line by line finds the broken lines."""
    options = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            return pajson.read_json(stream, pajson.ReadOptions(block_size=_BLOCK), options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError):
        return None


def records(file: Path, findings: Findings, max_broken: float = 0.01) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON objects, one per line; broken lines are counted as a finding.

    Raises
    ------
    DataError
        The file is missing, empty or truncated, or has more broken lines than ``max_broken``.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file}", "an existing file", "check the path")
    if not file.stat().st_size:
        raise DataError(f"{file} has no bytes", "at least one row", "write or download the file again")
    lines = broken = 0
    last = ""
    try:
        with _open(file) as stream:
            for line in stream:
                if not line.strip():
                    continue
                lines += 1
                try:
                    value = json.loads(line)
                    if _SURROGATE.search(line):
                        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    yield value
                else:
                    broken, last = broken + 1, line.strip()[:80]
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{file} ends in the middle or is damaged after line {lines} ({error})",
            "a whole file",
            "copy or download it again and compare its size",
        ) from error
    if broken > max_broken * lines:
        raise DataError(
            f"{broken} of {lines} lines of {file} are not JSON objects, such as {last!r}",
            f"at most {max_broken:.0%}",
            "check the file; it must hold one JSON object per line",
        )
    findings.add("broken_lines", broken, f"lines of {file.name} that are not JSON objects are left out")


def _open(file: Path) -> IO[str]:
    with file.open("rb") as start:
        zipped = start.read(2) == b"\x1f\x8b"
    if zipped:
        return gzip.open(file, "rt", encoding="utf-8-sig", errors="replace")
    return file.open(encoding="utf-8-sig", errors="replace")


def _value(value: Any, field: pa.Field, wrong: Counter[str]) -> Any:
    if value is None or pa.types.is_string(field.type):
        return _text(value)
    try:
        number: float | None = int(value) if pa.types.is_integer(field.type) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (isinstance(number, int) and number.bit_length() > 63):
        wrong[field.name] += 1
        return None
    return number


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
