"""Read sessions in batches, from parquet or from the users of a data folder; write result tables, atomically."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.bundle.id_encoder import RawId
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.user_sessions import user_sessions
from missrec_t4r.errors import DataError
from missrec_t4r.io.arrow_files import is_list
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.io.input_files import files_in
from missrec_t4r.progress import track
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, LIST_SUFFIX, USER_ID
from missrec_t4r.serving.event_features import SessionEventFeatures

log = logging.getLogger(__name__)

ITEMS_COLUMN = "items"
_ROW_GROUP = 1 << 13
"""Rows of a written row group."""
_LONGEST_FOUND = 300
"""Characters of a wrong value in an error message."""


class SessionBatch(NamedTuple):
    """Consecutive rows of the session files."""

    passthrough: pa.Table
    """Columns that are copied to the output."""
    sessions: list[list[RawId]]
    event_features: list[SessionEventFeatures] | None
    """Event features per session; None if the file has none of the model's."""
    rules: list[dict[str, Any]] | None = None
    """Business rules per session, None without a rules column."""
    exclude: list[list[RawId]] | None = None
    """Ids per session that must not be recommended, None without an exclude column."""


class SessionFiles:
    """Parquet files with one row per session: a list column of raw item ids, oldest first, and other columns.

    Parameters
    ----------
    path : path
        A parquet file, or a folder of them (read in the order of their names).
    items_column : str
        List column of item ids.
    id_type : {"string", "int64"}
        Type of the catalogue's ids, which the column must have.
    event_features : sequence of str
        The model's event features; list columns of these names (or with ``-list``) have one raw value per item id.
    rules_column : str, optional
        Text column with a JSON object of business rules per session; empty or null is no rule.
    exclude_column : str, optional
        List column of ids that must not be recommended to the session.
    written : sequence of str
        Columns of the output: those of the same name in the files are not copied.

    Raises
    ------
    DataError
        No parquet file, no such column, or ids of another type.
    """

    def __init__(
        self,
        path: str | Path,
        items_column: str,
        id_type: str,
        event_features: Sequence[str] = (),
        rules_column: str | None = None,
        exclude_column: str | None = None,
        written: Sequence[str] = (),
    ) -> None:
        path = Path(path)
        self.files = files_in(path, (".parquet",)) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            found = f"{path} {'holds no parquet' if path.exists() else 'does not exist'}"
            raise DataError(found, "a parquet file, or a folder of them", "check --sessions")
        self.in_folder, self.written = path.is_dir(), frozenset(written)
        self.items_column = items_column
        self.schema = _read_schema(self.files[0])
        self.rules_column, self.exclude_column = rules_column, exclude_column
        self._check_ids(items_column, id_type, "name it with --items-column")
        if exclude_column is not None:
            self._check_ids(exclude_column, id_type, "check --exclude-column")
        if rules_column is not None:
            self._check_rules(rules_column)
        lists = {field.name for field in self.schema if is_list(field.type)} - {items_column}
        columns = {name: name if name in lists else name + LIST_SUFFIX for name in event_features}
        self.event_columns = {name: column for name, column in columns.items() if column in lists}
        self._warn_of_what_is_left_out(event_features)
        self._columns = [*self.passthrough, items_column, *self.event_columns.values()]
        if exclude_column is not None:
            self._columns.append(exclude_column)
        for file in self.files[1:]:
            names = _read_schema(file).names
            if missing := [column for column in self._columns if column not in names]:
                found = f"{file} has no column {', '.join(missing)}"
                raise DataError(found, f"the columns of {self.files[0]}", "write all files of the folder alike")

    @property
    def rows(self) -> int:
        """Sessions in all files."""
        return sum(pq.ParquetFile(file).metadata.num_rows for file in self.files)

    @property
    def passthrough(self) -> list[str]:
        """Columns that are copied to the output: all that are not lists and not among those written."""
        return [field.name for field in self.schema if not is_list(field.type) and field.name not in self.written]

    def refuse_as_output(self, out: Path) -> None:
        """Refuse a file to write that replaces the sessions, or that the next run would read as sessions.

        Raises
        ------
        DataError
        """
        if out.resolve() in {file.resolve() for file in self.files}:
            raise DataError(f"{out} holds the sessions", "another file for the result", "choose another --out")
        folder = self.files[0].parent
        if self.in_folder and out.suffix == ".parquet" and out.resolve().parent == folder.resolve():
            found = f"{out} is in the folder of the sessions, where the next run would read it as one of their files"
            raise DataError(found, "a file elsewhere", "choose another --out")

    def _warn_of_what_is_left_out(self, event_features: Sequence[str]) -> None:
        if absent := [name for name in event_features if name not in self.event_columns]:
            log.warning(
                f"the event features {', '.join(absent)} count as missing: {self.files[0]} has no list columns of "
                "these names; add one with a raw value per item id"
            )
        if replaced := sorted(self.written & {field.name for field in self.schema if not is_list(field.type)}):
            log.warning(f"columns {', '.join(replaced)} of {self.files[0]} are not copied: the result has its own")

    def batches(self, size: int, description: str) -> Iterator[SessionBatch]:
        """Yield batches of at most ``size`` rows, with progress; one batch without rows where the files have none.

        A null list is an empty session, or an absent event feature.
        """
        first = 0
        for table in track(self._tables(size), description, max(1, -(-self.rows // size))):
            yield SessionBatch(
                table.select(self.passthrough),
                _lists(table, self.items_column),
                self._event_features(table),
                None if self.rules_column is None else self._rules(table[self.rules_column], first),
                None if self.exclude_column is None else _lists(table, self.exclude_column),
            )
            first += table.num_rows

    def _tables(self, size: int) -> Iterator[pa.Table]:
        if not self.rows:
            yield self.schema.empty_table().select(self._columns)
        for file in self.files:
            for batch in pq.ParquetFile(file).iter_batches(size, columns=self._columns):
                yield pa.Table.from_batches([batch])

    def _event_features(self, table: pa.Table) -> list[SessionEventFeatures] | None:
        if not self.event_columns:
            return None
        lists = {name: table[column].to_pylist() for name, column in self.event_columns.items()}
        return [
            {name: values[row] for name, values in lists.items() if values[row] is not None}
            for row in range(table.num_rows)
        ]

    def _rules(self, column: pa.ChunkedArray, first: int) -> list[dict[str, Any]]:
        """Return the parsed rules of a batch whose first session has the number ``first``."""
        parsed = []
        for number, text in enumerate(column.to_pylist(), start=first):
            try:
                rules = json.loads(text) if text else {}
            except ValueError:
                rules = None
            if not isinstance(rules, dict):
                found = f"{self.rules_column!r} of session {number} is {text!r}"[:_LONGEST_FOUND]
                raise DataError(found, "a JSON object, or nothing")
            parsed.append(rules)
        return parsed

    def _check_rules(self, column: str) -> None:
        field = self.schema.field(column) if column in self.schema.names else None
        if field is None or not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            found = "no column" if field is None else f"{field.type} in column"
            raise DataError(f"{self.files[0]} has {found} {column!r}", "text, a JSON object of rules per session")

    def _check_ids(self, column: str, id_type: str, cure: str) -> None:
        names = [field.name for field in self.schema if is_list(field.type)]
        if column not in names:
            found = f"list columns {', '.join(names)}" if names else "no list column"
            raise DataError(
                f"{self.files[0]} has {found}",
                f"a list column {column!r} of raw item ids",
                cure,
            )
        ids = self.schema.field(column).type.value_type
        fits = (
            pa.types.is_integer(ids) if id_type == "int64" else pa.types.is_string(ids) or pa.types.is_large_string(ids)
        )
        if not fits and not pa.types.is_null(ids):
            raise DataError(
                f"column {column!r} of {self.files[0]} holds {ids}",
                f"{id_type}, the type of this catalogue's ids",
                "write the ids exactly as the item table has them",
            )


def _read_schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        whole = file.suffix in (".parquet", ".pq")
        cure = "write or copy the file again" if whole else "group the events by user and write the lists as parquet"
        expected = "parquet with one row per session, the item ids in one list column"
        raise DataError(f"{file} cannot be read as parquet ({error})", expected, cure) from error


def _lists(table: pa.Table, column: str) -> list[list[RawId]]:
    return [ids or [] for ids in table[column].to_pylist()]


@contextmanager
def session_file_of(data: Path, users: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield a parquet file with ``user_id`` and ``items`` (raw ids) of every user, or of some; removed at the end.

    A user's session is that of `user_sessions`: with all its events, the newest one where the user has several.

    Raises
    ------
    DataError
        No column of users, or a user that the folder lacks.
    """
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    user_ids, sessions = user_sessions(data)
    if users is not None:
        row_of = {str(user): row for row, user in enumerate(user_ids)}
        if unknown := [user for user in users if str(user) not in row_of]:
            raise DataError(f"{data} has no user {unknown[0]!r}", "ids of its users", "check --users")
        rows = [row_of[user] for user in dict.fromkeys(map(str, users))]
        user_ids, sessions = [user_ids[row] for row in rows], sessions.take(rows)
    item_ids = catalogue.items[ITEM_ID].combine_chunks().take(pa.array(sessions.values - FIRST_ITEM_ROW))
    items = pa.ListArray.from_arrays(pa.array(sessions.offsets, pa.int32()), item_ids)
    with TemporaryDirectory(prefix="missrec-users-") as folder:
        file = Path(folder) / "users.parquet"
        pq.write_table(pa.table({USER_ID: pa.array(user_ids), ITEMS_COLUMN: items}), file)
        yield file


def require_file_name(file: str | Path) -> None:
    """Refuse a folder as the name of a file to write: before hours of computing, not after.

    Raises
    ------
    DataError
    """
    if Path(file).is_dir():
        raise DataError(f"{file} is a folder", "the name of a file to write", "choose another --out")


def write_tables(file: str | Path, tables: Iterable[pa.Table]) -> int:
    """Write tables, at least one, to a parquet file, which is replaced atomically; return the number of rows.

    The first table defines the schema.

    Raises
    ------
    DataError
        ``file`` is a folder, or the disk is full or read-only.
    """
    require_file_name(file)
    tables = iter(tables)
    row_group = [next(tables)]
    schema, rows = row_group[0].schema, 0
    with (
        atomic_write_file(Path(file).absolute()) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for table in tables:
            if sum(map(len, row_group)) >= _ROW_GROUP:
                rows += _write_group(writer, row_group)
                row_group = []
            row_group.append(table.cast(schema))
        rows += _write_group(writer, row_group)
    return rows


def _write_group(writer: pq.ParquetWriter, tables: list[pa.Table]) -> int:
    table = pa.concat_tables(tables)
    writer.write_table(table)
    return len(table)
