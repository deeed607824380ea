"""Array functions on events sorted by key and time, for numpy and cupy; operators and out-of-core engine share them.

Times are in seconds, or in another unit, which gaps then have too. ``leads`` is True where an event is the first of its
key (user). All arrays have one entry per event. Weekdays count from Monday = 0; 1970-01-01 was a Thursday.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from missrec_t4r.arrays import Ints

Array = Any
"""numpy.ndarray or cupy.ndarray."""

SECONDS_PER_DAY = 86_400
_THURSDAY = 3


def gaps(times: Array, leads: Array, xp: Any = np) -> Array:
    """Return the time since the previous event of the same key, 0 for the first, [event].

    Examples
    --------
    >>> gaps(np.array([5, 9, 2]), np.array([True, False, True])).tolist()
    [0, 4, 0]
    """
    elapsed = xp.zeros_like(times)  # [event]
    elapsed[1:] = times[1:] - times[:-1]
    return xp.where(leads, 0, elapsed)  # the difference to another key's event is not a gap


def session_numbers(elapsed: Array, leads: Array, limit: float, xp: Any = np) -> Array:
    """Return the session number of each event within its key: gaps longer than ``limit`` so far, [event], int64.

    Examples
    --------
    >>> session_numbers(np.array([0, 4, 60, 0]), np.array([True, False, False, True]), 30).tolist()
    [0, 0, 1, 0]
    """
    ended = xp.cumsum((elapsed > limit) & ~leads)  # [event]: sessions ended so far, over all keys
    if not len(ended):
        return xp.zeros(0, "int64")
    # cumsum(leads) - 1 is the index of the event's key: subtract what had ended before the key's first event.
    return (ended - ended[leads][xp.cumsum(leads) - 1]).astype("int64")


def hours(times: Array, offset: float = 0, xp: Any = np) -> Array:
    """Return the hour of the day, 0 to 23, of a clock that is ``offset`` seconds ahead of UTC."""
    return (xp.floor_divide(times + offset, 3600) % 24).astype("int64")


def weekdays(times: Array, offset: float = 0, xp: Any = np) -> Array:
    """Return the day of the week, Monday = 0, of a clock that is ``offset`` seconds ahead of UTC.

    Examples
    --------
    >>> weekdays(np.array([0, 4 * 86_400])).tolist()
    [3, 0]
    """
    return ((xp.floor_divide(times + offset, SECONDS_PER_DAY) + _THURSDAY) % 7).astype("int64")


def recencies(times: Array, newest: float) -> Array:
    """Return the days from the event to ``newest``, [event], float32."""
    return ((newest - times) / SECONDS_PER_DAY).astype("float32")


def sum_counts(parts: Iterable[npt.ArrayLike], size: int) -> Ints:
    """Return the sum of counts of different lengths, [size].

    Examples
    --------
    >>> sum_counts([[1, 2], [], [1]], 3).tolist()
    [2, 2, 0]
    """
    total = np.zeros(size, np.int64)
    for part in parts:
        counts = np.asarray(part, np.int64)
        total[: len(counts)] += counts
    return total


def core(codes: list[Array], least: int, counts: Array | float = 1.0, xp: Any = np) -> Array:
    """Return the k-core: the combinations left when every code of every column occurs at least ``least`` times.

    Rare codes are removed until nothing changes; the result does not depend on the order of the columns.

    Parameters
    ----------
    codes : list of ndarray [combination], int
        One array per column, for example users and items.
    least : int
        Minimum number of events per code.
    counts : ndarray [combination], or 1
        Number of events of a combination.

    Returns
    -------
    ndarray [combination], bool

    Examples
    --------
    >>> core([np.array([0, 0, 1]), np.array([0, 1, 1])], 2, np.array([2, 1, 1])).tolist()
    [True, False, False]
    """
    alive = xp.ones(len(codes[0]), bool)
    while True:
        before = int(alive.sum())
        for column in codes:
            alive &= xp.bincount(column, weights=alive * counts)[column] >= least  # [code] -> [combination]
        if int(alive.sum()) == before:
            return alive
