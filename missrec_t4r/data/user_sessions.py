"""Every user of a data folder once, with all the events of its splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError
from missrec_t4r.schema import USER_ID

SPLITS: Final = ("test", "valid", "train")
"""The longest histories first."""


def user_sessions(data: Path, splits: Sequence[str] = SPLITS) -> tuple[list[object], Sessions]:
    """Return the ids of all users, and one session per user without unknown items.

    A session is the row of the first of the splits that has the user, with its target: all that is known of the user.
    Of several rows the last one counts.

    Raises
    ------
    DataError
        No column of users, or no user.
    """
    found: dict[object, tuple[Sessions, int]] = {}
    for split in splits:
        if not any((data / split).glob("*.parquet")):
            continue
        sessions = Sessions.load(data / split, ()).known()
        if sessions.users is None:
            raise DataError(f"{data / split} has no column {USER_ID}", "the users", "run missrec etl with --user")
        rows = dict(zip(sessions.users.to_pylist(), range(len(sessions)), strict=True))
        found = {user: (sessions, row) for user, row in rows.items() if user not in found} | found
    if not found:
        raise DataError(f"{data} has no user", "sessions written by missrec etl", "check --data")
    return [*found], Sessions.from_lists([sessions[row] for sessions, row in found.values()])
