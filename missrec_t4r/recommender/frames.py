"""Data frames of any library as Arrow tables, and files as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError
from missrec_t4r.etl.sources.table import read_table

Frame = Any
"""pandas.DataFrame, polars.DataFrame or LazyFrame, pyarrow.Table, or the path of a parquet or csv file."""


def arrow_table(frame: Frame, name: str) -> pa.Table:
    """Return a frame as an Arrow table; the index of a pandas frame is left out.

    Parameters
    ----------
    frame : DataFrame, Table or path
    name : str
        What it is, for the error.

    Raises
    ------
    DataError
        Neither a frame nor the path of a table.
    """
    if isinstance(frame, str | Path):
        return read_table(Path(frame), name)
    if isinstance(frame, pa.Table):
        return frame
    if hasattr(frame, "collect") and hasattr(frame, "lazy"):  # polars.LazyFrame
        frame = frame.collect()
    if hasattr(frame, "to_arrow"):  # polars.DataFrame, duckdb relations
        table = frame.to_arrow()
        return table if isinstance(table, pa.Table) else pa.table(table)
    if hasattr(frame, "columns") and hasattr(frame, "iloc"):
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    raise DataError(
        f"{name} of type {type(frame).__name__}",
        "a pandas, Polars or Arrow table, or the path of a parquet or csv file",
        "convert it, for example with pandas.DataFrame(...)",
    )


def write_parquet(table: pa.Table, file: Path) -> Path:
    """Write a table, without the long strings of Polars that older readers lack, and return the file."""
    columns = [
        column.cast(pa.string()) if str(column.type) in ("large_string", "string_view") else column
        for column in table.columns
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, table.column_names), file)
    return file
