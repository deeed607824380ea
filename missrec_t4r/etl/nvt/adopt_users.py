"""Number the sessions of users who have several, as the daily rows of one workflow, in the order of time.

The rows of a user in different splits are one session where one of them begins with the other and both begin at the
same time: splits hold the beginnings of a session, or the same row, as T4R's day folders do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from merlin.schema import Schema, Tags

from missrec_t4r.arrays import Ints
from missrec_t4r.errors import SchemaError
from missrec_t4r.etl.arrow_columns import normal_time
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
    """Return when every session begins: from a column of times or days, by its name, or tagged ``TIME``; else null.

    Texts are read as times (`normal_time`): in their own order ``10/1/2024`` is before ``2/1/2024``.
    """
    stems = {_AGGREGATION.sub("", name): name for name in reversed(table.column_names)}
    tagged = [name for name in schema.select_by_tag(Tags.TIME).column_names if name in table.column_names]
    for column in [*(stems[stem] for stem in _TIMES if stem in stems), *tagged]:
        times = table[column]
        if is_list(times.type):
            firsts = (row[0] if row else None for row in pc.list_slice(times, 0, 1).to_pylist())
            times = pa.chunked_array([pa.array(firsts, times.type.value_type)])
        with suppress(SchemaError):  # it holds something else
            return one_array(normal_time(times, column))
    return pa.nulls(table.num_rows)


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
    without_time = sum(table[BEGIN].null_count for table in tables.values())
    by_user: dict[Any, list[_Session]] = {}
    alike: dict[tuple[Any, ...], list[_Session]] = {}  # of one user, time and first item
    found: dict[str, list[_Session]] = {}
    for split, table in tables.items():
        lists = one_array(table[ITEM_LIST])
        values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        begin = [0] * table.num_rows if without_time else table[BEGIN].to_pylist()
        found[split] = []
        for row, user in enumerate(table[USER_ID].to_pylist()):
            items = values[offsets[row] : offsets[row + 1]]
            key = user, begin[row], int(items[0])
            session = _found(alike.setdefault(key, []), items, split)
            if session is None:
                session = _Session(items, begin[row], split)
                alike[key].append(session)
                by_user.setdefault(user, []).append(session)
            found[split].append(session)
    if not (several := sum(len(sessions) > 1 for sessions in by_user.values())):
        return result
    unknown = f"{without_time:,} of {len(users):,} rows have no time, as in a column such as timestamp-first"
    order = f"files and rows: {unknown}" if without_time else "their times"
    findings.add("users_with_several_sessions", several, f"users have several sessions, in the order of {order}")
    for sessions in by_user.values():
        for number, session in enumerate(sorted(sessions, key=lambda session: session.begin)):
            session.number = number
    return {
        split: table.append_column(SESSION_ID, pa.array([session.number for session in found[split]], pa.int64()))
        for split, table in result.items()
    }


def _found(alike: list[_Session], items: Ints, split: str) -> _Session | None:
    """Return the one of such sessions that a row of a split belongs to."""
    same = [one for one in alike if one.split != split and _is_beginning(one.items, items)]
    if not same:
        return None
    session = max(same, key=lambda one: min(len(one.items), len(items)))
    session.items, session.split = max(session.items, items, key=len), split
    return session


def _is_beginning(one: Ints, other: Ints) -> bool:
    """Whether the shorter of two sessions is the beginning of the other."""
    length = min(len(one), len(other))
    return np.array_equal(one[:length], other[:length])
