"""Pieces of the out-of-core engine on tables that are small enough to read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from missrec_t4r.etl.engine.reduce import _order_by_frequency
from missrec_t4r.etl.engine.sessionize import count_train_items, split_lengths, to_sessions
from missrec_t4r.etl.engine.user_state import find_users

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
    ordered, codes = _order_by_frequency(["buy", "view", "cart", "gone"], [2, 9, 2, 0], None)
    assert (ordered, codes) == (["view", "buy", "cart"], [4, 3, 5, 2])
    later, codes = _order_by_frequency(["return", "view", "cart"], [50, 1, 1], ordered)
    assert (later, codes) == (["view", "buy", "cart", "return"], [6, 3, 5])
