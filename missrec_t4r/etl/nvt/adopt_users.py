"""Number the sessions of users who have several, as the daily rows of one workflow, in the order of time.

The rows of a user in different splits are one session where one of them begins with the other and both begin at the
same time: splits hold the beginnings of a session, or the same row, as T4R's day folders do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from merlin.schema import Schema, Tags

from missrec_t4r.arrays import Ints
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.io.arrow_files import is_list, one_array
from missrec_t4r.schema import ITEM_LIST, SESSION_ID, USER_ID

BEGIN: Final = "__begin"
"""Column of the time at which a session begins, null where it is unknown; until the sessions are numbered."""
_TIMES: Final = ("timestamp", "time", "datetime", "date", "day")
_AGGREGATION: Final = re.compile(r"[-_](list|first|min)$")
"""End of names that NVTabular's Groupby gives to a session's times."""


@dataclass
class _Session:
    items: Ints
    begin: Any
    split: str
    """The last one in which it was found."""
    number: int = 0


def begins(table: pa.Table, schema: Schema) -> pa.Array:
    """Return when every session begins: from a column of times or days, by its name, or tagged ``TIME``; else null."""
    stems = {_AGGREGATION.sub("", name): name for name in reversed(table.column_names)}
    tagged = [name for name in schema.select_by_tag(Tags.TIME).column_names if name in table.column_names]
    column = next(iter([*(stems[stem] for stem in _TIMES if stem in stems), *tagged]), None)
    if column is None:
        return pa.nulls(table.num_rows)
    times = table[column].to_pylist()
    return pa.array([row[0] if row else None for row in times] if is_list(table[column].type) else times)


def number_sessions(tables: Mapping[str, pa.Table], findings: Findings) -> dict[str, pa.Table]:
    """Return the sessions of every split with ``session_id``, from 0 for each user, where a user has several.

    Parameters
    ----------
    tables : mapping of str to pyarrow.Table
        By split, in the order of time; with `BEGIN`, which the result lacks.
    findings : Findings
        Receives how many users have several, and in which order they are.
    """
    result = {split: table.drop_columns([BEGIN]) for split, table in tables.items()}
    users = [user for table in tables.values() for user in table[USER_ID].to_pylist()]
    if len(set(users)) == len(users):
        return result
    has_times = len({table[BEGIN].type for table in tables.values()} - {pa.null()}) == 1
    has_times &= not any(table[BEGIN].null_count for table in tables.values())
    by_user: dict[Any, list[_Session]] = {}
    found: dict[str, list[_Session]] = {}
    for split, table in tables.items():
        lists = one_array(table[ITEM_LIST])
        values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        begin = table[BEGIN].to_pylist() if has_times else [0] * table.num_rows
        found[split] = [
            _found(by_user.setdefault(user, []), values[offsets[row] : offsets[row + 1]], begin[row], split)
            for row, user in enumerate(table[USER_ID].to_pylist())
        ]
    if not (several := sum(len(sessions) > 1 for sessions in by_user.values())):
        return result
    order = "their times" if has_times else "files and rows: no column such as timestamp-first has their times"
    findings.add("users_with_several_sessions", several, f"users have several sessions, in the order of {order}")
    for sessions in by_user.values():
        for number, session in enumerate(sorted(sessions, key=lambda session: session.begin)):
            session.number = number
    return {
        split: table.append_column(SESSION_ID, pa.array([session.number for session in found[split]], pa.int64()))
        for split, table in result.items()
    }


def _found(sessions: list[_Session], items: Ints, begin: Any, split: str) -> _Session:
    """Return the one of a user's sessions that a row of a split belongs to; a new one if there is none."""
    same = [one for one in sessions if one.split != split and one.begin == begin and _is_beginning(one.items, items)]
    if not same:
        sessions.append(_Session(items, begin, split))
        return sessions[-1]
    session = max(same, key=lambda one: min(len(one.items), len(items)))
    session.items, session.split = max(session.items, items, key=len), split
    return session


def _is_beginning(one: Ints, other: Ints) -> bool:
    """Whether the shorter of two sessions is the beginning of the other."""
    length = min(len(one), len(other))
    return np.array_equal(one[:length], other[:length])
