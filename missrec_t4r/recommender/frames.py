"""Data frames of any library as Arrow tables, and files as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import ConfigError, DataError, ModalityError
from missrec_t4r.etl.sources.table import read_table

Frame = Any
"""DataFrame of pandas, Polars, cuDF or Dask, Merlin Dataset, pyarrow.Table, or the path of a parquet or csv file."""


def arrow_table(frame: Frame, name: str, ids: Sequence[str] = ()) -> pa.Table:
    """Return a frame as an Arrow table; the index of a pandas or cuDF frame is left out.

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
        table = read_table(Path(frame), name, text_columns=ids)
    else:
        table = frame if isinstance(frame, pa.Table) else _converted(frame, name)
    _refuse_repeated(table.column_names, name)
    return table


def _converted(frame: Frame, name: str) -> pa.Table:
    kind = type(frame)  # a column of pandas is an attribute of the frame as well
    if hasattr(kind, "collect") and hasattr(kind, "lazy"):  # polars.LazyFrame
        frame = frame.collect()
    if hasattr(kind, "compute"):  # of Dask, merlin.io.Dataset
        frame = frame.compute()
    if hasattr(type(frame), "to_arrow"):  # polars.DataFrame, duckdb relations, cudf.DataFrame
        if hasattr(type(frame), "reset_index"):  # cuDF makes a column of an index, after a filter for example
            frame = frame.reset_index(drop=True)
        table = frame.to_arrow()
        return table if isinstance(table, pa.Table) else pa.table(table)
    if not (hasattr(frame, "columns") and hasattr(frame, "iloc")):
        raise DataError(
            f"{name} of type {type(frame).__name__}",
            "a pandas, Polars or Arrow table, or the path of a parquet or csv file",
            "convert it, for example with pandas.DataFrame(...)",
        )
    _refuse_repeated(map(str, frame.columns), name)
    try:
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except UnicodeEncodeError as error:
        raise DataError(f"{name} with text that is not Unicode ({error})", "Unicode text", "repair it") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"a column of {name} holds values of several types ({'; '.join(map(str, error.args))})",
            "one type per column",
            "convert it, for example with .astype(str), or leave it out",
        ) from error


def index_hint(frame: Frame, wanted: str) -> str:
    """Return how the index of a frame of pandas, named or not, becomes the column ``wanted``."""
    names = [repr(name) for name in getattr(getattr(frame, "index", None), "names", ()) if name is not None]
    if names:
        return f"its index {', '.join(names)} becomes a column with reset_index()"
    return f"an index becomes a column with rename_axis({wanted!r}).reset_index()"


def _refuse_repeated(columns: Iterable[str], name: str) -> None:
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise DataError(
            f"{name} with several columns called {', '.join(repeated)}", "one of each name", "drop or rename the others"
        )


def arrays_of(vectors: Mapping[str, npt.ArrayLike] | None) -> dict[str, npt.NDArray[np.float32]]:
    """Return vectors by modality as float32, tensors of torch on any device and of any precision too.

    Raises
    ------
    ConfigError, ModalityError
        No mapping, or values that are no array of numbers.
    """
    if vectors is not None and not isinstance(vectors, Mapping):
        raise ConfigError(
            f"vectors of type {type(vectors).__name__}",
            "a mapping of modalities to arrays",
            'name their modality: vectors={"text": array}',
        )
    arrays = {}
    for name, values in (vectors or {}).items():
        tensor: Any = values
        try:
            with np.errstate(over="ignore"):  # infinity is refused with its row
                arrays[name] = np.asarray(
                    tensor.detach().float().cpu() if hasattr(tensor, "detach") else values, dtype=np.float32
                )
        except (TypeError, ValueError) as error:
            raise ModalityError(f"vectors of {name!r} are not numbers ({error})", "an array [item, width]") from error
    return arrays


def plain(table: pa.Table) -> pa.Table:
    """Return a table with categories as their values, strings of the plain kind and no notes of pandas."""
    for place, name in enumerate(table.column_names):
        column = table[place]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if str(column.type) in ("large_string", "string_view"):
            column = column.cast(pa.string())
        table = table.set_column(place, name, column)
    return table.replace_schema_metadata(None)  # pandas' names an index, which some readers restore


def write_parquet(table: pa.Table, file: Path) -> Path:
    """Write a `plain` table; return the file."""
    pq.write_table(plain(table), file)
    return file
