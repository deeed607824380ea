"""The users of a data folder as a session file: every user once, with all the events of the splits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, USER_ID

log = logging.getLogger(__name__)

ITEMS_COLUMN = "items"
_SPLITS = ("test", "valid", "train")
"""The longest histories first."""


@contextmanager
def session_file_of(data: Path, users: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield a parquet file with ``user_id`` and ``items`` (raw ids) of every user, or of some; removed at the end.

    A user's session is the row of the first of test, valid and train that has the user, with its target: all that is
    known of the user. Of several rows the last one counts. Unknown items are left out.

    Raises
    ------
    DataError
        No column of users, or a user that the folder lacks.
    """
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    known = pa.array(catalogue.ids_of(np.arange(FIRST_ITEM_ROW, catalogue.n_rows)), catalogue.items[ITEM_ID].type)
    found: dict[object, tuple[Sessions, int]] = {}
    for split in _SPLITS:
        if not any((data / split).glob("*.parquet")):
            continue
        sessions = Sessions.load(data / split, ()).known()
        if sessions.users is None:
            raise DataError(f"{data / split} has no column {USER_ID}", "the users", "run missrec etl with --user")
        rows = dict(zip(sessions.users.to_pylist(), range(len(sessions)), strict=True))
        found = {user: (sessions, row) for user, row in rows.items() if user not in found} | found
    if users is not None:
        by_text = {str(user): user for user in found}
        if unknown := [user for user in users if str(user) not in by_text]:
            raise DataError(f"{data} has no user {unknown[0]!r}", "ids of its users", "check --users")
        found = {by_text[str(user)]: found[by_text[str(user)]] for user in users}
    if not found:
        raise DataError(f"{data} has no user", "sessions written by missrec etl", "check --data")
    taken = Sessions.from_lists([sessions[row] for sessions, row in found.values()])
    items = pa.ListArray.from_arrays(
        pa.array(taken.offsets, pa.int32()), known.take(pa.array(taken.values - FIRST_ITEM_ROW))
    )
    with TemporaryDirectory(prefix="missrec-users-") as folder:
        file = Path(folder) / "users.parquet"
        pq.write_table(pa.table({USER_ID: pa.array([*found]), ITEMS_COLUMN: items}), file)
        yield file
