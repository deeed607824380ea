"""Read session parquet of an existing workflow: rename columns, check rows against its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from merlin.schema import ColumnSchema, Schema, Tags
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from missrec_t4r.data.session_files import take_events
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl.nvt.adopt_users import BEGIN, begins, number_sessions
from missrec_t4r.etl.nvt.workflows import session_schema
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import Paths, expand, read_table
from missrec_t4r.io.arrow_files import is_list, one_array, with_column
from missrec_t4r.schema import (
    FIRST_ITEM_ROW,
    ITEM_ID,
    ITEM_LIST,
    LIST_SUFFIX,
    NULL_ROW,
    SCHEMA_FILE,
    SESSION_ID,
    SPLITS,
    USER_ID,
)

_ABOVE = 3
"""Number of parent folders of the sessions that are searched for a schema.pbtxt."""
_NO_KEY = (
    "no column is tagged USER_ID or SESSION_ID, or called user_id or session_id: sessions are numbered; "
    "--user-column names the column of their ids"
)
_SAME_FIT = ("sessions and vocabulary of the same fit", "name the workflow that wrote these sessions")


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
    user_column : str or None
        Column of the user or session; None takes the one that the schema or its name tells.
    """

    def __init__(
        self, rows: int, schema: Path | None, findings: checks.Findings, user_column: str | None = None
    ) -> None:
        self.rows, self.schema_file, self.findings, self.user_column = rows, schema, findings, user_column
        self._raw_names: dict[str, str] = {}  # our name -> name in the files, of all that was read
        self._schema: Schema | None = None
        self._numbered = 0  # sessions so far
        self._keys: list[str | None] = []  # of every split that was read, in the files

    def read(self, paths: Paths) -> pa.Table:
        """Return the sessions as ``user_id``, ``item_id-list`` and further ``-list`` columns.

        Beside them ``session_id`` where a user has several sessions (`number_sessions`).

        Raises
        ------
        SchemaError
            No or several item columns, or no schema.
        DataError
            The sessions have item rows outside the vocabulary, or no known item.
        """
        return number_sessions({"": self._read(paths)}, self.findings)[""]

    def _read(self, paths: Paths) -> pa.Table:
        files = expand(paths, "sessions")
        table = read_table(files, "sessions")
        if self._schema is None:
            self._schema = _read_schema(self.schema_file or _beside(files[0]))
        names = _session_columns(table, self._schema, self.rows, self.user_column)
        columns = {name: _as_offset_lists(table[raw]) for name, raw in names.items()}
        columns[ITEM_LIST] = items = _of_rows(columns[ITEM_LIST], names[ITEM_LIST])
        misaligned = [
            name
            for name, column in columns.items()
            if name.endswith(LIST_SUFFIX) and not column.offsets.equals(items.offsets)
        ]
        message = f"columns {misaligned} have lists of other lengths than the items"
        self.findings.add("list_column_left_out", len(misaligned), message)
        self._raw_names |= names
        users = {} if USER_ID in names else {USER_ID: self._numbers(table.num_rows, _NO_KEY)}
        users[BEGIN] = begins(table, self._schema)
        self._keys.append(names.get(USER_ID))
        aligned = {name: column for name, column in columns.items() if name not in misaligned}
        return self._without_unknown(users | aligned, items, files[0])

    def read_splits(self, paths: Mapping[str, Paths]) -> dict[str, pa.Table]:
        """Return given train, valid and test sessions: the columns that all have, and what has a target.

        Raises
        ------
        SchemaError, DataError
            As of `read`; a split is not given, or has no session of two items.
        """
        if missing := [name for name in SPLITS if name not in paths]:
            raise DataError(f"no sessions for {missing}", "train, valid and test", "name them, or --sessions alone")
        files = {name: {file.resolve() for file in expand(paths[name], "sessions")} for name in SPLITS}
        for name in SPLITS[1:]:
            if shared_files := sorted(files[name] & files[SPLITS[0]]):
                raise DataError(
                    f"{shared_files[0]} is in --train and in --{name}, whose targets would be trained",
                    "other files",
                    "name files in place of folders that hold several splits",
                )
        tables = self._with_keys_of_all({name: self._read(paths[name]) for name in SPLITS})
        shared = [name for name in tables["train"].column_names if all(name in t.column_names for t in tables.values())]
        partly = sorted({name for table in tables.values() for name in table.column_names} - set(shared))
        self.findings.add("list_column_left_out", len(partly), f"columns {partly} are not in all three splits")
        tables = {name: table.select(shared) for name, table in tables.items()}
        tables |= {name: self._with_history(tables[name], name) for name in SPLITS[1:]}
        return number_sessions(tables, self.findings)

    def _with_keys_of_all(self, tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
        """Number all sessions where the splits have other keys, or some none: equal ones are not one user's."""
        if len({*self._keys}) == 1:
            return tables
        del self._raw_names[USER_ID]
        for (name, table), key in zip([*tables.items()], self._keys, strict=True):
            if key is not None:
                numbers = self._numbers(table.num_rows, f"{key!r} is not the key of all splits: sessions are numbered")
                tables[name] = with_column(table, USER_ID, numbers)
        return tables

    def _numbers(self, count: int, message: str) -> pa.Array:
        """Return a number per session; sessions of another split get other ones."""
        self.findings.add("numbered_sessions", count, message)
        self._numbered += count
        return pa.array(np.arange(self._numbered - count, self._numbered))

    def _with_history(self, table: pa.Table, split: str) -> pa.Table:
        """Leave out sessions of one item: it is the target, and nothing precedes it."""
        sessions = table.filter(pc.greater(pc.list_value_length(table[ITEM_LIST]), 1))
        message = f"sessions of {split} with one item are left out: nothing precedes their target"
        self.findings.add("sessions_of_one_item", table.num_rows - sessions.num_rows, message)
        if not sessions.num_rows:
            raise DataError(f"no session of {split} has two items", "at least one: the last item is the target")
        return sessions

    def schema_of(self, names: Sequence[str], n_rows: int, longest: int) -> Schema:
        """Return the Merlin schema of columns that were read: tags as stored, the domain of the items ``n_rows``.

        A session key that the stored schema does not describe, or that was numbered here, is left out.
        """
        assert self._schema is not None, "read first"
        columns = []
        for name in names:
            raw = self._raw_names.get(name)
            if raw not in self._schema.column_names:
                continue
            column = self._schema[raw]
            tags, properties = set(column.tags), dict(column.properties)
            if name.endswith(LIST_SUFFIX):
                tags |= {Tags.LIST, Tags.SEQUENCE}
            if name == ITEM_LIST:
                tags |= {Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL}
                properties["domain"] = {"min": 0, "max": n_rows - 1, "name": ITEM_ID}
            columns.append(ColumnSchema(name, dtype=column.dtype, tags=list(tags), properties=properties))
        return session_schema(Schema(columns), longest)

    def vocabularies(self, schema: Schema) -> dict[str, str]:
        """Return the encoded event features of a schema of `schema_of`, and the columns whose vocabularies they have.

        Categorify names the vocabulary of a list column in the stored schema, whatever the list is called
        (``event_type_list`` by default) or shares its codes with.
        """
        assert self._schema is not None, "read first"
        found = {}
        for column in schema.select_by_tag(Tags.CATEGORICAL).column_names:
            if column != ITEM_LIST:
                name = column.removesuffix(LIST_SUFFIX)
                file = self._schema[self._raw_names[column]].properties.get("cat_path") or f"unique.{name}.parquet"
                found[name] = Path(str(file)).name.removeprefix("unique.").removesuffix(".parquet")
        return found

    def _without_unknown(self, columns: dict[str, Any], items: pa.ListArray, file: Path) -> pa.Table:
        """Drop padding, null and unknown events, and sessions without any other event."""
        values = items.values.fill_null(NULL_ROW).to_numpy()
        if len(values) and (values.max() >= self.rows or values.min() < 0):
            raise DataError(
                f"{file} has item rows from {values.min()} to {values.max()}, the vocabulary ends at {self.rows - 1}",
                *_SAME_FIT,
            )
        known = values >= FIRST_ITEM_ROW  # [event]
        unknown = int(((values > 0) & ~known).sum())
        self.findings.add("unknown_events", unknown, "events on null or unknown items are left out")
        lengths = np.diff(np.concatenate([[0], np.cumsum(known)])[np.asarray(items.offsets)])  # [session]
        self.findings.add("empty_sessions", int((lengths == 0).sum()), "sessions without a known item are left out")
        if not lengths.any():
            raise DataError(f"no session of {file} has a known item", "sessions of rows from 3 on")
        return take_events(pa.table(columns), known, lengths)


def _session_columns(table: pa.Table, schema: Schema, n_rows: int, user_column: str | None) -> dict[str, str]:
    """Return the names in the table by our name: session key, items and event features."""
    lists = [name for name in table.column_names if is_list(table[name].type)]
    item_columns = [name for name in schema.select_by_tag(Tags.ITEM_ID).column_names if name in table.column_names]
    tagged = [name for name in item_columns if name in lists]
    texts = [name for name in item_columns if table[name].type in (pa.string(), pa.large_string())]
    if texts and not tagged:
        example = next(iter(table[texts[0]].slice(0, 1).to_pylist()), "")  # a file may have no row
        raise SchemaError(
            f"column {texts[0]!r} is tagged ITEM_ID and holds texts such as {example!r}",
            "a list of rows per session",
            "dask writes lists as texts unless DASK_DATAFRAME__CONVERT_STRING=False is set: transform again",
        )
    if len(tagged) != 1:
        in_schema = schema.select_by_tag(Tags.ITEM_ID).column_names
        raise SchemaError(
            f"list columns tagged ITEM_ID: {tagged}; the schema tags {in_schema}, the sessions have the lists {lists}",
            "exactly one of both",
            "tag the item column in schema.pbtxt (TagAsItemID), or name the right file with --schema",
        )
    domain = schema[tagged[0]].int_domain
    if domain is not None and domain.max and int(domain.max) + 1 not in (n_rows, n_rows + 1):
        raise DataError(
            f"the sessions' schema counts {int(domain.max) + 1} rows and the vocabulary {n_rows}", *_SAME_FIT
        )
    keys = [name for tag in (Tags.USER_ID, Tags.SESSION_ID) for name in schema.select_by_tag(tag).column_names]
    keys = [name for name in [*keys, USER_ID, SESSION_ID] if name in table.column_names and name not in lists]
    if user_column is not None:
        if user_column not in table.column_names or user_column in lists:
            others = [name for name in table.column_names if name not in lists]
            raise SchemaError(
                f"no column {user_column!r} of users among {others}",
                "a column with one value per session",
                "name another one with --user-column",
            )
        keys = [user_column]
    names = {USER_ID: keys[0]} if keys else {}
    names[ITEM_LIST] = tagged[0]
    for name in lists:
        if name != tagged[0] and name in schema.column_names:
            names.setdefault(name.removesuffix(LIST_SUFFIX) + LIST_SUFFIX, name)
    return names


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


def _as_offset_lists(column: pa.ChunkedArray) -> Any:
    """Return a column as one array; lists with offsets from 0 and empty lists in place of null rows."""
    array = one_array(column)
    if not is_list(array.type):
        return array
    lengths = np.asarray(pc.fill_null(pc.list_value_length(array), 0), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), array.flatten())


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
            raise pa.ArrowInvalid(f"{values.type} are not rows")
        rows = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        example = next((value for value in values.to_pylist() if value is not None), None)
        raise SchemaError(
            f"the lists of column {name!r} hold {values.type}, such as {example!r}",
            "rows of the workflow's vocabulary, as its Categorify writes them",
            "pass the sessions that the workflow wrote, or run `missrec etl` on the raw events",
        ) from error
    return pa.ListArray.from_arrays(items.offsets, rows)
