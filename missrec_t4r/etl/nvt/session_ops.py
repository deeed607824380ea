"""Session grouping and list slicing as drop-in NVTabular operators, vectorised over sessions.

Stock ``Groupby`` and ``ListSlice`` call Python once per group and column; these operators sort once, find the session
boundaries and gather once. They subclass the stock operators, so selectors, schemas (value_count, ragged lists, tags,
dtypes) and saved workflows behave the same; `tests/workflows/test_operators.py` compares the results. The same code on
values and offsets serves pandas and cuDF (`etl/dataframe.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from nvtabular.ops import Groupby, ListSlice
from nvtabular.ops.groupby import _get_agg_dicts
from nvtabular.ops.operator import ColumnSelector

from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.dataframe import Adapter, Array, Frame, ListColumn, Series, adapter_of

AGGREGATIONS = ("list", "first", "last", "count")


class SessionGroupby(Groupby):
    """Group events into one row per key, with lists in the order of time.

    Ties keep the order of the input. Like the stock operator it works within one partition, so the data set must have
    been shuffled by the key before (``Dataset.shuffle_by_keys``), as `workflows.transform_events` does.

    Parameters
    ----------
    groupby_cols : str or list of str
        Key of a session, for example ``"user_id"``; events with a null key are dropped.
    sort_cols : str or list of str
        Columns that order the events, nulls last.
    aggs : mapping, list or str
        For each column any of ``"list"``, ``"first"``, ``"last"`` and ``"count"`` (of non-null values).
    name_sep : str
        Separator of column and aggregation in the name of an output column.
    ascending : bool
        False sorts from late to early; as in the stock operator, ``"first"`` is still the earliest event.
    selected_keys : bool
        Read the keys from the selected columns. The stock operator reads them from the data set, before all preceding
        operators: it can neither group by the session ids of `SessionGap` nor follow a filter.

    Examples
    --------
    >>> import pandas as pd
    >>> events = pd.DataFrame({"user_id": [7, 8, 7], "time": [5, 1, 2], "item_id": [30, 10, 20]})
    >>> sessions = SessionGroupby("user_id", "time", {"item_id": ["list"]}, name_sep="-")
    >>> sessions.transform(ColumnSelector(["user_id", "time", "item_id"]), events)["item_id-list"].tolist()
    [array([20, 30]), array([10])]
    """

    def __init__(
        self,
        groupby_cols: str | list[str],
        sort_cols: str | list[str] | None = None,
        aggs: str | list[str] | Mapping[str, str | list[str]] = "list",
        name_sep: str = "_",
        ascending: bool = True,
        selected_keys: bool = False,
    ) -> None:
        super().__init__(groupby_cols, sort_cols, aggs, name_sep, ascending)
        self.selected_keys = selected_keys
        names = {str(name) for names in self.conv_aggs.values() for name in names if isinstance(name, str)}
        if unknown := sorted(names - set(AGGREGATIONS)):
            raise ConfigError(
                f"aggregation {unknown}", f"any of {AGGREGATIONS}", "use nvtabular.ops.Groupby for others"
            )

    @property
    def dependencies(self) -> list[str]:
        """Return the columns that are read from the data set even if they are not selected."""
        return [] if self.selected_keys else self.groupby_cols

    def transform(self, col_selector: ColumnSelector, df: Frame) -> Frame:
        """Return one row per key, in the order of the keys."""
        adapter = adapter_of(df)
        events = df.dropna(subset=self.groupby_cols)
        directions = [True] * len(self.groupby_cols) + [self.ascending] * len(self.sort_cols)
        order = adapter.order(events, [*self.groupby_cols, *self.sort_cols], directions)  # [event]
        keys = {name: take(events[name], order) for name in self.groupby_cols}
        starts = adapter.xp.flatnonzero(leads(list(keys.values()), adapter))  # [session]
        offsets = adapter.xp.concatenate([starts, adapter.xp.asarray([len(order)])])  # [session + 1]
        columns = {name: take(key, starts) for name, key in keys.items()}
        for column, aggregation in self._aggregations(col_selector):
            ordered = take(events[column], order)
            columns[f"{column}{self.name_sep}{aggregation}"] = self._aggregate(aggregation, ordered, offsets, adapter)
        return type(df)(columns)

    def _aggregations(self, selector: ColumnSelector) -> Iterator[tuple[str, str]]:
        lists, others = _get_agg_dicts(self.groupby_cols, self.list_aggs, self.conv_aggs, selector)
        for column in selector.names:
            names = {*lists.get(column, []), *others.get(column, [])}
            yield from ((column, name) for name in AGGREGATIONS if name in names)

    def _aggregate(self, name: str, ordered: Series, offsets: Array, adapter: Adapter) -> Series:
        if name == "list":
            return adapter.build(ListColumn(ordered, offsets))
        if name == "count":
            before = adapter.xp.concatenate([adapter.xp.zeros(1, int), adapter.xp.cumsum(ordered.notnull().values)])
            return type(ordered)(adapter.xp.diff(before[offsets]).astype("int32"))  # [event + 1] -> [session]
        # With descending order the earliest event of a session stands last.
        earliest_leads = (name == "first") == self.ascending
        return take(ordered, offsets[:-1] if earliest_leads else offsets[1:] - 1)


class SessionSlice(ListSlice):
    """Slice every row of list columns like a Python list: ``SessionSlice(-50)`` keeps the last 50 elements.

    Parameters
    ----------
    start, end : int
        As in stock ``ListSlice``: a positive ``start`` alone is the end ("the first ten").
    pad : bool
        Pad short rows at their end to the longest possible length.
    pad_value : float
        Padding value; cast to the type of the column.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = pd.DataFrame({"item_id": [[1, 2, 3], [4]]})
    >>> SessionSlice(-2).transform(ColumnSelector(["item_id"]), rows)["item_id"].tolist()
    [array([2, 3]), array([4])]
    """

    def transform(self, col_selector: ColumnSelector, df: Frame) -> Frame:
        """Return the selected columns, sliced."""
        adapter = adapter_of(df)
        return type(df)({name: self._slice(df[name], adapter) for name in col_selector.names})

    def _slice(self, rows: Series, adapter: Adapter) -> Series:
        xp, column = adapter.xp, adapter.take_apart(rows)
        sizes = xp.diff(column.offsets)  # [row]
        begin, finish = (_clamp(bound, sizes, xp) for bound in (self.start, self.end))
        lengths = xp.maximum(finish - begin, 0)  # [row]
        starts = column.offsets[:-1] + begin  # [row]
        if not self.pad:
            index, offsets = ragged_index(starts, lengths, xp)
            return adapter.build(ListColumn(take(column.values, index), offsets))
        steps = xp.arange(self.max_elements)
        # [row, max_elements], flattened; padding points behind the last value, where the padding value is appended.
        index = xp.where(steps < lengths[:, None], starts[:, None] + steps, len(column.values)).ravel()
        filled = adapter.append(column.values, self.pad_value)
        return adapter.build(ListColumn(take(filled, index), xp.arange(len(sizes) + 1) * self.max_elements))


def ragged_index(starts: Array, lengths: Array, xp: Any = np) -> tuple[Array, Array]:
    """Return the indices ``starts[i] .. starts[i] + lengths[i]`` of all rows in one array, and its offsets.

    Examples
    --------
    >>> index, offsets = ragged_index(np.array([0, 10]), np.array([2, 3]))
    >>> index.tolist(), offsets.tolist()
    ([0, 1, 10, 11, 12], [0, 2, 5])
    """
    offsets = xp.concatenate([xp.zeros(1, int), xp.cumsum(lengths)])
    positions = xp.arange(int(offsets[-1]))
    row = xp.searchsorted(offsets[1:], positions, side="right")  # [element]: the row that contains it
    return starts[row] + positions - offsets[row], offsets


def _clamp(bound: int, sizes: Array, xp: Any) -> Array:
    """Return a slice bound as an index into rows of these sizes, by Python's rules, [row]."""
    longest = int(sizes.max()) if len(sizes) else 0
    bound = max(min(bound, longest), -longest)  # stock ListSlice writes "no end" as the largest int64: avoid overflow
    return xp.minimum(xp.maximum(sizes * 0 + bound if bound >= 0 else sizes + bound, 0), sizes)


def take(column: Series, index: Array) -> Series:
    """Return the rows at ``index``, numbered anew."""
    return column.take(index).reset_index(drop=True)


def leads(keys: Sequence[Series], adapter: Adapter) -> Array:
    """Return a mask of sorted keys, True where a row's differ from those before it, [row]."""
    changed = adapter.xp.zeros(len(keys[0]), bool)
    changed[:1] = True
    for key in keys:
        values = key.iloc[1:].reset_index(drop=True) != key.iloc[:-1].reset_index(drop=True)
        changed[1:] |= adapter.xp.asarray(values.fillna(True).values).astype(bool)
    return changed
