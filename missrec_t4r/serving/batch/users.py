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
from missrec_t4r.data.user_sessions import user_sessions
from missrec_t4r.errors import DataError
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, USER_ID

log = logging.getLogger(__name__)

ITEMS_COLUMN = "items"


@contextmanager
def session_file_of(data: Path, users: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield a parquet file with ``user_id`` and ``items`` (raw ids) of every user, or of some; removed at the end.

    A user's session is that of `user_sessions`: with all its events, the newest one where the user has several.

    Raises
    ------
    DataError
        No column of users, or a user that the folder lacks.
    """
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    known = pa.array(catalogue.ids_of(np.arange(FIRST_ITEM_ROW, catalogue.n_rows)), catalogue.items[ITEM_ID].type)
    everyone, taken = user_sessions(data)
    if users is not None:
        row_of = {str(user): row for row, user in enumerate(everyone)}
        if unknown := [user for user in users if str(user) not in row_of]:
            raise DataError(f"{data} has no user {unknown[0]!r}", "ids of its users", "check --users")
        chosen = [row_of[user] for user in dict.fromkeys(map(str, users))]
        everyone, taken = [everyone[row] for row in chosen], taken.take(chosen)
    items = pa.ListArray.from_arrays(
        pa.array(taken.offsets, pa.int32()), known.take(pa.array(taken.values - FIRST_ITEM_ROW))
    )
    with TemporaryDirectory(prefix="missrec-users-") as folder:
        file = Path(folder) / "users.parquet"
        pq.write_table(pa.table({USER_ID: pa.array(everyone), ITEMS_COLUMN: items}), file)
        yield file
