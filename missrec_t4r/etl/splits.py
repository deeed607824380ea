"""Splits: the rows of train, valid and test are prefixes of a session, whose last item is the target of valid and test.

A split rule therefore only returns prefix lengths, one per session; 0 means that the session has no row in the split.

``leave_one_out``  test: the whole session; valid: all but the last event; train: all but the last two. Sessions of less
than three events are training rows as they are.

``time``  train: the events before T1. valid: sessions with an event in [T1, T2); the target is the last one there, and
the history is everything before it, events of the window included. test: the same from T2 on. Sessions without an event
before the target have no row. T1 and T2 are given, or the times of the events at 80 % and 90 % of all events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.data.session_files import take_prefixes
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.quality.checks import SECONDS
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.schema import ITEM_LIST, LIST_SUFFIX, SPLITS, TIMESTAMP

Lengths = Mapping[str, Ints]
"""Split -> prefix lengths, [session]."""


def split_lengths(sessions: pa.Table, settings: Mapping[str, Any]) -> tuple[Ints, Lengths]:
    """Return the offsets of the sessions' events, [session + 1], and per split the prefix lengths, [session].

    Parameters
    ----------
    sessions : pyarrow.Table
        With the list columns of items and times.
    settings : mapping
        ``split``; for a time split ``valid_from`` and ``test_from``.
    """
    offsets = np.asarray(one_array(sessions[ITEM_LIST]).offsets, np.int64)
    times = TIMESTAMP + LIST_SUFFIX
    return offsets, prefix_lengths(offsets, lambda: one_array(sessions[times]).values.to_numpy(), settings)


def split_rows(sessions: pa.Table, settings: Mapping[str, Any]) -> dict[str, pa.Table]:
    """Return the rows of every split; the parameters are those of `split_lengths`."""
    offsets, lengths = split_lengths(sessions, settings)
    return {name: take_prefixes(sessions, offsets, lengths[name]) for name in SPLITS}


def prefix_lengths(offsets: Ints, times: Callable[[], AnyArray], settings: Mapping[str, Any], xp: Any = np) -> Lengths:
    """Return the prefix lengths of the split that ``settings`` name; ``times`` are read for a time split alone."""
    if settings["split"] == "leave_one_out":
        return leave_one_out(offsets, xp)
    return time_split(offsets, times(), settings["valid_from"], settings["test_from"], xp)


def needs_times(settings: Mapping[str, Any]) -> bool:
    """Whether the boundaries of a time split follow from the times of all events."""
    return bool(settings["split"] == "time" and settings["valid_from"] is None)


def set_boundaries(settings: MutableMapping[str, Any], times: Callable[[], AnyArray], xp: Any = np) -> None:
    """Give a time split without boundaries the default ones of the events' ``times``."""
    if needs_times(settings):
        settings["valid_from"], settings["test_from"] = default_boundaries(times(), xp)


def leave_one_out(offsets: Ints, xp: Any = np) -> Lengths:
    """Return the prefix lengths of the leave-one-out split.

    Parameters
    ----------
    offsets : ndarray [session + 1]
        Where the events of each session begin.
    xp : module
        Of the arrays: numpy, or cupy.

    Examples
    --------
    >>> {name: lengths.tolist() for name, lengths in leave_one_out(np.array([0, 2, 6])).items()}
    {'train': [2, 2], 'valid': [0, 3], 'test': [0, 4]}
    """
    sizes = xp.diff(offsets)
    enough = sizes >= 3
    return {
        "train": xp.where(enough, sizes - 2, sizes),
        "valid": xp.where(enough, sizes - 1, 0),
        "test": xp.where(enough, sizes, 0),
    }


def time_split(offsets: Ints, times: AnyArray, valid_from: float, test_from: float, xp: Any = np) -> Lengths:
    """Return the prefix lengths of the time split with boundaries T1 = ``valid_from`` and T2 = ``test_from``.

    Parameters
    ----------
    offsets : ndarray [session + 1]
        Where the events of each session begin.
    times : ndarray [event]
        Ascending within a session.
    valid_from, test_from : float
        In the unit of ``times``.
    xp : module
        Of the arrays: numpy, or cupy.

    Raises
    ------
    ConfigError
        The boundaries are not in order.

    Examples
    --------
    >>> lengths = time_split(np.array([0, 3, 4]), np.array([1, 5, 9, 8]), valid_from=4, test_from=8)
    >>> {name: values.tolist() for name, values in lengths.items()}
    {'train': [1, 0], 'valid': [2, 0], 'test': [3, 0]}
    """
    if not valid_from < test_from:
        raise ConfigError(
            f"--valid-from {_as_date(valid_from)} and --test-from {_as_date(test_from)}",
            "the first before the second",
            "move one of them",
        )
    # [session] each: events before T1, before T2, and all
    before_valid, before_test, size = (
        _count_before(offsets, times, end, xp) for end in (valid_from, test_from, np.inf)
    )
    return {
        "train": before_valid,
        "valid": xp.where((before_test > before_valid) & (before_test >= 2), before_test, 0),
        "test": xp.where((size > before_test) & (size >= 2), size, 0),
    }


def default_boundaries(times: AnyArray, xp: Any = np) -> tuple[float, float]:
    """Return the boundaries T1 and T2: the times of the events at 80 % and 90 % of all events, sorted by time.

    Raises
    ------
    ConfigError
        They leave no event for training, or for validation.
    """
    ordered = xp.sort(times)
    first, second = (ordered[int(len(ordered) * share)].item() for share in (0.8, 0.9))
    if not (earliest := ordered[0].item()) < first < second:
        raise ConfigError(
            f"the default starts of validation and test, the times at 80 % and 90 % of all events, are {first} and "
            f"{second}, and the earliest event is at {earliest}",
            "three different times, in this order",
            "choose both with --valid-from and --test-from, or --split leave_one_out",
        )
    return first, second


def _as_date(time: float) -> str:
    """Return a time with its date if it is one in unix seconds."""
    date = f" ({datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d})" if SECONDS[0] < time < SECONDS[1] else ""
    return f"{time:.0f}{date}"


def check_rows(rows: Mapping[str, int], otherwise: str = "another --split") -> None:
    """Refuse splits without a training, validation or test row; ``otherwise`` is the cure beside longer sessions.

    Raises
    ------
    DataError
        A split has no session.
    """
    for name, count in rows.items():
        if not count:
            longer = f"longer sessions are needed (a longer --session-gap, if set), or {otherwise}"
            cure = "move the boundary later" if name == "train" else longer
            raise DataError(f"the {name} split has no session", "at least one", cure)


def _count_before(offsets: Ints, times: AnyArray, boundary: float, xp: Any) -> Ints:
    """Return how many events of each session are earlier than ``boundary``, [session]."""
    cumulative = xp.concatenate([xp.zeros(1, "int64"), xp.cumsum(times < boundary)])  # [event + 1]
    counts: Ints = xp.diff(cumulative[offsets]).astype("int64")
    return counts
