"""Which columns of a Merlin schema the model reads, checked against the catalogue once, at the border."""

from __future__ import annotations

from typing import Any

from merlin.schema import ColumnSchema, Schema, Tags
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from missrec_t4r.errors import SchemaError

SIDE_TAGS = (Tags.CATEGORICAL, Tags.CONTINUOUS, Tags.EMBEDDING)
"""T4R's own inputs read columns with one of these tags; so do ours."""


def as_core_schema(schema: Any) -> Schema:
    """Return a ``merlin.schema.Schema``; T4R's tutorials also use its older ``merlin_standard_lib.Schema``."""
    if isinstance(schema, Schema):
        return schema
    if hasattr(schema, "to_json"):
        return TensorflowMetadata.from_json(schema.to_json()).to_merlin_schema()
    raise SchemaError(f"a schema of type {type(schema).__name__}", "a Merlin schema", "read it from schema.pbtxt")


def is_list(column: ColumnSchema) -> bool:
    """Return whether a row of the column is a list."""
    return bool(column.is_list or {Tags.LIST, Tags.SEQUENCE} & set(column.tags))


def item_column(schema: Schema, n_rows: int) -> ColumnSchema:
    """Return the item column.

    Raises
    ------
    SchemaError
        No column, or several, tagged ITEM_ID; it is no list of integers; or its domain has rows that the catalogue
        lacks.
    """
    tagged = list(schema.select_by_tag(Tags.ITEM_ID))
    if len(tagged) != 1:
        raise SchemaError(
            f"{len(tagged)} columns tagged ITEM_ID among {schema.column_names}",
            "exactly one",
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
    if domain is not None and domain.max is not None and domain.max >= n_rows:
        raise SchemaError(
            f"item column {column.name!r} has rows up to {int(domain.max)}, the catalogue has {n_rows}",
            f"rows up to {n_rows - 1}",
            "use the catalogue that `missrec etl` wrote beside this schema",
        )
    return column


def side_schema(schema: Schema, item: str) -> Schema:
    """Return the other list columns that T4R's inputs would read: categorical, continuous and embedding columns."""
    names = [
        column.name
        for column in schema
        if column.name != item
        and is_list(column)
        and set(SIDE_TAGS) & set(column.tags)
        and Tags.TARGET not in column.tags
    ]
    return schema.select_by_name(names)
