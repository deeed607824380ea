"""Files of a data folder beside the sessions: catalogue, request transform, schema, counts of the report.

``schema.pbtxt`` is written here without Merlin, as the text that Merlin 23.8 writes for the sessions of the built-in
workflow: TensorFlow Metadata's ``Schema`` in protobuf's text format, which Transformers4Rec and the Merlin loader read.
Types are those of the written parquet, tags and domains follow from what a column is. That both texts are equal is
tested on every combination of settings (`tests/workflows/test_scale.py`: the in-memory engine writes through Merlin).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.session_files import row_files
from missrec_t4r.etl import item_table, splits
from missrec_t4r.etl.event_arithmetic import sum_counts
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    FIRST_ITEM_ROW,
    ITEM_ID,
    ITEM_LIST,
    LIST_SUFFIX,
    NULL_ROW,
    SCHEMA_FILE,
    SESSION_ID,
    SPLITS,
    TIMESTAMP,
    UNKNOWN_ROW,
    USER_ID,
)


class Written(NamedTuple):
    """What the splits hold."""

    rows: Mapping[str, int]
    """Rows per split."""
    longest: int
    """Events of the longest session."""
    train_counts: Ints
    """Events of the training split, [item index]."""

    @classmethod
    def of_parts(cls, parts: Sequence[Mapping[str, Any]], train_counts: Iterable[Ints], n_rows: int) -> Written:
        """Return the sum over partitions: results of the tasks that write splits, and their ``train_counts``.

        Raises
        ------
        DataError
            A split has no session.
        """
        rows = {name: sum(part["sessions"][name] for part in parts) for name in SPLITS}
        splits.check_rows(rows)
        return cls(rows, max(part["longest"] for part in parts), sum_counts(train_counts, n_rows))


REPORT_FILE = "etl.json"
"""Marker file of a data folder."""
VERSIONS_FILE = "versions.json"
"""What each update of a data folder added, and what it found in the events that it read."""
WORKFLOW_FOLDER = "workflow"
REQUEST_FOLDER = "request_workflow"
NVTABULAR_FOLDER = "nvtabular_workflow"
TRANSFORM_FORMAT = 1
_TAGS = {
    USER_ID: ["id", "user"],
    SESSION_ID: ["id", "session"],
    ITEM_LIST: ["categorical", "id", "item", "list", "sequence"],
    TIMESTAMP + LIST_SUFFIX: ["list", "sequence", "time"],
}
"""Of columns that are no event features."""
_Message = dict[str, Any]
"""A message of protobuf text: names with scalars as they are written, with messages, or with a list of either."""


def write_catalogue(catalogue: Catalogue, train_counts: Ints, folder: Path) -> None:
    """Write the catalogue with its popularity: events of the training split, [item index], reserved rows included."""
    item_table.with_train_count(catalogue, train_counts[FIRST_ITEM_ROW:]).save(folder / CATALOGUE_FOLDER)


def request_transform(
    id_type: pa.DataType, n_items: int, max_sequence_length: int, features: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what serving does with the raw ids and event features of a request, as plain data.

    Parameters
    ----------
    id_type : pyarrow.DataType
        Of the raw item ids; the ids themselves are those of the catalogue, in its order.
    n_items : int
    max_sequence_length : int
        Number of last items of a request that the model reads.
    features : mapping
        From `feature_codes`.
    """
    return {
        "format": TRANSFORM_FORMAT,
        "item_id": {
            "column": ITEM_ID,
            "type": "int64" if pa.types.is_integer(id_type) else "string",
            "items": n_items,
            "null_row": NULL_ROW,
            "unknown_row": UNKNOWN_ROW,
            "first_row": FIRST_ITEM_ROW,
        },
        "max_sequence_length": max_sequence_length,
        "features": dict(features),
    }


def feature_codes(features: Sequence[str], categories: Mapping[str, pd.Series]) -> dict[str, Any]:
    """Return how event features of a request are encoded: the raw values of codes 3, 4, …; numbers are unchanged."""
    numbers = {name: {"kind": "continuous"} for name in features if name not in categories}
    return numbers | {name: {"kind": "categorical", "values": v.tolist()} for name, v in categories.items()}


def data_counts(catalogue: Catalogue, train_counts: Ints, rows: Mapping[str, int]) -> dict[str, Any]:
    """Return the counts of ``etl.json`` beside those of events and users.

    Parameters
    ----------
    catalogue : Catalogue
        Of the data folder.
    train_counts : ndarray [item index]
        As in `write_catalogue`.
    rows : mapping of str to int
        Rows per split.
    """
    return {
        "items": catalogue.n_items,
        "cold_items": int((train_counts[FIRST_ITEM_ROW:] == 0).sum()),
        "sessions": dict(rows),
        "modalities": {name: int(modality.present.sum()) for name, modality in catalogue.modalities.items()},
    }


# schema.pbtxt


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
    file = next(file for name in SPLITS for file in row_files(splits / name))
    sizes = {name: FIRST_ITEM_ROW + len(values) for name, values in vocabularies.items()}
    text = "".join(_lines({"feature": [_feature(field, sizes, longest) for field in pq.read_schema(file)]}))
    for target in (folder, *(folder / name for name in SPLITS)):
        target.mkdir(exist_ok=True)
        (target / SCHEMA_FILE).write_text(text, encoding="utf-8")


def _feature(field: pa.Field, sizes: Mapping[str, int], longest: int) -> _Message:
    """Return a column of the sessions; ``sizes``: codes of the categorical ones, by name without ``-list``."""
    is_list = pa.types.is_list(field.type)
    values = field.type.value_type if is_list else field.type
    name = field.name.removesuffix(LIST_SUFFIX)
    size = sizes.get(name) if is_list else None
    dims = [[0, None], [0, longest]] if is_list else []
    properties: dict[str, Any] = {"_dims": dims, "is_list": is_list, "is_ragged": is_list}
    feature: _Message = {"name": _quoted(field.name)}
    if is_list:
        feature["value_count"] = {"max": longest}
    if pa.types.is_integer(values) or pa.types.is_floating(values):
        feature["type"] = "INT" if pa.types.is_integer(values) else "FLOAT"
        properties["dtype_item_size"] = values.bit_width
    if size:
        feature["int_domain"] = {"name": _quoted(name), "max": size - 1, "is_categorical": "true"}
        properties["embedding_sizes"] = {"cardinality": size, "dimension": embedding_size(size)}
    tags = _TAGS.get(field.name) or ["categorical" if size else "continuous", "list", "sequence"]
    metadata = {"[type.googleapis.com/google.protobuf.Struct]": _struct(properties)}
    return feature | {"annotation": {"tag": [_quoted(tag) for tag in tags], "extra_metadata": metadata}}


def embedding_size(size: int) -> int:
    """Return NVTabular's suggested width of an embedding table with so many rows."""
    return min(max(16, round(1.6 * size**0.56)), 512)


def _struct(values: Mapping[str, Any]) -> _Message:
    return {"fields": [{"key": _quoted(name), "value": _value(values[name])} for name in sorted(values)]}


def _value(value: Any) -> _Message:
    if value is None:
        return {"null_value": "NULL_VALUE"}
    if isinstance(value, bool):
        return {"bool_value": "true" if value else "false"}
    if isinstance(value, Mapping):
        return {"struct_value": _struct(value)}
    if isinstance(value, list):
        return {"list_value": {"values": [_value(element) for element in value]}}
    return {"number_value": float(value)}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("'", "\\'")


def _lines(message: _Message, indent: str = "") -> Iterator[str]:
    """Yield a message as lines of protobuf text."""
    for name, content in message.items():
        for value in content if isinstance(content, list) else [content]:
            if isinstance(value, dict):
                yield f"{indent}{name} {{\n"
                yield from _lines(value, indent + "  ")
                yield f"{indent}}}\n"
            else:
                yield f"{indent}{name}: {value}\n"
