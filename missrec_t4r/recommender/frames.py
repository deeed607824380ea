"""Data frames of any library as Arrow tables, and files as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError
from missrec_t4r.etl.sources.table import read_table

Frame = Any
"""pandas.DataFrame, polars.DataFrame or LazyFrame, pyarrow.Table, or the path of a parquet or csv file."""


def arrow_table(frame: Frame, name: str, ids: Sequence[str] = ()) -> pa.Table:
    """Return a frame as an Arrow table; the index of a pandas frame is left out.

    Parameters
    ----------
    frame : DataFrame, Table or path
    name : str
        What it is, for the error.
    ids : sequence of str
        Columns that are read as text from csv and JSON, as in `missrec_t4r.etl.sources.table`.

    Raises
    ------
    DataError
        Neither a frame nor the path of a table, two columns of one name, or a column of several types.
    """
    if isinstance(frame, str | Path):
        return _once_each(read_table(Path(frame), name, text_columns=ids), name)
    if isinstance(frame, pa.Table):
        return _once_each(frame, name)
    if hasattr(frame, "collect") and hasattr(frame, "lazy"):  # polars.LazyFrame
        frame = frame.collect()
    if hasattr(frame, "to_arrow"):  # polars.DataFrame, duckdb relations
        table = frame.to_arrow()
        return table if isinstance(table, pa.Table) else pa.table(table)
    if hasattr(frame, "columns") and hasattr(frame, "iloc"):
        _refuse_repeated(map(str, frame.columns), name)
        try:
            return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"a column of {name} holds values of several types ({'; '.join(map(str, error.args))})",
                "one type per column",
                "convert it, for example with .astype(str), or leave it out",
            ) from error
    raise DataError(
        f"{name} of type {type(frame).__name__}",
        "a pandas, Polars or Arrow table, or the path of a parquet or csv file",
        "convert it, for example with pandas.DataFrame(...)",
    )


def _once_each(table: pa.Table, name: str) -> pa.Table:
    _refuse_repeated(table.column_names, name)
    return table


def _refuse_repeated(columns: Iterable[str], name: str) -> None:
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(
            f"{name} with several columns called {', '.join(repeated)}", "one of each name", "drop or rename the others"
        )


def write_parquet(table: pa.Table, file: Path) -> Path:
    """Write a table with categories as their values and strings of the plain kind; return the file."""
    columns = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    columns = [
        column.cast(pa.string()) if str(column.type) in ("large_string", "string_view") else column
        for column in columns
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, table.column_names), file)
    return file
