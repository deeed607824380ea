"""Data-quality checks: findings are counted and reported; an error is raised only where the result would be wrong.

`clean_events` reduces an interaction table to user_id, item_id, timestamp and further event columns. Findings are
written to etl.json: rows with nulls are dropped, everything else is kept as it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl.arrow_columns import as_category, as_int64, text_to_integers
from missrec_t4r.etl.dataframe import Frame, Series, adapter_of
from missrec_t4r.io.arrow_files import with_column
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

SECONDS = (94_694_400, 4_102_444_800)
"""From 1973 to 2100 as unix seconds."""
MILLISECONDS = 631_152_000_000
"""1990 in milliseconds; read as seconds it would be after the year 9999."""
MANY_EVENTS = 10_000
"""More events of one user than a person makes: reported as a finding; --max-events cuts the sessions."""
KEYS = (USER_ID, ITEM_ID, TIMESTAMP)
_ROW_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
"""Names that pandas gives an unnamed row index: in parquet, in a csv that was read and written again, in csv."""


@dataclass(frozen=True)
class Finding:
    """One data-quality finding."""

    check: str
    """Short name, stable across versions."""
    count: int
    """Number of affected rows, items or users."""
    message: str
    """What was done about it, or what the user can do."""


CHECKS = frozenset(
    """
    null_user_id null_item_id null_timestamp null_feature null_items time_negative time_out_of_range time_backwards
    duplicate_events duplicate_items very_long_users orphan_events orphan_items no_item_matches ids_as_text not_utf8
    number_as_text event_type_absent event_column_left_out column_name_taken row_index changed_items vectors_kept
    list_column_left_out sessions_of_one_item empty_sessions unknown_events items_without_line new_items
    numbered_sessions users_with_several_sessions categories_as_codes
    """.split()
)
"""Names of the findings of a data folder, those that a quality gate may bound."""
_CHECKS_OF_IMPORTS = frozenset(
    "broken_lines wrong_type untitled_items incomplete_events repeated_events items_without_metadata".split()
)


class Findings:
    """Collects findings; those with a count of zero are not kept."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def add(self, check: str, count: int, message: str) -> None:
        """Add a finding if ``count`` is positive."""
        assert check in CHECKS | _CHECKS_OF_IMPORTS, check
        if count:
            self.found.append(Finding(check, int(count), message))

    def to_list(self) -> list[dict[str, str | int]]:
        """Return JSON-able findings."""
        return [asdict(finding) for finding in self.found]

    def counts(self) -> dict[str, int]:
        """Return the count of each check, of several columns with one check the largest."""
        return largest_counts(self.to_list())


def largest_counts(findings: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the count of each check in a list of findings, of several columns with one check the largest."""
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding["check"]] = max(counts.get(finding["check"], 0), int(finding["count"]))
    return counts


def ids_like(
    ids: pa.ChunkedArray, kind: pa.DataType, findings: Findings | None = None, *, events: bool = False
) -> pa.ChunkedArray:
    """Return text ids as integers if ``kind``, that of the other table's ids, is no text and they all are integers.

    Parameters
    ----------
    ids : pyarrow.ChunkedArray
        With normal types; others than such texts are returned as they are.
    kind : pyarrow.DataType
    findings : Findings, optional
        Gains that they were converted.
    events : bool
        Whether the ids are those of the events, for the finding.
    """
    integers = None if pa.types.is_string(kind) else text_to_integers(ids)
    if integers is None:
        return ids
    if findings is not None:
        note_converted_ids(findings, len(ids), events=events)
    return integers


def note_times(findings: Findings, parts: Sequence[Mapping[str, Any]]) -> None:
    """Add findings about times that may be of another unit, from counts of the parts of the events.

    Raises
    ------
    DataError
        One numeric column mixes seconds and milliseconds: sessions would be out of order.
    """
    names = ("times_in_seconds", "times_in_finer_units", "negative_times", "late_times")
    seconds, larger, negative, late = (sum(part[name] for part in parts) for name in names)
    if seconds and larger:
        raise DataError(
            f"{larger} of {seconds + larger} times are milliseconds or the like, the others are seconds",
            "one unit in the whole time column",
            "divide the larger ones by 1000; a text column may mix units and dates, a numeric one may not",
        )
    findings.add("time_negative", negative, "times before 1970 are kept; check the unit")
    findings.add("time_out_of_range", late, "times after the year 2100 are kept; are they milliseconds?")


def refuse_other_unit(parts: Sequence[Mapping[str, Any]], newest: float) -> None:
    """Refuse new events whose times are in another unit than those of the folder, of which ``newest`` is the newest.

    Raises
    ------
    DataError
        One side is in seconds, the other in milliseconds or finer; ``parts`` are as for `note_times`.
    """
    in_seconds = SECONDS[0] <= newest <= SECONDS[1]
    odd = sum(part["times_in_finer_units" if in_seconds else "times_in_seconds"] for part in parts)
    if odd and (in_seconds or newest >= MILLISECONDS):
        units = ("milliseconds or finer", "seconds")
        found, expected = units if in_seconds else units[::-1]
        raise DataError(f"{odd} of the new times are {found}", f"{expected}, as in the folder", "convert the new times")


def note_users(findings: Findings, parts: Sequence[Mapping[str, Any]], *, drop_duplicates: bool) -> None:
    """Add findings about events by user, from counts of the parts: repeated, out of the order of time, too many."""
    names = ("duplicates", "out_of_order", "very_long")
    duplicates, backwards, very_long = (sum(part.get(name, 0) for part in parts) for name in names)
    done = "are left out" if drop_duplicates else "are kept; --drop-duplicates leaves them out"
    findings.add("duplicate_events", duplicates, f"repeated (user, item, time) {done}")
    findings.add("time_backwards", backwards, "events of a user not in the order of time were sorted")
    many = f"users with over {MANY_EVENTS:,} events are kept; are they bots? --max-events cuts their sessions"
    findings.add("very_long_users", very_long, many)


def event_features(table: pa.Table, drop_columns: Sequence[str], findings: Findings) -> list[str]:
    """Return the event columns that become list features.

    Raises
    ------
    SchemaError
        ``drop_columns`` names a missing column ("split" may be missing: it is the default).
    """
    others = [name for name in table.column_names if name not in KEYS]
    for name in drop_columns:
        if name not in table.column_names and name != "split" and not _ROW_INDEX.fullmatch(name):
            near = difflib.get_close_matches(name, others, 1)
            raise SchemaError(f"there is no event column {name!r} to drop", f"one of {near or others}")
    features = []
    for name in others:
        kind = table[name].type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if name in drop_columns:
            continue
        if numeric or pa.types.is_string(kind):
            features.append(name)
        else:
            vectors = "; vectors per event come with sessions of your own (missrec catalogue adopt, tag EMBEDDING)"
            words = f"event column {name!r} of type {kind} is neither number nor text and is left out"
            findings.add("event_column_left_out", 1, words + (vectors if pa.types.is_nested(kind) else ""))
    return features


def row_indexes(names: Iterable[str], wanted: Iterable[str], findings: Findings) -> list[str]:
    """Return the columns that are an unnamed row index of pandas and not in ``wanted``; add a finding about them."""
    columns = [name for name in names if _ROW_INDEX.fullmatch(name) and name not in wanted]
    findings.add("row_index", len(columns), f"columns {columns} are a row index of pandas and are left out")
    return columns


def taken_names(names: Iterable[str], renamed: Mapping[str, str], findings: Findings) -> list[str]:
    """Return the columns that are called as another one is to be called (old name -> new); add a finding about them."""
    columns = [name for name in names if name in renamed.values() and name not in renamed]
    findings.add("column_name_taken", len(columns), f"columns {columns} are left out: other columns take their names")
    return columns


def note_nulls(findings: Findings, name: str, count: int, *, text: bool) -> None:
    """Add a finding about nulls in an event column."""
    became = "nulls became an empty text" if text else "nulls and infinities became 0"
    findings.add("null_feature", count, f"event column {name!r}: {became}")


def note_repaired(findings: Findings, name: str, count: int) -> None:
    """Add a finding about repaired texts that were not UTF-8."""
    findings.add("not_utf8", count, f"texts of column {name!r} were not UTF-8: U+FFFD stands for what was not")


def complete_events(table: pa.Table, features: Sequence[str], findings: Findings) -> pa.Table:
    """Return the events that have user, item and time, in input order, without the columns that become nothing.

    Raises
    ------
    DataError
        No event is complete.
    """
    note_incomplete(findings, {name: table[name].null_count for name in KEYS})
    table = table.select([*KEYS, *features]).filter(reduce(pc.and_, (pc.is_valid(table[name]) for name in KEYS)))
    require_events(table.num_rows)
    return table


def note_incomplete(findings: Findings, nulls: Mapping[str, int]) -> None:
    """Add the findings of events without user, item or time."""
    for name in KEYS:
        findings.add(f"null_{name}", nulls[name], f"events without {name} are left out")


def require_events(count: int) -> None:
    """Refuse tables without a complete event.

    Raises
    ------
    DataError
        There is none.
    """
    if not count:
        raise DataError("no event has user, item and time", "at least one complete row", "check the three columns")


def clean_events(events: Frame, findings: Findings, drop_duplicates: bool) -> Frame:
    """Return complete events, in pandas or cuDF, without the duplicates if they are not wanted; add findings."""
    duplicate = events.duplicated(list(KEYS))
    counts = count_events(events, duplicate)
    note_times(findings, [counts])
    note_users(findings, [counts], drop_duplicates=drop_duplicates)
    return events[~duplicate].reset_index(drop=True) if drop_duplicates else events


def note_converted_ids(findings: Findings, count: int, *, events: bool) -> None:
    """Add the finding that one table's item ids are texts and the other's integers, and that both are integers now."""
    sides = ("interactions", "item table") if events else ("item table", "interactions")
    findings.add(
        "ids_as_text",
        count,
        f"item ids are texts in the {sides[0]} and integers in the {sides[1]}: both are read as integers",
    )


def count_events(events: Frame, duplicate: Series) -> dict[str, int]:
    """Return the counts of `note_times` and `note_users`.

    Parameters
    ----------
    events : Frame
        Complete events, all of every user in it.
    duplicate : Series [event]
        True where user, item and time occurred before.
    """
    adapter, time = adapter_of(events), events[TIMESTAMP]
    xp, users = adapter.xp, adapter.factorize(events[USER_ID])[0]
    order = xp.argsort(users, kind="stable")  # by user, in input order
    return {
        "duplicates": int(duplicate.sum()),
        "out_of_order": int(((xp.diff(adapter.array(time)[order]) < 0) & (xp.diff(users[order]) == 0)).sum()),
        "very_long": int((xp.bincount(users) > MANY_EVENTS).sum()),
        **count_times(time),
    }


def count_times(times: Any) -> dict[str, int]:
    """Return the counts of `note_times`; ``times``: an array or a series without nulls, [event]."""
    return {
        "times_in_seconds": int(((times >= SECONDS[0]) & (times <= SECONDS[1])).sum()),
        "times_in_finer_units": int((times >= MILLISECONDS).sum()),
        "negative_times": int((times < 0).sum()),
        "late_times": int((times > SECONDS[1]).sum()),
    }


def number_types(table: pa.Table, features: Sequence[str], categorical_columns: Sequence[str]) -> pa.Table:
    """Return the table with numbers that are categories as 64-bit ones, and other integers that have nulls as floats.

    Raises
    ------
    SchemaError
        A value of a categorical column does not fit.
    """
    for name in features:
        column = table[name]
        if pa.types.is_string(column.type):
            continue
        if name in categorical_columns:
            column = as_category(column, name)
        elif column.null_count and not pa.types.is_floating(column.type):
            column = column.cast(pa.float64(), safe=False)
        table = with_column(table, name, column)
    return table


def count_nulls(events: Frame, features: Sequence[str]) -> dict[str, int]:
    """Return the number of nulls, NaN and infinities of every feature."""
    return {name: int(_finite_or_null(events[name]).isna().sum()) for name in features}


def without_nulls(events: Frame, features: Sequence[str], categorical_columns: Sequence[str]) -> Frame:
    """Return the events with features of text, int64 or float32; nulls and infinities are an empty text or 0.

    Numbers that are categories stay as they are, whether or not they have nulls: float32 has one for several of them.
    """
    adapter, columns = adapter_of(events), {}
    for name in features:
        column = events[name]
        if adapter.is_text(column):
            columns[name] = column.fillna("").astype(object)
        elif name in categorical_columns:
            if column.dtype.kind == "f":
                columns[name] = finite(column).fillna(0.0)
            else:  # cuDF fills Booleans with no number
                columns[name] = column.fillna(False if column.dtype.kind == "b" else 0).astype("int64")
        else:
            column = _finite_or_null(column)
            filled = column.astype("float64").fillna(0.0) if column.isna().sum() else column
            if filled.dtype.kind == "u":
                as_int64(pa.array([int(filled.max())], pa.uint64()), name)
            columns[name] = filled.astype("float32" if filled.dtype.kind == "f" else "int64")
    return events.assign(**columns)


def _finite_or_null(column: Series) -> Series:
    if column.dtype.kind != "f":
        return column
    with np.errstate(over="ignore"):  # what is too large for a float32 becomes infinite, hence null
        return finite(column.astype("float32"))


def finite(column: Series) -> Series:
    """Return a column of floats, in pandas or cuDF, with nulls in place of NaN and infinity."""
    return column.where((column - column == 0).fillna(False))


def count_values(events: Frame, features: Sequence[str], categorical_columns: Sequence[str]) -> dict[str, pd.Series]:
    """Return the number of events per value of text and named columns."""
    adapter = adapter_of(events)
    names = [name for name in features if events[name].dtype == object or name in categorical_columns]
    return {name: adapter.counts(events[name]) for name in names}


def by_frequency(counts: pd.Series) -> pd.Series:
    """Return the values of an index of counts, most frequent first, ties in sorted order."""
    ordered = counts.sort_index().sort_values(ascending=False, kind="stable")
    return pd.Series(ordered.index.to_numpy())
