"""Every user, or every session, of a data folder once, with all the events of its splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from missrec_t4r.arrays import Ints
from missrec_t4r.data.session_files import read_rows, row_files
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import LIST_SUFFIX, SESSION_ID, USER_ID

_SPLITS: Final = ("test", "valid", "train")
"""The longest rows of a session first."""
_REPORT_FILE: Final = "etl.json"

Key = tuple[Any, ...]
"""What tells a session from others: the user's id, and the number of the session where a user has several."""


def user_sessions(data: Path) -> tuple[list[object], Sessions]:
    """Return the ids of all users, and one session per user without unknown items.

    A session is the row of the first of test, valid and train that has it, with its target. Of several sessions of a
    user (``missrec etl --session-gap``) the newest one counts; those of an adopted workflow, whose own rule has made
    several rows of a user's events, are joined in the order of time.

    Raises
    ------
    DataError
        No column of users, no user, or several rows of one session in a split.
    """
    row_of: dict[Key, tuple[Sessions, int]] = {}
    for sessions, keys in _splits_with_users(data, _SPLITS):
        known = sessions.known()
        rows = {key: (known, row) for row, key in enumerate(keys)}
        row_of = {key: row for key, row in rows.items() if key not in row_of} | row_of
    if not row_of:
        raise DataError(f"{data} has no user", "sessions written by missrec etl", "check --data")
    of_user: dict[object, list[Ints]] = {}
    for key in sorted(row_of, key=lambda key: key[1:]):
        sessions, row = row_of[key]
        of_user.setdefault(key[0], []).append(sessions[row])
    is_joined = (data / _REPORT_FILE).is_file() and "adopted" in read_json(data / _REPORT_FILE)
    lists = [np.concatenate(own) if is_joined else own[-1] for own in of_user.values()]
    return [*of_user], Sessions.from_lists(lists)


def whole_sessions(data: Path, splits: Sequence[str] = _SPLITS) -> Sessions:
    """Return every session once, with its target and without unknown items.

    A user has one session, or several that the column ``session_id`` numbers (``missrec etl --session-gap``).

    Raises
    ------
    DataError
        No column of users; or several rows of one session in a split.
    """
    rows = [(sessions, keys) for sessions, keys in _splits_with_users(data, splits)]
    if not rows:
        raise DataError(f"{data} has no sessions", "splits written by missrec etl", "check --data")
    return longest_rows(rows).known()


def keyed_sessions(split: Path, features: Sequence[str] = ()) -> tuple[Sessions, list[Key]]:
    """Return the rows of a split, with those of ``features`` that it has, and their keys.

    Rows of a split without users have their numbers as keys.
    """
    names = pq.read_schema(row_files(split)[0]).names
    key_columns = [name for name in (USER_ID, SESSION_ID) if name in names]
    table = read_rows(split, key_columns)
    keys: list[Key] = list(zip(*(table[name].to_pylist() for name in key_columns), strict=True))
    sessions = Sessions.load(split, [name for name in features if name + LIST_SUFFIX in names])
    return sessions, keys or [(row,) for row in range(len(sessions))]


def longest_rows(splits: Sequence[tuple[Sessions, Sequence[Key]]]) -> Sessions:
    """Return the longest row of every session of splits and keys; its other rows are the beginnings of that one."""
    best: dict[Key, tuple[int, int, int]] = {}  # key -> length, split, row
    for index, (split, keys) in enumerate(splits):
        for row, (key, length) in enumerate(zip(keys, split.lengths.tolist(), strict=True)):
            if key not in best or length > best[key][0]:
                best[key] = (length, index, row)
    selected = []
    for index, (split, _) in enumerate(splits):
        rows = [row for _, split_index, row in best.values() if split_index == index]
        selected.append(split.take(rows))
    return Sessions.concatenate(selected)


def _splits_with_users(data: Path, splits: Sequence[str]) -> Iterator[tuple[Sessions, list[Key]]]:
    """Yield the sessions and their keys of every split that has rows.

    Raises
    ------
    DataError
        A split has no users; or several rows of one session, of which nobody knows what they have in common.
    """
    for split in (data / name for name in splits):
        if row_files(split):
            sessions, keys = keyed_sessions(split)
            if sessions.users is None:
                raise DataError(f"{split} has no column {USER_ID}", "the users", "run missrec etl with --user-column")
            if (n_different := len(set(keys))) < len(keys):
                raise DataError(
                    f"{split} has {len(keys):,} rows of {n_different:,} users or sessions",
                    f"one row per user, or a column {SESSION_ID} that numbers the sessions of a user",
                    "run `missrec catalogue adopt` again, which adds it, or give sessions ids of their own as users",
                )
            yield sessions, keys
