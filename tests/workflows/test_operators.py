"""Our operators against NVTabular's own, on random tables, values, orders, ties and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from merlin.io import Dataset
from nvtabular import Workflow, ops
from nvtabular.ops.operator import ColumnSelector

from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.etl.nvt.workflows import fit, transform_dataset
from tests.workflows.frame_kinds import FRAMES, to_cudf

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
TORN = settings(MANY, max_examples=12, phases=[Phase.explicit, Phase.generate])
AGGS = {
    "item": ["list", "count", "first", "last"],
    "price": ["list", "first"],
    "note": ["list", "count"],
    "time": ["list", "last"],
}


@st.composite
def events(draw: st.DrawFn) -> pd.DataFrame:
    """Events with few users and times, so that both tie, and a position that tells ties apart."""
    size = draw(st.integers(1, 40))
    user = draw(st.sampled_from(["text", "int64", "int16", "nulls"]))
    users = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    names: Any = np.array(users, "int16" if user == "int16" else "int64")
    if user in ("text", "nulls"):
        names = [f"u{n}" if n or user == "text" else None for n in users]
    number = draw(st.sampled_from(["int8", "int32", "int64", "float32", "float64"]))
    small = st.lists(st.integers(0, 6), min_size=size, max_size=size)
    return pd.DataFrame(
        {
            "user": names,
            "time": np.array(draw(small), draw(st.sampled_from(["int64", "float64"]))),
            "position": draw(st.permutations(range(size))),
            "item": np.array(draw(small), "int64"),
            "price": np.array(draw(small), number),
            "note": draw(st.lists(st.sampled_from(["a", "b", None]), min_size=size, max_size=size)),
        }
    )


def _plain(value: Any) -> Any:
    """Lists and arrays as lists, every null as None."""
    if isinstance(value, list | np.ndarray):
        return [_plain(element) for element in value]
    return None if pd.isna(value) else value


def _same(ours: pd.DataFrame, stock: pd.DataFrame) -> None:
    assert set(ours) == set(stock)
    for name in stock:
        assert [_plain(value) for value in ours[name]] == [_plain(value) for value in stock[name]], name
        # The stock operator widens them on a detour through Python objects; pandas 1.5 also widens the keys of groups.
        if name.endswith(("first", "last")) or pd.__version__ < "2":
            assert ours[name].dtype.kind == stock[name].dtype.kind, name
        elif not isinstance(stock[name].iloc[0], list):
            assert ours[name].dtype == stock[name].dtype, name


@MANY
@given(events(), st.booleans())
def test_groupby_equals_stock(frame: pd.DataFrame, ascending: bool) -> None:
    if frame["user"].isna().all():
        return  # the stock operator cannot group nothing
    arguments = (["user"], ["time", "position"], AGGS, "-", ascending)
    selector = ColumnSelector(list(frame))
    ours, stock = (kind(*arguments).transform(selector, frame) for kind in (SessionGroupby, ops.Groupby))
    _same(ours, stock)


@MANY
@given(events())
def test_groupby_on_two_keys_and_all_columns_equals_stock(frame: pd.DataFrame) -> None:
    frame = frame.drop(columns="note").dropna()
    if frame.empty:
        return
    arguments = (["user", "item"], ["position"], ["list", "first"], "_")
    selector = ColumnSelector(list(frame))
    _same(*(kind(*arguments).transform(selector, frame) for kind in (SessionGroupby, ops.Groupby)))


@MANY
@given(
    st.lists(st.lists(st.integers(-5, 5), max_size=7), min_size=1, max_size=9),
    st.integers(-8, 8),
    st.none() | st.integers(-8, 8),
    st.sampled_from(["list", "int64", "float32", "text"]),
)
def test_slice_equals_stock(lists: list[list[int]], start: int, end: int | None, kind: str) -> None:
    if kind == "text":
        values: list[Any] = [[str(value) for value in row] for row in lists]
    else:
        values = lists if kind == "list" else [np.array(row, kind) for row in lists]
    frame = pd.DataFrame({"x": pd.Series(values, dtype=object)})
    selector = ColumnSelector(["x"])
    _same(*(op(start, end).transform(selector, frame) for op in (SessionSlice, ops.ListSlice)))


@MANY
@given(st.lists(st.lists(st.integers(-5, 5), max_size=6), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_padded_slice_equals_stock(lists: list[list[int]], size: int, from_end: bool) -> None:
    frame, selector = pd.DataFrame({"x": pd.Series(lists, dtype=object)}), ColumnSelector(["x"])
    start = -size if from_end else size
    _same(*(op(start, pad=True, pad_value=9).transform(selector, frame) for op in (SessionSlice, ops.ListSlice)))


@TORN
@given(events(), st.integers(1, 5), st.integers(1, 4))
def test_workflows_on_shuffled_partitions_equal_stock(frame: pd.DataFrame, parts: int, size: int) -> None:
    """The whole way of a data set: torn into partitions, `shuffle_by_keys`, grouped, cut; values, order and schema."""
    frame = frame.drop(columns="note").dropna()
    if frame.empty:
        return

    def made(groupby: type, cut: type) -> tuple[pd.DataFrame, Any]:
        aggs = {"item": ["list", "count"], "price": ["list"], "time": ["first", "last"], "position": ["list"]}
        grouped = list(frame) >> groupby(["user"], ["time", "position"], aggs, "-")
        lists = grouped["item-list", "price-list", "position-list"] >> cut(-size)
        workflow = Workflow(grouped["user", "item-count", "time-first", "time-last"] + lists)
        return transform_dataset(fit(workflow, frame), frame, parts, "user"), workflow.output_schema

    (ours, our_schema), (stock, their_schema) = made(SessionGroupby, SessionSlice), made(ops.Groupby, ops.ListSlice)
    _same(ours.reset_index(drop=True), stock.reset_index(drop=True))  # the order, too
    assert sorted(ours["user"]) == sorted(frame["user"].unique())  # nobody is torn
    assert set(our_schema.column_names) == set(their_schema.column_names)
    for name in their_schema.column_names:
        assert (our_schema[name].dtype, our_schema[name].tags) == (their_schema[name].dtype, their_schema[name].tags)


@pytest.mark.parametrize("kind", FRAMES)
def test_ties_keep_the_order_of_the_input(kind: Any) -> None:
    chance = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"user": chance.integers(0, 3, 600), "time": chance.integers(0, 2, 600), "item": np.arange(600)}
    )
    grouped = SessionGroupby("user", "time", {"item": "list"}).transform(ColumnSelector(list(frame)), kind(frame))
    for user, row in enumerate(
        grouped["item_list"].to_arrow().to_pylist() if kind is to_cudf else grouped["item_list"]
    ):
        mine = frame[frame.user == user]
        assert list(row) == [*mine[mine.time == 0].item, *mine[mine.time == 1].item]


@pytest.mark.parametrize("kind", FRAMES)
def test_group_and_slice_on_every_kind_of_frame(kind: Any) -> None:
    frame = kind(pd.DataFrame({"user": ["b", "a", "b", "b"], "time": [3, 1, 1, 2], "item": [30, 40, 10, 20]}))
    grouped = SessionGroupby("user", "time", {"item": ["list", "count"]}).transform(ColumnSelector(list(frame)), frame)
    last = SessionSlice(-2).transform(ColumnSelector(["item_list"]), grouped)["item_list"]
    rows = last.to_arrow().to_pylist() if kind is to_cudf else [list(row) for row in last]
    assert rows == [[40], [20, 30]]
    assert grouped["item_count"].to_numpy().tolist() == [1, 3]


def test_empty_partitions_and_null_rows() -> None:
    frame = pd.DataFrame(
        {"user": pd.Series([], dtype=object), "time": np.array([], "int64"), "item": np.array([], "int64")}
    )
    grouped = SessionGroupby("user", "time", {"item": ["list", "count"]}).transform(ColumnSelector(list(frame)), frame)
    assert (len(grouped), list(grouped)) == (0, ["user", "item_list", "item_count"])
    rows = pd.DataFrame({"x": pd.Series([None, [1, 2], []], dtype=object)})
    assert [list(row) for row in SessionSlice(-1).transform(ColumnSelector(["x"]), rows)["x"]] == [[], [2], []]
    nothing = pd.DataFrame({"x": pd.Series([None, []], dtype=object)})
    assert [list(row) for row in SessionSlice(-1).transform(ColumnSelector(["x"]), nothing)["x"]] == [[], []]


def test_schema_is_the_stock_one(tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": ["a", "a"], "time": [1, 2], "item": ["x", "y"], "price": np.array([1, 2], "float32")})

    def fitted(groupby: type, cut: type) -> Workflow:
        encoded = ["item"] >> ops.Categorify(out_path=str(tmp_path))
        aggs = {"item": ["list", "count"], "price": ["list"], "time": ["first"]}
        grouped = ["user", "time", "price"] + encoded >> groupby(["user"], ["time"], aggs, "-")
        lists = grouped["item-list", "price-list"] >> cut(-3)
        return Workflow(grouped["user", "item-count", "time-first"] + lists).fit(Dataset(frame))

    ours, stock = fitted(SessionGroupby, SessionSlice).output_schema, fitted(ops.Groupby, ops.ListSlice).output_schema
    assert sorted(ours.column_names) == sorted(stock.column_names)
    for name in stock.column_names:
        assert ours[name].dtype == stock[name].dtype, name  # with the shape: ragged lists, value counts
        assert (ours[name].tags, ours[name].properties) == (stock[name].tags, stock[name].properties), name
    assert (ours["item-list"].is_list, ours["item-list"].is_ragged, ours["item-list"].value_count.max) == (
        True,
        True,
        3,
    )


def test_an_unsupported_aggregation_names_the_stock_operator() -> None:
    with pytest.raises(ConfigError, match=r"\['mean'\].*nvtabular.ops.Groupby"):
        SessionGroupby("user", "time", {"price": "mean"})
