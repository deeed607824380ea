"""Adapters for the dataframe operations in which pandas and cuDF differ; the operators themselves are written once.

A list column is a pair of values and offsets: row i holds ``values[offsets[i]:offsets[i + 1]]``. cuDF stores it in this
form; for pandas (an object per row) it is converted here, through Arrow where the values are numbers. The cuDF half
follows NVTabular's own cuDF code; the README lists what has been run on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

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


class Adapter(Protocol):
    """Operations of a dataframe library that the operators need."""

    @property
    def xp(self) -> ModuleType:
        """Return numpy or cupy."""

    def order(self, frame: Frame, columns: Sequence[str], ascending: Sequence[bool]) -> Array:
        """Return the stable sorting permutation by the columns, nulls last, [row]."""

    def take_apart(self, column: Series) -> ListColumn:
        """Return values and offsets of a list column; a null row becomes an empty one."""

    def build(self, column: ListColumn) -> Series:
        """Return a list column of the frame's library."""


def adapter_of(frame: Frame) -> Adapter:
    """Return the adapter for a pandas or a cuDF frame."""
    return PandasFrames() if isinstance(frame, pd.DataFrame) else CudfFrames()


class PandasFrames:
    """pandas: rows of a list column are arrays in an object column."""

    @property
    def xp(self) -> ModuleType:
        """Return numpy."""
        return np

    def order(self, frame: Frame, columns: Sequence[str], ascending: Sequence[bool]) -> Array:
        """Return the permutation by rank codes: strings are compared once per distinct value, not once per event."""
        ranks = [_rank(frame[name], up) for name, up in zip(columns, ascending, strict=True)]
        return np.lexsort(ranks[::-1])

    def take_apart(self, column: Series) -> ListColumn:
        """Return values and offsets, flattened through Arrow."""
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
