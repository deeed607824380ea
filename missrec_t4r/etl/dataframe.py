"""Adapters for the dataframe operations in which pandas and cuDF differ; everything else is written once for both.

A list column is a pair of values and offsets: row i holds ``values[offsets[i]:offsets[i + 1]]``. cuDF stores it in this
form; for pandas (an object per row) it is converted here, through Arrow where the values are numbers. Every name of
cuDF that this package uses is in `docs/howto/gpu.md`, with what has been run on a GPU; outside the adapters these are
names that pandas has too (`tests/workflows/strict_frames.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

Frame = Any
"""pandas.DataFrame or cudf.DataFrame."""
Series = Any
"""pandas.Series or cudf.Series."""
Array = Any
"""numpy.ndarray for pandas, cupy.ndarray for cuDF."""


class ListColumn(NamedTuple):
    """A ragged column as values and offsets."""

    values: Series
    """All elements one after the other, [element]."""
    offsets: Array
    """Start of every row and the end of the last, [row + 1]."""


def adapter_of(frame: Frame) -> Adapter:
    """Return the adapter for a pandas or a cuDF frame or series."""
    return PandasFrames() if isinstance(frame, pd.DataFrame | pd.Series) else CudfFrames()


class PandasFrames:
    """pandas: rows of a list column are arrays in an object column."""

    @property
    def xp(self) -> ModuleType:
        """Return numpy."""
        return np

    def order(self, frame: Frame, columns: Sequence[str], ascending: Sequence[bool]) -> Array:
        """Return the stable sorting permutation by the columns, nulls last, [row].

        It sorts rank codes: strings are compared once per distinct value, not once per event.
        """
        ranks = [_rank(frame[name], up) for name, up in zip(columns, ascending, strict=True)]
        return np.lexsort(ranks[::-1])

    def take_apart(self, column: Series) -> ListColumn:
        """Return values and offsets of a list column, through Arrow; a null row becomes an empty one."""
        array = pa.array(column, from_pandas=True)
        if pa.types.is_null(array.type):
            return ListColumn(pd.Series([], dtype=object), np.zeros(len(array) + 1, np.int64))
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return ListColumn(array.flatten().to_pandas(), offsets)

    def build(self, column: ListColumn) -> Series:
        """Return the list column; numbers are sliced in C++ by Arrow, strings stay Python objects."""
        values = column.values.to_numpy()
        if values.dtype == object:
            bounds = column.offsets.tolist()
            rows = [values[start:end] for start, end in itertools.pairwise(bounds)]
            return pd.Series(rows, dtype=object)
        lists = pa.LargeListArray.from_arrays(pa.array(column.offsets, pa.int64()), pa.array(values))
        return lists.to_pandas()

    def append(self, column: Series, value: Any) -> Series:
        """Return the column with one value more, cast to its type."""
        return pd.Series(np.append(column.to_numpy(), [column.dtype.type(value)]))

    def array(self, column: Series) -> Array:
        """Return a column of numbers, [row]; pandas has NaN for null."""
        return column.to_numpy()

    def factorize(self, column: Series) -> tuple[Array, Series]:
        """Return codes of a column without nulls, from 0 on by first occurrence, [row], and the values of the codes."""
        return pd.factorize(column)

    def is_text(self, column: Series) -> bool:
        """Whether it holds texts: objects other than Booleans, which are objects beside nulls."""
        return column.dtype == object and not column.dropna().isin([True, False]).all()

    def from_arrow(self, table: pa.Table) -> Frame:
        """Return the table in pandas; integers with nulls stay integers (``Int64``)."""
        frame = table.to_pandas()
        for name in table.column_names:
            if table[name].type == pa.int64() and table[name].null_count:
                frame[name] = table.select([name]).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)[name]
        return frame

    def to_arrow(self, column: Series) -> pa.Array:
        """Return the column as Arrow, NaN as null."""
        return pa.array(column, from_pandas=True)

    def counts(self, column: Series) -> pd.Series:
        """Return the number of rows per value that is no null, unsorted, in the memory of the host."""
        return column.value_counts(sort=False)


def _rank(column: Series, ascending: bool) -> Array:
    if ascending and isinstance(column.dtype, np.dtype) and column.dtype.kind in "iub":
        return column.to_numpy()
    codes, distinct = pd.factorize(column, sort=True)  # [row]; null is -1
    ranks = codes if ascending else len(distinct) - 1 - codes
    return np.where(codes < 0, len(distinct), ranks)  # nulls last in both directions


class CudfFrames:
    """cuDF: a list column already is values and offsets on the GPU."""

    @property
    def xp(self) -> ModuleType:
        """Return cupy, imported on first use."""
        import cupy

        return cupy

    def order(self, frame: Frame, columns: Sequence[str], ascending: Sequence[bool]) -> Array:
        """Return the permutation, sorted on the GPU; the row number as last key makes any algorithm stable."""
        keys = frame[list(columns)].copy(deep=False)
        keys["__row__"] = self.xp.arange(len(frame))
        return self.xp.asarray(keys.argsort(ascending=[*ascending, True], na_position="last"))

    def take_apart(self, column: Series) -> ListColumn:
        """Return the two child columns, as NVTabular's ListSlice reads them."""
        import cudf

        return ListColumn(cudf.Series._from_column(column._column.elements), column._column.offsets.values)

    def build(self, column: ListColumn) -> Series:
        """Return the list column of the child columns, by Merlin's own builder."""
        import cudf
        from merlin.core.dispatch import build_cudf_list_column

        return cudf.Series._from_column(build_cudf_list_column(column.values, column.offsets.astype("int32")))

    def append(self, column: Series, value: Any) -> Series:
        """Return the column with one value more; unlike cupy's arrays it may hold texts and nulls."""
        import cudf

        last = [str(value)] if self.is_text(column) else np.array([value]).astype(column.dtype)
        return cudf.concat([column, cudf.Series(last)], ignore_index=True)

    def array(self, column: Series) -> Array:
        """Return the values; cuDF refuses `values` of a column with nulls, which pandas has as floats."""
        if not column.null_count:
            return column.values
        floats = column if column.dtype.kind == "f" else column.astype("float64")
        return floats.to_cupy(na_value=float("nan"))

    def factorize(self, column: Series) -> tuple[Array, Series]:
        """Return codes, in the order that cuDF chose, as int64: sums would overflow its narrowest type; and values."""
        codes, values = column.factorize()
        return codes.astype("int64"), values

    def is_text(self, column: Series) -> bool:
        """Whether it holds strings, cuDF's only objects."""
        return bool(column.dtype == object)

    def from_arrow(self, table: pa.Table) -> Frame:
        """Copy the table to the GPU, all its columns as columns: cuDF would look for an index that pandas noted."""
        import cudf

        return cudf.DataFrame.from_arrow(table.replace_schema_metadata())

    def to_arrow(self, column: Series) -> pa.Array:
        """Copy the column to the host."""
        return column.to_arrow()

    def counts(self, column: Series) -> pd.Series:
        """Count on the GPU, and copy the counts."""
        return column.value_counts(sort=False).to_pandas()


Adapter = PandasFrames | CudfFrames
