"""Columns of a Merlin schema that the model reads: selection, and checks against the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.text_format import ParseError
from merlin.schema import ColumnSchema, Schema, Tags
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.schema import FIRST_ITEM_ROW, LIST_SUFFIX, SCHEMA_FILE

EVENT_FEATURE_TAGS = (Tags.CATEGORICAL, Tags.CONTINUOUS, Tags.EMBEDDING)
"""Tags of event features; T4R's own inputs read the same."""


def load_schema(path: str | Path) -> Schema:
    """Read a Merlin schema.

    Parameters
    ----------
    path : str or Path
        ``schema.pbtxt``, or the folder that contains it: a data folder of ``missrec etl``, or one of its splits.

    Raises
    ------
    DataError
        There is no such file, or it is not a schema.
    """
    file = Path(path) / SCHEMA_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"there is no schema {file}", "schema.pbtxt, or a folder that contains it", "run `missrec etl`")
    try:
        return TensorflowMetadata.from_proto_text_file(str(file.parent), file.name).to_merlin_schema()
    except ParseError as error:
        raise DataError(f"{file} is not a Merlin schema ({error})", "a schema as protobuf text") from error


def as_core_schema(schema: Any) -> Schema:
    """Return the schema as ``merlin.schema.Schema``; T4R's tutorials also use ``merlin_standard_lib.Schema``."""
    if isinstance(schema, Schema):
        return schema
    if hasattr(schema, "to_json"):
        return TensorflowMetadata.from_json(schema.to_json()).to_merlin_schema()
    raise SchemaError(f"a schema of type {type(schema).__name__}", "a Merlin schema", "read it from schema.pbtxt")


def is_list(column: ColumnSchema) -> bool:
    """Return whether a row of the column is a list."""
    return bool(column.is_list or {Tags.LIST, Tags.SEQUENCE} & set(column.tags))


def item_column(schema: Schema, n_rows: int | None = None) -> ColumnSchema:
    """Return the item column; with ``n_rows``, check its domain against the catalogue's rows.

    Raises
    ------
    SchemaError
        No list column, or several, tagged ITEM_ID; it is no list of integers; or its domain has rows that the catalogue
        lacks.
    """
    tagged = list(schema.select_by_tag(Tags.ITEM_ID))
    if len(tagged) > 1:  # NVTabular tags the count of a session's items, and its first one, as the items themselves
        tagged = [column for column in tagged if is_list(column)] or tagged
    if len(tagged) != 1:
        raise SchemaError(
            f"{len(tagged)} columns tagged ITEM_ID among {schema.column_names}",
            "exactly one list",
            "tag the item column in the workflow, or drop the others with schema.select_by_name",
        )
    column = tagged[0]
    if not is_list(column) or not column.dtype.is_integer:
        raise SchemaError(
            f"item column {column.name!r} holds {column.dtype.name} {'lists' if is_list(column) else 'values'}",
            "lists of catalogue rows (int64)",
            "group the events into sessions and encode the ids with `missrec etl`",
        )
    domain = column.int_domain
    if domain is not None and domain.max is not None and n_rows is not None and domain.max >= n_rows:
        raise SchemaError(
            f"item column {column.name!r} has row numbers up to {int(domain.max)}",
            f"at most {n_rows - 1}: the catalogue's {n_rows} rows are numbered from 0, its items from {FIRST_ITEM_ROW}",
            "use the catalogue that `missrec etl` wrote beside this schema",
        )
    return column


def event_feature_schema(schema: Schema, item: str) -> Schema:
    """Return the other list columns that T4R's inputs would read: categorical, continuous and embedding columns."""
    names = [
        column.name
        for column in schema
        if column.name != item
        and is_list(column)
        and set(EVENT_FEATURE_TAGS) & set(column.tags)
        and Tags.TARGET not in column.tags
    ]
    return schema.select_by_name(names)


def one_per_session(schema: Schema) -> list[str]:
    """Return the columns with one value for a session that T4R's inputs would read, and ours do not.

    T4R repeats such a value at every event. Ids, and what NVTabular derives from the item column, are no features.
    """
    others = {Tags.ID, Tags.TARGET}
    return [
        column.name
        for column in schema
        if not is_list(column) and set(EVENT_FEATURE_TAGS) & set(column.tags) and not others & set(column.tags)
    ]


def event_feature_name(column: str) -> str:
    """Return a column's name in the pure-torch model: without the suffix of list columns."""
    return column.removesuffix(LIST_SUFFIX)


def event_column(column: ColumnSchema, width: int, number_width: int) -> EventColumn:
    """Return a column of `event_feature_schema` as an event feature, numbers as the workflow left them.

    Parameters
    ----------
    column : ColumnSchema
    width, number_width : int
        Embedding width of a category or vector, and of a number.

    Raises
    ------
    SchemaError
        A category without a domain, or vectors of unknown width.
    """
    name = event_feature_name(column.name)
    if Tags.CATEGORICAL in column.tags:
        domain = column.int_domain
        if domain is None or domain.max is None:
            raise SchemaError(
                f"categorical column {column.name!r} without an integer domain",
                "the number of its codes",
                "encode it with Categorify, or give the domain in the schema",
            )
        return EventColumn(name, "categorical", int(domain.max) + 1, width)
    if Tags.CONTINUOUS in column.tags:
        return EventColumn(name, "continuous", 1, number_width)
    dims = column.shape.dims
    if dims is None or len(dims) != 3 or dims[-1].max is None:
        raise SchemaError(
            f"embedding column {column.name!r} of shape {column.shape}",
            "lists of vectors of one width",
            "give the width in the schema, dims=(None, None, WIDTH)",
        )
    return EventColumn(name, "pretrained", int(dims[-1].max), width)
