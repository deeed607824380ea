"""What is known of every user of a data folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.user_sessions import user_sessions
from missrec_t4r.schema import ITEM_LIST, SESSION_ID, USER_ID


def test_the_newest_of_a_users_sessions_counts_in_whatever_split_it_is(tmp_path: Path) -> None:
    """A session of less than three events is in the training split alone, and may be newer than one of test."""
    splits = {
        "train": [("a", 0, [4, 5]), ("a", 1, [6, 7]), ("b", 0, [8, 9])],
        "valid": [("a", 0, [4, 5, 8])],
        "test": [("a", 0, [4, 5, 8, 2, 9])],
    }
    for split, rows in splits.items():
        (tmp_path / split).mkdir()
        columns = zip((USER_ID, SESSION_ID, ITEM_LIST), map(list, zip(*rows, strict=True)), strict=True)
        pq.write_table(pa.table(dict(columns)), tmp_path / split / "part_0.parquet")
    users, sessions = user_sessions(tmp_path)
    assert dict(zip(users, map(list, sessions), strict=True)) == {"a": [6, 7], "b": [8, 9]}
