"""Write ``schema.pbtxt`` without Merlin: the text that Merlin 23.8 writes for the sessions of the built-in workflow.

The file is TensorFlow Metadata's ``Schema`` in protobuf's text format; Transformers4Rec and the Merlin loader read it.
Types are those of the written parquet, tags and domains follow from what a column is. That both texts are equal is
tested on every combination of settings (`tests/workflows/test_scale.py`: the in-memory engine writes through Merlin).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.schema import (
    FIRST_ITEM_ROW,
    ITEM_LIST,
    LIST_SUFFIX,
    SCHEMA_FILE,
    SESSION_ID,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)

_TAGS = {
    USER_ID: ["id", "user"],
    SESSION_ID: ["id", "session"],
    ITEM_LIST: ["categorical", "id", "item", "list", "sequence"],
    TIMESTAMP + LIST_SUFFIX: ["list", "sequence", "time"],
}
"""Of columns that are no event features."""
_Fields = list[tuple[str, Any]]
"""A message of protobuf text: names with scalars as they are written, or with messages."""


def write_session_schema(splits: Path, folder: Path, vocabularies: Mapping[str, Sequence[Any]], longest: int) -> None:
    """Write the schema for a data folder and for each of its splits.

    Parameters
    ----------
    splits : Path
        Folder whose splits hold parquet files, for the types of the columns.
    folder : Path
        Data folder.
    vocabularies : mapping of str to sequence
        ``item_id`` and the categorical event columns, each with its distinct values.
    longest : int
        Events of the longest session.
    """
    file = next(file for name in SPLITS for file in sorted((splits / name).glob("*.parquet")))
    sizes = {name: FIRST_ITEM_ROW + len(values) for name, values in vocabularies.items()}
    text = schema_text(pq.read_schema(file), sizes, longest)
    for part in (folder, *(folder / name for name in SPLITS)):
        part.mkdir(exist_ok=True)
        (part / SCHEMA_FILE).write_text(text, encoding="utf-8")


def schema_text(columns: pa.Schema, sizes: Mapping[str, int], longest: int) -> str:
    """Return the schema of sessions.

    Parameters
    ----------
    columns : pyarrow.Schema
        Of the sessions.
    sizes : mapping of str to int
        Categorical columns without ``-list`` -> number of codes, reserved ones included.
    longest : int
        Events of the longest session.
    """
    return "".join(_text("feature", _feature(field, sizes, longest)) for field in columns)


def _feature(field: pa.Field, sizes: Mapping[str, int], longest: int) -> _Fields:
    is_list = pa.types.is_list(field.type)
    values = field.type.value_type if is_list else field.type
    name = field.name.removesuffix(LIST_SUFFIX) if is_list else field.name
    kind = "INT" if pa.types.is_integer(values) else "FLOAT" if pa.types.is_floating(values) else ""
    size = sizes.get(name) if is_list else None
    properties: dict[str, Any] = {"_dims": [[0, None], [0, longest]] if is_list else []}
    properties |= {"is_list": is_list, "is_ragged": is_list}
    if kind:
        properties["dtype_item_size"] = values.bit_width
    if size:
        properties["embedding_sizes"] = {"cardinality": size, "dimension": _embedding_size(size)}
    found: _Fields = [("name", _quoted(field.name))]
    found += [("value_count", [("max", longest)])] if is_list else []
    found += [("type", kind)] if kind else []
    if size:
        found.append(("int_domain", [("name", _quoted(name)), ("max", size - 1), ("is_categorical", "true")]))
    tags = _TAGS.get(field.name) or ["categorical" if size else "continuous", "list", "sequence"]
    metadata = ("[type.googleapis.com/google.protobuf.Struct]", _struct(properties))
    return [*found, ("annotation", [*(("tag", _quoted(tag)) for tag in tags), ("extra_metadata", [metadata])])]


def _embedding_size(size: int) -> int:
    """Return NVTabular's suggested width of an embedding table with so many rows."""
    return min(max(16, round(1.6 * size**0.56)), 512)


def _struct(values: Mapping[str, Any]) -> _Fields:
    return [("fields", [("key", _quoted(name)), ("value", _value(values[name]))]) for name in sorted(values)]


def _value(value: Any) -> _Fields:
    if value is None:
        return [("null_value", "NULL_VALUE")]
    if isinstance(value, bool):
        return [("bool_value", "true" if value else "false")]
    if isinstance(value, Mapping):
        return [("struct_value", _struct(value))]
    if isinstance(value, list):
        return [("list_value", [("values", _value(one)) for one in value])]
    return [("number_value", float(value))]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("'", "\\'")


def _text(name: str, value: Any, indent: str = "") -> str:
    """Return a field of protobuf text."""
    if not isinstance(value, list):
        return f"{indent}{name}: {value}\n"
    inner = "".join(_text(key, part, indent + "  ") for key, part in value)
    return f"{indent}{name} {{\n{inner}{indent}}}\n"
