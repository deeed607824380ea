"""Train, validation and test as prefixes of a session: what was known, and the next item as the target.

Every split of a user is a prefix of their time-ordered session, so a rule only has to say how long. A validation or
test row is history plus target, the target last. Length 0 means that the user has no row in that split.

``leave_one_out``  test: the whole session; valid: all but the last event; train: all but the last two. Users with
fewer than three events go to train as they are.

``time``  train: the events before T1. valid: users with an event in [T1, T2); the target is their last one there and
the history is everything before it, events of the window included. test: the same from T2 on. A user without a
history before the target is not in valid or test. T1 and T2 are times, or by default the times of the events at
80 % and 90 % of all events.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from missrec_t4r.data.session_files import take_prefixes
from missrec_t4r.errors import ConfigError, DataError

__all__ = ["check_lengths", "default_boundaries", "leave_one_out", "take_prefixes", "time_split"]

Ints = npt.NDArray[np.int64]
Lengths = Mapping[str, Ints]
"""Prefix length per session for each split."""


def leave_one_out(offsets: Ints) -> Lengths:
    """Return the prefix lengths per session.

    Examples
    --------
    >>> {name: lengths.tolist() for name, lengths in leave_one_out(np.array([0, 2, 6])).items()}
    {'train': [2, 2], 'valid': [0, 3], 'test': [0, 4]}
    """
    sizes = np.diff(offsets)
    enough = sizes >= 3
    return {
        "train": np.where(enough, sizes - 2, sizes),
        "valid": np.where(enough, sizes - 1, 0),
        "test": np.where(enough, sizes, 0),
    }


def time_split(offsets: Ints, times: npt.NDArray[np.generic], valid_from: float, test_from: float) -> Lengths:
    """Return the prefix lengths per session for boundaries T1 = ``valid_from`` and T2 = ``test_from``.

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
            f"valid starts at {valid_from} and test at {test_from}", "the first before the second", "move one of them"
        )
    before = [_before(offsets, times, boundary) for boundary in (valid_from, test_from, np.inf)]
    windows = {}
    for name, early, late in (("valid", before[0], before[1]), ("test", before[1], before[2])):
        windows[name] = np.where((late > early) & (late >= 2), late, 0)
    return {"train": before[0], **windows}


def default_boundaries(times: npt.NDArray[np.generic]) -> tuple[float, float]:
    """Return the times of the events at 80 % and 90 % of all events in the order of time."""
    ordered = np.sort(times)
    first, second = (ordered[int(len(ordered) * share)].item() for share in (0.8, 0.9))
    return first, second


def check_lengths(lengths: Lengths) -> None:
    """Refuse a split that leaves nothing to train on or to evaluate.

    Raises
    ------
    DataError
        A split has no session.
    """
    for name, values in lengths.items():
        if not values.any():
            cure = {
                "train": "move the boundary later",
                "valid": "longer sessions are needed, or another --split",
                "test": "longer sessions are needed, or another --split",
            }[name]
            raise DataError(f"the {name} split has no session", "at least one", cure)


def _before(offsets: Ints, times: npt.NDArray[np.generic], boundary: float) -> Ints:
    passed = np.concatenate([[0], np.cumsum(times < boundary)])  # type: ignore[operator]  # numbers, whichever kind
    return np.asarray(np.diff(passed[offsets]), np.int64)
