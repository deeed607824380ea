"""NVTabular operators on events before grouping: sessions by inactivity, k-core, event-type weights, time features.

All keep the stock schema contract: selected columns are passed through, new columns are added with dtype and tags,
events keep their order. `SessionGap` and `TimeFeatures` depend on a user's other events, so, like the stock
``DifferenceLag``, they need all events of a user in one partition (``Dataset.shuffle_by_keys``); unlike it they need
no sorting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np
import pandas as pd
from merlin.schema import ColumnSchema, Schema, Tags
from nvtabular.ops import Operator
from nvtabular.ops.operator import ColumnSelector
from nvtabular.ops.stat_operator import StatOperator

from missrec_t4r.errors import ConfigError
from missrec_t4r.etl import event_arithmetic
from missrec_t4r.etl.dataframe import Adapter, Array, Frame, adapter_of
from missrec_t4r.etl.event_settings import CLOCK, TIME_FEATURES
from missrec_t4r.etl.nvt.session_ops import leads, take


class AddsColumns(Operator):
    """Base of operators that pass the selected columns through and add new ones.

    Their input must be among the selected columns: Merlin reads dependencies from the data set, before any filter.
    """

    def sources(self) -> list[str]:
        """Return the input columns of the new columns."""
        return []

    def added(self) -> dict[str, ColumnSchema]:
        """Return the new columns."""
        return {}

    def column_mapping(self, col_selector: ColumnSelector) -> dict[str, list[str]]:
        """Return the input columns of each output column."""
        passed = {name: [name] for name in col_selector.names}
        return passed | {name: self.sources() for name in self.added()}

    def compute_column_schema(self, col_name: str, input_schema: Schema) -> ColumnSchema:
        """Return the schema of a new column, or of one that is passed through."""
        added = self.added()
        return added[col_name] if col_name in added else super().compute_column_schema(col_name, input_schema)


class SessionGap(AddsColumns):
    """Number the sessions of a user: inactivity longer than ``gap`` starts the next session.

    Parameters
    ----------
    key : str
        Column of the user.
    time : str
        Column of the time.
    gap : float
        Longest inactivity within a session, in the unit of the time column (seconds).
    name : str
        New column, int64, counted from 0 for every user.

    Examples
    --------
    >>> events = pd.DataFrame({"user": [1, 1, 1, 2], "time": [0, 50, 10, 0]})
    >>> SessionGap("user", "time", 30).transform(ColumnSelector(["user", "time"]), events)["session_id"].tolist()
    [0, 1, 0, 0]
    """

    def __init__(self, key: str, time: str, gap: float, name: str = "session_id") -> None:
        if not gap > 0:
            raise ConfigError(f"a session gap of {gap}", "a positive time, for example 30m")
        super().__init__()
        self.key, self.time, self.gap, self.name = key, time, gap, name

    def sources(self) -> list[str]:
        """Return the input columns of the new columns."""
        return [self.key, self.time]

    def added(self) -> dict[str, ColumnSchema]:
        """Return the schema of the session number."""
        return {self.name: ColumnSchema(self.name, dtype="int64", tags=[Tags.SESSION_ID, Tags.SESSION])}

    def transform(self, col_selector: ColumnSelector, df: Frame) -> Frame:
        """Return the events with their session numbers."""
        adapter = adapter_of(df)
        order, first, times = _by_time(df, self.key, self.time, adapter)
        elapsed = event_arithmetic.gaps(times, first, adapter.xp)
        numbers = event_arithmetic.session_numbers(elapsed, first, self.gap, adapter.xp)
        return _with(df, col_selector, {self.name: _unsorted(numbers, order, adapter)})


class TimeFeatures(AddsColumns):
    """Add features of the event time: ``gap``, ``hour``, ``weekday``, ``recency``.

    None of them depends on a later event of the user, so the features of a session's prefix are those of its time.

    Parameters
    ----------
    key, time : str
        Columns of the user and of the time in unix seconds.
    features : sequence of str
        ``gap``: seconds since the user's previous event, 0 for the first, float32. ``hour``: 0 to 23, int64.
        ``weekday``: Monday = 0, int64. ``recency``: days before ``newest``, float32.
    newest : float
        Reference of ``recency``: the newest event of the data when the workflow is built, fixed from then on.
    clock : float
        Offset of the shop's local time from UTC in seconds.

    Examples
    --------
    >>> events = pd.DataFrame({"user": [1, 1], "time": [7200, 3600]})
    >>> timed = TimeFeatures("user", "time", ["gap", "hour"])
    >>> timed.transform(ColumnSelector(["user", "time"]), events).to_dict("list")
    {'user': [1, 1], 'time': [7200, 3600], 'gap': [3600.0, 0.0], 'hour': [2, 1]}
    """

    def __init__(
        self, key: str, time: str, features: Sequence[str] = TIME_FEATURES, newest: float = 0.0, clock: float = 0.0
    ) -> None:
        if unknown := [name for name in features if name not in TIME_FEATURES]:
            raise ConfigError(f"time features {unknown}", f"some of {', '.join(TIME_FEATURES)}")
        super().__init__()
        self.key, self.time, self.features = key, time, list(features)
        self.newest, self.clock = newest, clock

    def sources(self) -> list[str]:
        """Return the input columns of the new columns."""
        return [self.key, self.time]

    def added(self) -> dict[str, ColumnSchema]:
        """Return the schemas of the selected features."""
        category, number = ("int64", Tags.CATEGORICAL), ("float32", Tags.CONTINUOUS)
        kinds = {name: category if name in CLOCK else number for name in self.features}
        return {name: ColumnSchema(name, dtype=dtype, tags=[tag]) for name, (dtype, tag) in kinds.items()}

    def transform(self, col_selector: ColumnSelector, df: Frame) -> Frame:
        """Return the events with their time features."""
        adapter = adapter_of(df)
        times = adapter.array(df[self.time])
        columns: dict[str, Array] = {}
        for name in self.features:
            if name == "gap":
                order, first, ordered = _by_time(df, self.key, self.time, adapter)
                elapsed = event_arithmetic.gaps(ordered, first, adapter.xp)
                columns[name] = _unsorted(elapsed.astype("float32"), order, adapter)
            elif name == "recency":
                columns[name] = event_arithmetic.recencies(times, self.newest)
            else:
                kernel = event_arithmetic.hours if name == "hour" else event_arithmetic.weekdays
                columns[name] = kernel(times, self.clock, adapter.xp)
        return _with(df, col_selector, columns)


class EventWeights(AddsColumns):
    """Add the weight of the event's type, and drop events of weight 0.

    Parameters
    ----------
    column : str
        Column of the event type.
    weights : mapping of str or int to float
        ``{"view": 1, "purchase": 3}``.
    other : float
        Weight of all other types and of events without a type.
    name : str
        New column, float32.

    Examples
    --------
    >>> events = pd.DataFrame({"item": [1, 2, 3], "type": ["view", "return", "buy"]})
    >>> weigh = EventWeights("type", {"buy": 3, "return": 0})
    >>> weigh.transform(ColumnSelector(["item", "type"]), events).to_dict("list")
    {'item': [1, 3], 'type': ['view', 'buy'], 'weight': [1.0, 3.0]}
    """

    def __init__(self, column: str, weights: Mapping[Any, float], other: float = 1.0, name: str = "weight") -> None:
        if wrong := {kind: weight for kind, weight in {**weights, "other": other}.items() if not 0 <= weight < np.inf}:
            raise ConfigError(f"event weights {wrong}", "finite numbers of at least 0")
        super().__init__()
        self.column, self.weights, self.other, self.name = column, dict(weights), other, name

    def sources(self) -> list[str]:
        """Return the input columns of the new columns."""
        return [self.column]

    def added(self) -> dict[str, ColumnSchema]:
        """Return the schema of the weight."""
        return {self.name: ColumnSchema(self.name, dtype="float32", tags=[Tags.CONTINUOUS])}

    def transform(self, col_selector: ColumnSelector, df: Frame) -> Frame:
        """Return the events of positive weight, with their weights."""
        weights = df[self.column].map(self.weights).astype("float32").fillna(self.other)
        result = _with(df, col_selector, {self.name: weights.values})
        return result[result[self.name] > 0].reset_index(drop=True)


class KCore(StatOperator):
    """Drop users and items with fewer than ``least`` events, repeatedly until all have as many (k-core).

    The core is computed over all partitions when the workflow is fitted; events of users and items outside it, new ones
    included, are dropped.

    Parameters
    ----------
    columns : sequence of str
        For example ``["user_id", "item_id"]``, among the selected columns; events with a null in them are dropped.
    least : int
        Minimum number of events of each.
    """

    def __init__(self, columns: Sequence[str], least: int) -> None:
        if least < 1:
            raise ConfigError(f"a k-core of {least}", "at least 1")
        super().__init__()
        self.columns, self.least = list(columns), least
        self.survivors: dict[str, pd.Series] = {}

    def fit(self, col_selector: ColumnSelector, ddf: Any) -> Any:  # the stock signature
        """Return the delayed computation of the core: combinations are counted per partition, then joined."""
        parts = [dask.delayed(_combinations)(part, self.columns) for part in ddf[self.columns].to_delayed()]
        return dask.delayed(_survivors)(parts, self.columns, self.least)

    def fit_finalize(self, dask_stats: dict[str, pd.Series]) -> None:
        """Store the core."""
        self.survivors = dask_stats

    def clear(self) -> None:
        """Remove the fitted core."""
        self.survivors = {}

    def transform(self, col_selector: ColumnSelector, df: Frame) -> Frame:
        """Return the selected columns of the events in the core."""
        keep = df[self.columns[0]].isin(self.survivors[self.columns[0]])
        for name in self.columns[1:]:
            keep &= df[name].isin(self.survivors[name])
        return df[keep][col_selector.names].reset_index(drop=True)


def _by_time(frame: Frame, key: str, time: str, adapter: Adapter) -> tuple[Array, Array, Array]:
    """Return the sorting permutation, a mask of each key's first event, and the sorted times, each [event]."""
    order = adapter.order(frame, [key, time], [True, True])
    return order, leads([take(frame[key], order)], adapter), adapter.array(frame[time])[order]


def _unsorted(values: Array, order: Array, adapter: Adapter) -> Array:
    """Return sorted values in the order of the input, [event]."""
    unsorted = adapter.xp.empty_like(values)
    unsorted[order] = values
    return unsorted


def _with(frame: Frame, selector: ColumnSelector, added: Mapping[str, Array]) -> Frame:
    result = frame[selector.names].copy(deep=False)
    for name, values in added.items():
        result[name] = values
    return result


def _combinations(part: Frame, columns: list[str]) -> pd.DataFrame:
    counted = part.dropna(subset=columns).groupby(columns).size().reset_index()
    counted.columns = [*columns, "events"]
    return counted.to_pandas() if hasattr(counted, "to_pandas") else counted  # small beside the events: counted once


def _survivors(parts: Sequence[pd.DataFrame], columns: list[str], least: int) -> dict[str, pd.Series]:
    counted = pd.concat(parts, ignore_index=True)
    codes = [pd.factorize(counted[name])[0] for name in columns]
    alive = event_arithmetic.core(codes, least, counted["events"].to_numpy())
    return {name: counted[name][alive].drop_duplicates().reset_index(drop=True) for name in columns}
