"""A stand-in for cuDF 24.12 and cupy on the CPU: their names with their parameters, nulls and refusals, over Arrow.

It has the names that `docs/howto/gpu.md` lists and no others, so that code which calls another one fails in
`test_strict_cudf.py`. Where cuDF is installed, that test compares the signatures with cuDF's own. What it refuses as
cuDF does: arrays of columns with nulls or texts, a column in the constructor of a series, masks with nulls. It computes
with pandas and says nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fsspec.core import get_fs_token_paths


def _backed(values: Any, dtype: Any = None) -> pd.Series:
    """Values over Arrow, where a null is not NaN and does not change a type."""
    if isinstance(values, Series):
        return values._data
    if isinstance(values, pd.Series) and isinstance(values.dtype, pd.ArrowDtype):
        return values
    index = values.index if isinstance(values, pd.Series) else None
    kind = None if dtype is None else _arrow_type(dtype)
    array = values if isinstance(values, pa.Array) else pa.array(values, kind)
    if pa.types.is_large_string(array.type) or pa.types.is_null(array.type):
        array = array.cast(pa.string())
    return pd.Series(pd.arrays.ArrowExtensionArray(array), index=index)


def _arrow_type(dtype: Any) -> pa.DataType:
    return pa.string() if dtype in (object, "object") else pa.from_numpy_dtype(np.dtype(dtype))


class ListColumn:
    """The private column of a list series."""

    def __init__(self, elements: Series, offsets: Any) -> None:
        self.elements, self.offsets = elements, offsets


class _Rows:
    """``iloc`` of slices."""

    def __init__(self, take: Callable[[slice], Any]) -> None:
        self._take = take

    def __getitem__(self, rows: slice) -> Any:
        assert isinstance(rows, slice)
        return self._take(rows)


class Series:
    def __init__(self, data: Any = None, dtype: Any = None) -> None:
        if isinstance(data, ListColumn):
            raise TypeError("Use cudf.Series._from_column for constructing a Series from a ColumnBase")
        self._data = _backed(data, dtype)

    @classmethod
    def _from_column(cls, column: Any) -> Series:
        if isinstance(column, Series):  # an element column
            return column
        lists = pa.ListArray.from_arrays(pa.array(column.offsets, pa.int32()), column.elements.to_arrow())
        return cls(lists)

    @property
    def _column(self) -> Any:
        lists = self.to_arrow()
        if not pa.types.is_list(lists.type):
            return Series(lists)  # without the index
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))])
        return ListColumn(Series(lists.flatten()), Series(offsets.astype("int32")))

    @property
    def dtype(self) -> Any:
        kind = self._data.dtype.pyarrow_dtype
        return np.dtype(object) if pa.types.is_string(kind) else np.dtype(kind.to_pandas_dtype())

    @property
    def null_count(self) -> int:
        return int(self.to_arrow().null_count)

    @property
    def values(self) -> Any:
        if self.null_count:
            raise ValueError("Column must have no nulls.")
        if self.dtype == object:
            raise TypeError("String Arrays is not yet implemented in cudf")
        return self._data.to_numpy(self.dtype)

    @property
    def iloc(self) -> _Rows:
        return _Rows(lambda rows: Series(self._data.iloc[rows]))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, mask: Series) -> Series:
        assert not mask.null_count, "a mask with nulls"
        return Series(self._data[mask.values])

    def _nan(self) -> Any:
        return (self._data != self._data).fillna(False) if self.dtype.kind == "f" else self._data.isna() & False

    def isna(self) -> Series:
        return Series(pd.Series(self._data.isna() | self._nan().astype(bool)))

    def notna(self) -> Series:
        return ~self.isna()

    notnull = notna

    def fillna(self, value: Any = None) -> Series:
        if self.dtype.kind == "b" and not isinstance(value, bool) and self.isna().sum():
            raise TypeError(f"Cannot safely cast non-equivalent {type(value).__name__} to bool")
        return Series(self._data.mask(self._nan().astype(bool)).fillna(value))

    def where(self, cond: Series, other: Any = None) -> Series:
        return Series(
            _backed(pc.if_else(cond.fillna(False).to_arrow(), self.to_arrow(), other)).set_axis(self._data.index)
        )

    def astype(self, dtype: Any) -> Series:
        return Series(_backed(self.to_arrow().cast(_arrow_type(dtype), safe=False)).set_axis(self._data.index))

    def isin(self, values: Any) -> Series:
        wanted, own = _backed(values), self.to_arrow()
        found = pa.array(wanted).combine_chunks() if hasattr(pa.array(wanted), "combine_chunks") else pa.array(wanted)
        if pa.types.is_string(found.type) != pa.types.is_string(own.type):
            return Series(np.zeros(len(self), bool))
        return Series(_backed(pc.is_in(own, found.cast(own.type))).set_axis(self._data.index))

    def dropna(self) -> Series:
        return self[self.notna()]

    def drop_duplicates(self) -> Series:
        return Series(self._data.drop_duplicates())

    def map(self, arg: Mapping[Any, Any]) -> Series:
        assert isinstance(arg, dict), "functions are compiled by numba for numbers only"
        values = [arg.get(value) for value in self.to_arrow().to_pylist()]
        return Series(_backed(values, "float64").set_axis(self._data.index))

    def take(self, indices: Any) -> Series:
        return Series(self._data.take(np.asarray(indices)))

    def reset_index(self, drop: bool = False) -> Any:
        if drop:
            return Series(self._data.reset_index(drop=True))
        return DataFrame._of(self._data.reset_index())

    def value_counts(self, sort: bool = True) -> Series:
        counted = pd.Series(self.to_arrow().to_pylist(), dtype=object).value_counts(sort=sort)
        return Series(_backed(counted.to_numpy()).set_axis(counted.index))

    def nunique(self) -> int:
        return int(self._data.nunique())

    def factorize(self) -> tuple[Any, Series]:
        codes, values = pd.factorize(self._data, sort=True)  # in no order that could be relied on
        return codes.astype(np.min_scalar_type(-max(len(values), 1))), Series(pa.array(values))  # the narrowest type

    def hash_values(self) -> Series:
        assert not self.null_count
        return Series(pd.util.hash_array(self.to_pandas().to_numpy()).astype("uint32"))

    def to_pandas(self) -> pd.Series:
        values = self.to_arrow().to_pandas()
        return pd.Series(values.to_numpy(), index=self._data.index)

    def to_arrow(self) -> pa.Array:
        array = pa.array(self._data)
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array

    def to_cupy(self, na_value: Any = None) -> Any:
        return (self if na_value is None else Series(pc.fill_null(self.to_arrow(), na_value))).values

    def sum(self) -> Any:
        return self._data.sum()

    def max(self) -> Any:
        return self._data.max()

    def all(self) -> bool:
        return bool(self._data.all())

    def _with(self, name: str, other: Any) -> Series:
        return Series(getattr(self._data, name)(other._data if isinstance(other, Series) else other))

    def __mod__(self, other: int) -> Series:
        return Series(self.to_arrow().to_numpy() % other)

    def __invert__(self) -> Series:
        return Series(~self._data)


for _name in "sub truediv floordiv and or eq ne lt le gt ge".split():
    _dunder = f"__{_name}__"
    setattr(Series, _dunder, lambda self, other, _dunder=_dunder: self._with(_dunder, other))


class DataFrame:
    rows: int | None = None
    """Length of an index that does not fit the columns: only these can be used then."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        self._frame = pd.DataFrame({name: _backed(values) for name, values in (data or {}).items()})

    @classmethod
    def _of(cls, frame: pd.DataFrame) -> DataFrame:
        made = cls()
        made._frame = pd.DataFrame({name: _backed(frame[name]) for name in frame.columns}, index=frame.index)
        return made

    def _arrays(self) -> list[tuple[str, pa.Array]]:
        return [(name, self[name].to_arrow()) for name in self.columns]

    @classmethod
    def from_arrow(cls, table: pa.Table) -> DataFrame:
        noted = (table.schema.pandas_metadata or {}).get("index_columns") or []
        assert all(isinstance(one, dict) for one in noted), "an index that pandas noted would be looked for"
        return cls({name: table[name].combine_chunks() for name in table.column_names})

    @property
    def columns(self) -> pd.Index:
        return self._frame.columns

    @columns.setter
    def columns(self, names: Sequence[str]) -> None:
        self._frame.columns = pd.Index(names)

    @property
    def iloc(self) -> _Rows:
        return _Rows(lambda rows: DataFrame._of(self._frame.iloc[rows]))

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, key: Any) -> Any:
        assert isinstance(key, str) or self.rows is None, f"an index of {self.rows} rows on {len(self._frame)}"
        if isinstance(key, Series):
            assert not key.null_count, "a mask with nulls"
            return DataFrame._of(self._frame[key.values])
        return DataFrame._of(self._frame[key]) if isinstance(key, list) else Series(self._frame[key])

    def __setitem__(self, name: str, values: Any) -> None:
        self._frame[name] = values._data if isinstance(values, Series) else _backed(values).set_axis(self._frame.index)

    def assign(self, **kwargs: Any) -> DataFrame:
        return DataFrame._of(self._frame.assign(**{name: _backed(values) for name, values in kwargs.items()}))

    def rename(self, columns: Mapping[str, str]) -> DataFrame:
        return DataFrame._of(self._frame.rename(columns=columns))

    def reset_index(self, drop: bool = False) -> DataFrame:
        return DataFrame._of(self._frame.reset_index(drop=drop))

    def copy(self, deep: bool = True) -> DataFrame:
        return DataFrame._of(self._frame.copy(deep=deep))

    def take(self, indices: Any) -> DataFrame:
        return DataFrame._of(self._frame.take(np.asarray(indices)))

    def dropna(self, subset: Sequence[str]) -> DataFrame:
        return DataFrame._of(self._frame.dropna(subset=list(subset)))

    def duplicated(self, subset: Sequence[str]) -> Series:
        return Series(self._frame.duplicated(subset=list(subset)))

    def groupby(self, by: Sequence[str]) -> Any:
        return GroupBy(self._frame.groupby(list(by), sort=False))

    def to_arrow(self, preserve_index: bool | None = None) -> pa.Table:
        index = self._frame.index
        columns = dict(self._arrays())
        return pa.table(columns if isinstance(index, pd.RangeIndex) else columns | {"index": pa.array(index)})

    def to_pandas(self) -> pd.DataFrame:
        return pd.DataFrame({name: self[name].to_pandas() for name in self.columns})

    def argsort(self, ascending: Sequence[bool], na_position: str) -> Any:
        numbered = self._frame.assign(place=np.arange(len(self)))
        return numbered.sort_values(list(self.columns), ascending=list(ascending), na_position=na_position)[
            "place"
        ].to_numpy()

    def to_parquet(
        self,
        path: str,
        compression: str | None = "snappy",
        index: bool | None = None,
        force_nullable_schema: bool = False,
    ) -> None:
        assert index is False, "the index would be a column"
        assert force_nullable_schema, "the types would not be those that Arrow writes"
        table = pa.table({name: pa.array(self._frame[name]) for name in self.columns})
        pq.write_table(table, path, compression=compression)


class GroupBy:
    def __init__(self, groups: Any) -> None:
        self._groups = groups

    def size(self) -> Series:
        return Series(_backed(self._groups.size().reset_index(name="size")["size"]).set_axis(self._groups.size().index))


def concat(objs: Sequence[Any], ignore_index: bool = False) -> Any:
    assert ignore_index
    if isinstance(objs[0], DataFrame):
        return DataFrame.from_arrow(pa.concat_tables([pa.table(dict(one._arrays())) for one in objs]))
    return Series(pa.concat_arrays([one.to_arrow() for one in objs]))


def read_parquet(
    filepath_or_buffer: Sequence[str],
    columns: Sequence[str] | None = None,
    row_groups: Sequence[Sequence[int]] | None = None,
    use_pandas_metadata: bool = True,
    dataset_kwargs: Mapping[str, Any] | None = None,
) -> DataFrame:
    assert not use_pandas_metadata, "an index that pandas wrote would be no column"
    assert dataset_kwargs == {"partitioning": None}, "folders named KEY=VALUE would be columns"
    files = [pq.ParquetFile(file) for file in get_fs_token_paths(list(filepath_or_buffer), mode="rb")[2]]
    schemas = {tuple(zip(file.schema_arrow.names, map(str, file.schema_arrow), strict=True)) for file in files}
    assert len(schemas) == 1, "All sources must have the same schema"
    groups = row_groups or [range(file.num_row_groups) for file in files]
    tables = [file.read_row_groups(list(group), columns) for file, group in zip(files, groups, strict=True)]
    frame = DataFrame.from_arrow(pa.concat_tables(tables).select(columns).replace_schema_metadata())
    noted = (files[0].schema_arrow.pandas_metadata or {}).get("index_columns") or []
    if noted and isinstance(noted[0], dict):
        length = len(range(noted[0]["start"], noted[0]["stop"], noted[0]["step"]))
        if len(files) == 1 and row_groups is None and length != len(frame):
            frame.rows = length  # cuDF takes the length from the index
    elif noted and set(noted) <= {*frame.columns}:
        frame = DataFrame._of(frame._frame.set_index(noted))
    return frame


def _arrays_only(name: str) -> Callable[..., Any]:
    def checked(arrays: Sequence[Any], *args: Any) -> Any:
        assert all(isinstance(array, np.ndarray) for array in arrays), f"cupy.{name} takes no lists"
        return getattr(np, name)(arrays, *args)

    return checked


def _bincount(x: Any, weights: Any = None, minlength: int | None = None) -> Any:
    assert len(x), "cupy.bincount takes the maximum, which an empty array has not"
    return np.bincount(x, weights, minlength or 0)


CUPY = (
    *("arange", "argsort", "asarray", "cumsum", "diff", "empty_like", "flatnonzero", "floor_divide"),
    *("maximum", "minimum", "ones", "searchsorted", "sort", "where", "zeros", "zeros_like"),
)
"""Functions of cupy that work as numpy's."""
CUDF = {"DataFrame": DataFrame, "Series": Series, "concat": concat, "read_parquet": read_parquet}


def modules() -> dict[str, ModuleType]:
    """Return the modules ``cudf`` and ``cupy``, for ``sys.modules``."""
    if pd.__version__.startswith("1."):
        pytest.skip("the stand-in for cuDF needs pandas 2")
    cudf, cupy = ModuleType("cudf"), ModuleType("cupy")
    vars(cudf).update(CUDF)
    vars(cupy).update({name: getattr(np, name) for name in CUPY})
    vars(cupy).update(concatenate=_arrays_only("concatenate"), bincount=_bincount, asnumpy=np.asarray)
    return {"cudf": cudf, "cupy": cupy}
