"""Sessions in parquet, a batch at a time, and results that appear under their name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError
from missrec_t4r.schema import LIST_SUFFIX
from missrec_t4r.serving.session_transform import RawId
from missrec_t4r.serving.side import SideOfSession

_ROW_GROUP = 1 << 13
"""Rows that are gathered before a row group is written."""


class SessionBatch(NamedTuple):
    """Some rows of the file."""

    carried: pa.Table
    """The columns that are handed through."""
    sessions: list[list[RawId]]
    side: list[SideOfSession] | None
    """Side features per session; None if the file has none of the model's."""


class SessionFiles:
    """One row per session: a list column of raw item ids, oldest first, beside columns that are handed through.

    Parameters
    ----------
    place : path
        A parquet file, or a folder of them (read in the order of their names).
    items_column : str
        The list column.
    id_type : {"string", "int64"}
        Type of the catalogue's ids; the column must hold it.
    side : sequence of str
        The model's side features; list columns of these names (or with ``-list``) hold one raw value per item id.

    Raises
    ------
    DataError
        No parquet there, no such column, or ids of another type.
    """

    def __init__(self, place: str | Path, items_column: str, id_type: str, side: Sequence[str] = ()) -> None:
        place = Path(place)
        self.files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
        if not self.files or not self.files[0].is_file():
            raise DataError(f"{place} holds no parquet", "a parquet file, or a folder of them", "check --sessions")
        self.items_column = items_column
        self.schema = pq.read_schema(self.files[0])
        self._check(id_type)
        lists = {field.name for field in self.schema if _is_list(field.type)} - {items_column}
        named = {name: name if name in lists else name + LIST_SUFFIX for name in side}
        self.side_columns = {name: column for name, column in named.items() if column in lists}

    @property
    def rows(self) -> int:
        """Sessions in all files."""
        return sum(pq.ParquetFile(file).metadata.num_rows for file in self.files)

    @property
    def carried(self) -> list[str]:
        """Columns that are handed through: all that are no lists."""
        return [field.name for field in self.schema if not _is_list(field.type)]

    def batches(self, size: int) -> Iterator[SessionBatch]:
        """Yield at most ``size`` rows at a time; a missing list is an empty session, or an absent side feature."""
        for file in self.files:
            columns = [*self.carried, self.items_column, *self.side_columns.values()]
            for batch in pq.ParquetFile(file).iter_batches(size, columns=columns):
                table = pa.Table.from_batches([batch])
                sessions = [session or [] for session in table[self.items_column].to_pylist()]
                yield SessionBatch(table.select(self.carried), sessions, self._side(table))

    def _side(self, table: pa.Table) -> list[SideOfSession] | None:
        if not self.side_columns:
            return None
        lists = {name: table[column].to_pylist() for name, column in self.side_columns.items()}
        return [
            {name: values[line] for name, values in lists.items() if values[line] is not None}
            for line in range(table.num_rows)
        ]

    def _check(self, id_type: str) -> None:
        names = [field.name for field in self.schema if _is_list(field.type)]
        if self.items_column not in names:
            found = f"list columns {', '.join(names)}" if names else "no list column"
            raise DataError(
                f"{self.files[0]} has {found}",
                f"a list column {self.items_column!r} of raw item ids, oldest first",
                "name it with --items-column",
            )
        ids = self.schema.field(self.items_column).type.value_type
        fits = (
            pa.types.is_integer(ids) if id_type == "int64" else pa.types.is_string(ids) or pa.types.is_large_string(ids)
        )
        if not fits and not pa.types.is_null(ids):
            raise DataError(
                f"column {self.items_column!r} of {self.files[0]} holds {ids}",
                f"{id_type}, the type of this catalogue's ids",
                "write the ids exactly as the item table has them",
            )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Give a path beside ``file`` that takes its name when the block ends well, and is removed otherwise."""
    file = Path(file).absolute()
    if file.is_dir():
        raise DataError(f"{file} is a folder", "the name of a file to write", "choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield aside
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


class TableWriter:
    """Writes tables of one schema to one parquet file, in row groups of a useful size; the schema is the first one's.

    Parameters
    ----------
    file : Path
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self.rows = 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._waiting.append(table)
        self.rows += table.num_rows
        if sum(part.num_rows for part in self._waiting) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, self._waiting[0].schema, compression="zstd")
        self._writer.write_table(pa.concat_tables(part.cast(self._writer.schema) for part in self._waiting))
        self._waiting = []
