"""Pieces of ETL and out-of-core engine on tables that are small enough to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from missrec_t4r.etl.engine.job import Job, make_plan
from missrec_t4r.etl.engine.reduce import _map_values, _order_by_frequency
from missrec_t4r.etl.engine.sessionize import count_train_items, to_sessions
from missrec_t4r.etl.engine.user_state import find_users
from missrec_t4r.etl.event_arithmetic import core
from missrec_t4r.etl.quality.checks import Findings, text_to_integers
from missrec_t4r.etl.sources.standard import clean_events
from missrec_t4r.etl.splits import split_lengths
from missrec_t4r.etl.task import Run
from tests.workflows.tables import EVENTS, write

COMMON = {
    "split": "leave_one_out",
    "weights": None,
    "session_gap": 0.0,
    "time_features": [],
    "max_events": 0,
    "newest": 0,
}


@pytest.fixture
def state() -> pa.Table:
    """Two users: one with a pause of a hundred after the second of five events."""
    lists = {"item_id": [[3, 4, 5, 6, 7], [8, 9]], "timestamp": [[0, 10, 110, 120, 130], [5, 6]]}
    hashes = pa.array([7, 9], pa.uint64())
    columns = {f"{name}-list": pa.array(values, pa.list_(pa.int64())) for name, values in lists.items()}
    return pa.table({"user_id": ["ann", "ben"], "user_hash": hashes, **columns})


def items(sessions: pa.Table) -> list[list[int]]:
    return sessions["item_id-list"].to_pylist()


def test_a_cut_session_keeps_its_last_events(state: pa.Table) -> None:
    assert items(to_sessions(state, COMMON | {"max_events": 2})) == [[6, 7], [8, 9]]
    assert items(to_sessions(state, COMMON | {"max_events": 3})) == [[5, 6, 7], [8, 9]]


def test_a_pause_of_exactly_the_limit_ends_no_session(state: pa.Table) -> None:
    assert items(to_sessions(state, COMMON | {"session_gap": 100.0})) == [[3, 4, 5, 6, 7], [8, 9]]
    assert items(to_sessions(state, COMMON | {"session_gap": 99.0})) == [[3, 4], [5, 6, 7], [8, 9]]


def test_popularity_counts_what_training_sees(state: pa.Table) -> None:
    offsets, lengths = split_lengths(state, COMMON)
    assert {name: values.tolist() for name, values in lengths.items()} == {
        "train": [3, 2],
        "valid": [4, 0],
        "test": [5, 0],
    }
    assert count_train_items(state, offsets, lengths["train"]).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]


def test_users_with_equal_hashes_are_told_apart() -> None:
    stored = pa.table({"user_id": ["ann", "ben", "eve", "joe"], "user_hash": pa.array([5, 5, 5, 8], pa.uint64())})
    users, hashes = pa.array(["eve", "nobody", "ann", "joe", "late"]), np.array([5, 5, 5, 8, 9], np.uint64)
    assert find_users(stored, users, hashes).tolist() == [2, -1, 0, 3, -1]


def test_categories_are_numbered_by_frequency_and_keep_their_numbers() -> None:
    values, counts = ["buy", "view", "cart", "gone"], [2, 9, 2, 0]
    chunks: list[dict[str, Any]] = [{"categories": {"kind": {"values": values}}}, {"categories": {}}]
    maps: list[dict[str, list[int]]] = [{}, {}]
    ordered = _order_by_frequency(dict(zip(values, counts, strict=True)), ())
    _map_values(chunks, maps, {"kind": ordered}, 3)
    assert (ordered, maps) == (["view", "buy", "cart"], [{"kind": [4, 3, 5, 2]}, {"kind": []}])
    assert _order_by_frequency({"return": 50, "view": 1, "cart": 1}, ordered) == ["view", "buy", "cart", "return"]


def test_a_core_is_repeated_until_nothing_changes() -> None:
    # Sessions ab, abc, cd: d occurs once and goes, then the third user has one event, then c occurs once.
    users, items = np.array([0, 0, 1, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 2, 2, 3])
    for codes in ([users, items], [items, users]):
        assert core(codes, 2).tolist() == [True, True, True, True, False, False, False]


def test_a_text_with_a_leading_zero_is_no_integer() -> None:
    assert text_to_integers(pa.chunked_array([["12", None, "-7"]])).to_pylist() == [12, None, -7]
    for text in ("012", "+12", "1e3", "twelve"):
        assert text_to_integers(pa.chunked_array([["12", text]])) is None


def test_an_import_keeps_the_earliest_event_of_a_user_on_an_item() -> None:
    events = pd.DataFrame({"user_id": ["u", "u", "u"], "item_id": ["a", "b", "a"], "timestamp": [9, 5, 3]})
    cleaned = clean_events(events, Findings(), k_core=0)
    assert cleaned[["item_id", "timestamp"]].to_numpy().tolist() == [["a", 3], ["b", 5]]
    assert len(clean_events(events, Findings(), k_core=0, keep_repeats=True)) == 3


def test_more_partitions_than_there_are_numbers_for_are_not_made_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events, _ = write(tmp_path, EVENTS)
    settings = {"drop_columns": [], "categorical_columns": [], "event_weights": {}, "event_type_column": ""}
    settings |= {"session_gap": 0, "time_features": []}
    for partitions, made in ((3, 3), (70_000, 65_535)):
        names = {name: name for name in ("user_id", "item_id", "timestamp")}
        run = Run(files=[events], names=names, settings=settings, modality_files={})
        assert make_plan(Job(run, pa.table({"item_id": ["lamp"]}), {}, partitions)).partitions == made
    assert "65,535 partitions are made, the most that there can be, not 70,000" in caplog.text
    assert caplog.text.count("partitions are made") == 1
