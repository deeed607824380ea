"""Operators on events against NVTabular's own DifferenceLag, LambdaOp and Filter; alone and in workflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from merlin.io import Dataset
from merlin.schema import Tags
from nvtabular import Workflow, ops
from nvtabular.ops.operator import ColumnSelector

from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.nvt.event_ops import TIME_FEATURES, EventWeights, KCore, SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.etl.nvt.workflows import fit, transform_dataset
from tests.workflows.frame_kinds import FRAMES

MANY = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # tables are small as they are; shrinking whole workflows takes minutes
)
SOME = settings(MANY, max_examples=8)
COLUMNS = ColumnSelector(["user", "time", "item", "type"])


@st.composite
def events(draw: st.DrawFn, smallest: int = 1) -> pd.DataFrame:
    """Few users and many ties; times over two weeks, whole or broken, also before 1970."""
    size = draw(st.integers(smallest, 40))
    small = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    unit = draw(st.sampled_from([1, 1800, 40_000]))
    times = np.array(draw(st.lists(st.integers(-3, 30), min_size=size, max_size=size))) * unit
    users: Any = draw(small)
    return pd.DataFrame(
        {
            "user": [f"u{user}" for user in users] if draw(st.booleans()) else np.array(users, "int64"),
            "time": times.astype(draw(st.sampled_from(["int64", "float64"]))),
            "item": np.array(draw(small), "int64"),
            "type": draw(st.lists(st.sampled_from(["view", "cart", "buy", None]), min_size=size, max_size=size)),
            "position": np.arange(size),
        }
    )


def _stock_gap(frame: pd.DataFrame) -> pd.Series:
    """DifferenceLag wants sorted events, and leaves the first of a user empty."""
    ordered = frame.sort_values(["user", "time"], kind="stable")
    lag = ops.DifferenceLag(["user"]).transform(ColumnSelector(["time"]), ordered)["time_difference_lag_1"]
    return lag.fillna(0).reindex(frame.index)


@MANY
@given(events())
def test_the_gap_equals_difference_lag(frame: pd.DataFrame) -> None:
    ours = TimeFeatures("user", "time", ["gap"]).transform(COLUMNS, frame)
    assert list(ours) == [*COLUMNS.names, "gap"]
    pd.testing.assert_frame_equal(ours[COLUMNS.names], frame[COLUMNS.names])  # values, order and types pass
    pd.testing.assert_series_equal(ours["gap"], _stock_gap(frame), check_names=False)


@MANY
@given(events(), st.sampled_from([1, 1799, 1800, 90_000]))
def test_a_session_is_a_run_of_small_gaps(frame: pd.DataFrame, gap: int) -> None:
    ours = SessionGap("user", "time", gap).transform(COLUMNS, frame)["session_id"]
    ordered = frame.sort_values(["user", "time"], kind="stable").assign(pause=_stock_gap(frame) > gap)
    stock = ordered.groupby("user")["pause"].cumsum().reindex(frame.index)
    pd.testing.assert_series_equal(ours, stock.astype("int64"), check_names=False)


@MANY
@given(events(), st.sampled_from([0, 3600, -5 * 3600, 19_800]))
def test_hour_and_weekday_equal_a_lambda(frame: pd.DataFrame, clock: int) -> None:
    ours = TimeFeatures("user", "time", ["hour", "weekday"], clock=clock).transform(COLUMNS, frame)
    dates = ops.LambdaOp(lambda column: pd.to_datetime(column + clock, unit="s"))
    expected = dates.transform(ColumnSelector(["time"]), frame)["time"].dt
    pd.testing.assert_series_equal(ours["hour"], expected.hour.astype("int64"), check_names=False)
    pd.testing.assert_series_equal(ours["weekday"], expected.weekday.astype("int64"), check_names=False)


@MANY
@given(events(), st.sampled_from([0.0, 1.0, 2.5]))
def test_weights_equal_a_lambda_and_a_filter(frame: pd.DataFrame, other: float) -> None:
    table = {"view": 1.0, "buy": 3.0, "cart": 0.0}
    ours = EventWeights("type", table, other).transform(COLUMNS, frame)
    weigh = ops.LambdaOp(lambda column: column.map(table).fillna(other).astype("float32"))
    weights = weigh.transform(ColumnSelector(["type"]), frame)["type"]
    stock = ops.Filter(lambda df: df["weight"] > 0).transform(COLUMNS, frame[COLUMNS.names].assign(weight=weights))
    pd.testing.assert_frame_equal(ours, stock)


@SOME
@given(events(12), st.integers(1, 4), st.integers(1, 3))
def test_core_equals_filtering_until_nothing_changes(frame: pd.DataFrame, least: int, parts: int) -> None:
    core = Workflow(list(frame) >> KCore(["user", "item"], least)).fit(Dataset(frame, npartitions=parts))
    ours = transform_dataset(core, frame, parts, "user").sort_values("position").reset_index(drop=True)
    stock, before = frame, -1
    while before != len(stock):
        before = len(stock)
        for name in ("user", "item"):
            enough = ops.Filter(lambda df, name=name: df.groupby(name)[name].transform("size") >= least)
            stock = enough.transform(ColumnSelector(list(frame)), stock.copy()) if len(stock) else stock
    pd.testing.assert_frame_equal(ours, stock)


@SOME
@given(events(4), st.integers(1, 4))
def test_a_whole_workflow_does_not_depend_on_the_partitions(frame: pd.DataFrame, parts: int) -> None:
    frame["type"] = frame["type"].fillna("view")
    frame.loc[~frame["user"].duplicated(), "type"] = "view"  # NVTabular fails where no event of a partition is left

    def build() -> Workflow:
        numbered = list(frame) >> SessionGap("user", "time", 3000) >> TimeFeatures("user", "time", ["gap", "hour"])
        weighed = numbered >> EventWeights("type", {"cart": 0, "buy": 3})
        aggs = {"item": ["list", "count"], "gap": ["list"], "hour": ["list"], "weight": ["list"], "position": ["list"]}
        grouped = weighed >> SessionGroupby(["user", "session_id"], ["time", "position"], aggs, "-", selected_keys=True)
        return Workflow(
            grouped["user", "session_id", "gap-list", "position-list"] + (grouped["item-list"] >> SessionSlice(-3))
        )

    whole, torn = (transform_dataset(fit(build(), frame), frame, count, "user") for count in (1, parts))
    key = ["user", "session_id"]
    one, many = (table.sort_values(key).reset_index(drop=True) for table in (whole, torn))
    assert list(one) == list(many)
    for name in one:
        assert [_plain(value) for value in one[name]] == [_plain(value) for value in many[name]], name


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_schema_of_the_new_columns_and_of_those_that_pass() -> None:
    frame = pd.DataFrame({"user": ["a", "a"], "time": [1, 2], "type": ["x", "y"], "item": np.array([1, 2], "int32")})
    nodes = list(frame) >> SessionGap("user", "time", 5) >> TimeFeatures("user", "time", TIME_FEATURES, newest=2)
    schema = Workflow(nodes >> EventWeights("type", {}) >> KCore(["item"], 1)).fit(Dataset(frame)).output_schema
    stock = Workflow(list(frame) >> ops.Filter(lambda df: df["time"] > 0)).fit(Dataset(frame)).output_schema
    assert schema.column_names == [*frame, "session_id", *TIME_FEATURES, "weight"]
    assert all(schema[name] == stock[name] for name in frame)
    kinds = {name: (schema[name].dtype.name, set(schema[name].tags)) for name in schema.column_names[4:]}
    assert kinds == {
        "session_id": ("int64", {Tags.SESSION, Tags.ID}),
        "gap": ("float32", {Tags.CONTINUOUS}),
        "hour": ("int64", {Tags.CATEGORICAL}),
        "weekday": ("int64", {Tags.CATEGORICAL}),
        "recency": ("float32", {Tags.CONTINUOUS}),
        "weight": ("float32", {Tags.CONTINUOUS}),
    }


@pytest.mark.parametrize("kind", FRAMES)
def test_event_operators_on_every_kind_of_frame(kind: Callable[[pd.DataFrame], Any]) -> None:
    day = 86_400
    frame = kind(pd.DataFrame({"user": [1, 2, 1, 1], "time": [day, 0, 0, 60], "type": ["buy", "view", "cart", None]}))
    selector = ColumnSelector(["user", "time", "type"])
    assert _values(SessionGap("user", "time", 60).transform(selector, frame), "session_id") == [1, 0, 0, 0]
    timed = TimeFeatures("user", "time", TIME_FEATURES, newest=2 * day, clock=7200).transform(selector, frame)
    assert _values(timed, "gap") == [day - 60, 0, 0, 60]
    assert _values(timed, "hour") == [2, 2, 2, 2]
    assert _values(timed, "weekday") == [4, 3, 3, 3]  # Friday, then Thursday, 1970-01-01
    assert _values(timed, "recency") == pytest.approx([1, 2, 2, 2 - 60 / day])
    weighed = EventWeights("type", {"buy": 3, "cart": 0}, other=0.5).transform(selector, frame)
    assert (_values(weighed, "user"), _values(weighed, "weight")) == ([1, 2, 1], [3, 0.5, 0.5])


def _values(frame: Any, name: str) -> list[Any]:
    return list(frame[name].to_arrow().to_pylist() if hasattr(frame[name], "to_arrow") else frame[name])


def test_no_events_are_no_special_case() -> None:
    frame = pd.DataFrame({"user": pd.Series([], dtype=object), "time": np.array([], "int64"), "type": []})
    selector = ColumnSelector(["user"])
    assert list(SessionGap("user", "time", 5).transform(selector, frame)) == ["user", "session_id"]
    assert len(TimeFeatures("user", "time", newest=1).transform(selector, frame)) == 0
    assert len(EventWeights("type", {"a": 1}).transform(selector, frame)) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SessionGap("user", "time", 0), "session gap of 0; expected: a positive time"),
        (lambda: TimeFeatures("user", "time", ["day"]), r"time features \['day'\].*gap, hour, weekday, recency"),
        (lambda: EventWeights("type", {"a": -1}), "event weights .*'a': -1.*finite numbers"),
        (lambda: KCore(["user"], 0), "k-core of 0; expected: at least 1"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
