"""Read session parquet of an existing workflow: rename columns, check rows against its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from merlin.schema import ColumnSchema, Schema, Tags
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import Paths, expand, read_table
from missrec_t4r.io.arrow_files import is_list, one_array
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_LIST, LIST_SUFFIX, NULL_ROW, SCHEMA_FILE, SPLITS, USER_ID

_ABOVE = 3
"""Number of parent folders of the sessions that are searched for a schema.pbtxt."""


class Reader:
    """Reader of session parquet with one schema.

    Parameters
    ----------
    rows : int
        Rows of the vocabulary, the three reserved ones included.
    schema : Path or None
        schema.pbtxt; None searches beside and above the sessions.
    findings : Findings
        Receives what was dropped.
    """

    def __init__(self, rows: int, schema: Path | None, findings: checks.Findings) -> None:
        self.rows, self.schema_file, self.findings = rows, schema, findings
        self._columns: dict[str, str] = {}  # raw name -> ours, of all that was read
        self._schema: Schema | None = None

    def read(self, paths: Paths) -> pa.Table:
        """Return the sessions as ``user_id``, ``item_id-list`` and further ``-list`` columns.

        Raises
        ------
        SchemaError
            No or several item columns, or no schema.
        DataError
            The sessions have item rows outside the vocabulary, or no known item.
        """
        files = [file for file in expand(paths, "sessions") if not file.name.startswith("_")]
        table = read_table(files, "sessions")
        if self._schema is None:
            self._schema = _read_schema(self.schema_file or _beside(files[0]))
        names = self._names(table)
        columns = {ours: _lists(table[raw]) for raw, ours in names.items()}
        raw_items = next(raw for raw, ours in names.items() if ours == ITEM_LIST)
        columns[ITEM_LIST] = items = _of_rows(columns[ITEM_LIST], raw_items)
        columns = self._aligned(columns, items)
        self._columns |= {raw: ours for raw, ours in names.items() if ours in columns}
        return self._without_unknown(columns, items, table, files[0])

    def read_splits(self, paths: Mapping[str, Paths]) -> dict[str, pa.Table]:
        """Return given train, valid and test sessions: the columns that all have, and what has a target.

        Raises
        ------
        SchemaError, DataError
            As of `read`; a split is not given, or has no session of two items.
        """
        if missing := [name for name in SPLITS if name not in paths]:
            raise DataError(f"no sessions for {missing}", "train, valid and test", "name them, or --sessions alone")
        tables = {name: self.read(paths[name]) for name in SPLITS}
        shared = [name for name in tables["train"].column_names if all(name in t.column_names for t in tables.values())]
        partly = sorted({name for table in tables.values() for name in table.column_names} - set(shared))
        self.findings.add("list_column_left_out", len(partly), f"columns {partly} are not in all three splits")
        self._columns = {raw: ours for raw, ours in self._columns.items() if ours not in partly}
        return {
            name: table.select(shared) if name == "train" else self._with_history(table.select(shared), name)
            for name, table in tables.items()
        }

    def _with_history(self, table: pa.Table, split: str) -> pa.Table:
        """Leave out sessions of one item: it is the target, and nothing precedes it."""
        has_history = pc.greater(pc.list_value_length(table[ITEM_LIST]), 1)
        left = table.filter(has_history)
        message = f"sessions of {split} with one item are left out: nothing precedes their target"
        self.findings.add("sessions_of_one_item", table.num_rows - left.num_rows, message)
        if not left.num_rows:
            raise DataError(f"no session of {split} has two items", "at least one: the last item is the target")
        return left

    def schema_of_sessions(self, rows: int, longest: int) -> Schema:
        """Return the Merlin schema of the sessions: renamed columns, tags as stored, item domain of the catalogue."""
        assert self._schema is not None, "read first"
        columns = []
        for raw, ours in self._columns.items():
            column = self._schema[raw]
            properties = {
                key: column.properties[key] for key in ("domain", "embedding_sizes") if key in column.properties
            }
            tags = set(column.tags) | ({Tags.LIST, Tags.SEQUENCE} if ours.endswith(LIST_SUFFIX) else set())
            if ours == ITEM_LIST:
                properties["domain"] = {"min": 0, "max": rows - 1, "name": "item_id"}
                tags |= {Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL}
            dims = ((0, None), (0, longest)) if ours.endswith(LIST_SUFFIX) else None
            columns.append(ColumnSchema(ours, dtype=column.dtype, tags=list(tags), properties=properties, dims=dims))
        return Schema(columns)

    def _names(self, table: pa.Table) -> dict[str, str]:
        """Return our names by raw name: session key, items and event features."""
        assert self._schema is not None
        lists = [name for name in table.column_names if _is_list(table[name].type)]
        of_items = [n for n in self._schema.select_by_tag(Tags.ITEM_ID).column_names if n in table.column_names]
        tagged = [name for name in of_items if name in lists]
        texts = [name for name in of_items if table[name].type in (pa.string(), pa.large_string())]
        if texts and not tagged:
            example = next(iter(table[texts[0]].slice(0, 1).to_pylist()), "")  # a file may have no row
            raise SchemaError(
                f"column {texts[0]!r} is tagged ITEM_ID and holds texts such as {example!r}",
                "a list of rows per session",
                "dask writes lists as texts unless DASK_DATAFRAME__CONVERT_STRING=False is set: transform again",
            )
        if len(tagged) != 1:
            raise SchemaError(
                f"list columns tagged ITEM_ID: {tagged}",
                "exactly one",
                "tag the item column in schema.pbtxt (TagAsItemID), or name the right file with --schema",
            )
        domain = self._schema[tagged[0]].int_domain
        if domain is not None and domain.max and int(domain.max) + 1 not in (self.rows, self.rows + 1):
            raise DataError(
                f"the sessions' schema counts {int(domain.max) + 1} rows and the vocabulary {self.rows}",
                "sessions and vocabulary of the same fit",
                "name the workflow that wrote these sessions",
            )
        names = {tagged[0]: ITEM_LIST}
        users = [n for tag in (Tags.USER_ID, Tags.SESSION_ID) for n in self._schema.select_by_tag(tag).column_names]
        users += [name for name in table.column_names if name in (USER_ID, "session_id")]
        if users and users[0] not in lists:
            names = {users[0]: USER_ID, **names}
        for name in lists:
            if name not in names and name in self._schema.column_names:
                names[name] = name if name.endswith(LIST_SUFFIX) else name + LIST_SUFFIX
        return names

    def _aligned(self, lists: dict[str, Any], items: pa.ListArray) -> dict[str, Any]:
        """Drop list columns whose lists are not as long as those of the items."""
        misaligned = [
            name
            for name, column in lists.items()
            if name.endswith(LIST_SUFFIX) and not column.offsets.equals(items.offsets)
        ]
        message = f"columns {misaligned} have lists of other lengths than the items"
        self.findings.add("list_column_left_out", len(misaligned), message)
        return {name: column for name, column in lists.items() if name not in misaligned}

    def _without_unknown(self, columns: dict[str, Any], items: pa.ListArray, table: pa.Table, file: Path) -> pa.Table:
        """Drop padding, null and unknown events, and sessions without any other event."""
        values = items.values.fill_null(NULL_ROW).to_numpy()
        if len(values) and (values.max() >= self.rows or values.min() < 0):
            raise DataError(
                f"{file} has item rows from {values.min()} to {values.max()}, the vocabulary ends at {self.rows - 1}",
                "sessions and vocabulary of the same fit",
                "name the workflow that wrote these sessions",
            )
        known = values >= FIRST_ITEM_ROW  # [event]
        unknown = int(((values > 0) & ~known).sum())
        self.findings.add("unknown_events", unknown, "events on null or unknown items are left out")
        offsets = np.concatenate([[0], np.cumsum(known)])[np.asarray(items.offsets)]  # [session + 1], known events only
        has_items = np.diff(offsets) > 0  # [session]
        self.findings.add("empty_sessions", int((~has_items).sum()), "sessions without a known item are left out")
        # An empty session starts where the next one does, so dropping its start keeps the others' lists in place.
        new_offsets = pa.array(np.concatenate([offsets[:-1][has_items], offsets[-1:]]).astype(np.int32))
        event_mask, session_mask = pa.array(known), pa.array(has_items)
        if USER_ID not in columns:
            columns = {USER_ID: pa.array(np.arange(table.num_rows)), **columns}
        filtered = {
            name: pa.ListArray.from_arrays(new_offsets, column.values.filter(event_mask))
            if name.endswith(LIST_SUFFIX)
            else column.filter(session_mask)
            for name, column in columns.items()
        }
        if not has_items.any():
            raise DataError(f"no session of {file} has a known item", "sessions of rows from 3 on")
        return pa.table(filtered)


def _read_schema(file: Path) -> Schema:
    try:
        return TensorflowMetadata.from_proto_text_file(str(file.parent), file.name).to_merlin_schema()
    except Exception as error:  # protobuf's own errors have no common base
        raise SchemaError(f"{file} cannot be read ({error})", "a schema.pbtxt", "name it with --schema") from error


def _beside(file: Path) -> Path:
    for folder in list(file.absolute().parents)[:_ABOVE]:
        if (folder / SCHEMA_FILE).is_file():
            return folder / SCHEMA_FILE
    raise SchemaError(f"no {SCHEMA_FILE} beside {file}", "the schema of the sessions", "name it with --schema")


def _lists(column: pa.ChunkedArray) -> Any:
    """Return a column as one array; lists with offsets from 0 and empty lists in place of null rows."""
    array = one_array(column)
    if not _is_list(array.type):
        return array
    lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), array.flatten())


def _is_list(kind: pa.DataType) -> bool:
    return is_list(kind) or pa.types.is_fixed_size_list(kind)


def _of_rows(items: pa.ListArray, name: str) -> pa.ListArray:
    """Return lists of item rows as 64-bit integers; NaN becomes null.

    Raises
    ------
    SchemaError
        They hold something else, such as raw ids.
    """
    values = items.values
    if pa.types.is_floating(values.type):  # pandas writes integers beside nulls as floats
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    try:
        if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            raise pa.ArrowInvalid(f"{values.type} are no rows")
        rows = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        example = next((value for value in values.to_pylist() if value is not None), None)
        raise SchemaError(
            f"the lists of column {name!r} hold {values.type}, such as {example!r}",
            "rows of the workflow's vocabulary, as its Categorify writes them",
            "pass the sessions that the workflow wrote, or run `missrec etl` on the raw events",
        ) from error
    return pa.ListArray.from_arrays(items.offsets, rows)
