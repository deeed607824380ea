"""Sessions as flat arrays: bounds, users and event features move together, whatever is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.data.sessions import Sessions, target_counts
from missrec_t4r.io.atomic import replace_dir

LISTS = [[1, 3, 2, 4, 5], [2], [6, 1, 7]]
SESSIONS = Sessions(
    np.concatenate(LISTS),
    np.array([0, 5, 6, 9]),
    {"price": np.arange(9) * 1.5},
    pa.array(["ann", "ben", "eve"]),
)


def lists(sessions: Sessions) -> list[list[int]]:
    return [session.tolist() for session in sessions]


def test_unknown_items_leave_their_own_session_alone() -> None:
    known = SESSIONS.known()
    assert lists(known) == [[3, 4, 5], [], [6, 7]]
    assert known.features["price"].tolist() == [1.5, 4.5, 6.0, 9.0, 12.0]
    assert known.users.to_pylist() == ["ann", "ben", "eve"]


def test_a_history_ends_before_its_target() -> None:
    histories, targets = SESSIONS.split_last()
    assert (lists(histories), targets.tolist()) == ([[1, 3, 2, 4], [], [6, 1]], [5, 2, 7])
    assert histories.features["price"].tolist() == [0.0, 1.5, 3.0, 4.5, 9.0, 10.5]


def test_chosen_sessions_bring_their_user_and_features_in_the_asked_order() -> None:
    chosen = SESSIONS.take([2, 0])
    assert (lists(chosen), chosen.users.to_pylist()) == ([[6, 1, 7], [1, 3, 2, 4, 5]], ["eve", "ann"])
    assert chosen.features["price"].tolist() == [9.0, 10.5, 12.0, 0.0, 1.5, 3.0, 4.5, 6.0]
    part = SESSIONS.slice(1, 3)
    assert (lists(part), part.features["price"].tolist()) == ([[2], [6, 1, 7]], [7.5, 9.0, 10.5, 12.0])


def test_the_last_items_and_their_features_are_padded_alike() -> None:
    assert SESSIONS.padded([0, 1, 2], 3).tolist() == [[2, 4, 5], [2, 0, 0], [6, 1, 7]]
    assert SESSIONS.padded_features([0, 1, 2], 3)["price"].tolist() == [[3, 4.5, 6], [7.5, 0, 0], [9, 10.5, 12]]


def test_every_event_but_the_first_of_a_session_is_a_training_target() -> None:
    assert target_counts(Sessions.from_lists([[3, 4, 3], [], [5], [4, 4]]), 6).tolist() == [0, 0, 0, 1, 2, 0]


def test_sessions_of_a_folder_that_is_replaced_meanwhile_are_of_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(data: Path, item: int) -> None:
        (data / "train").mkdir(parents=True)
        for part in range(2):
            pq.write_table(pa.table({"item_id-list": [[item, item]]}), data / "train" / f"part_{part}.parquet")

    data, real, read = tmp_path / "data", pq.read_table, []
    write(data, 3)

    def replaced_afterwards(file: Path, **options: Any) -> pa.Table:
        table = real(file, **options)
        if not read:
            with replace_dir(data) as folder:
                write(folder, 4)
        read.append(file)
        return table

    monkeypatch.setattr(pq, "read_table", replaced_afterwards)
    assert lists(Sessions.load(data / "train")) == [[4, 4], [4, 4]]
