"""Order of events by user and time, and what depends on it: duplicates, timestamps out of order.

Users are ordered by the hash of their id, so the order of rows does not depend on the number of partitions. Events of
one user at the same time keep the order of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.data.user_hash import Hashes, hash_ids


class EventOrder(NamedTuple):
    """Events sorted by user and time."""

    order: Ints
    """[event]: positions of the events, sorted by user (hash) and time, ties in input order."""
    codes: Ints
    """[event], input order: index of the event's user in ``users``."""
    users: pa.Array
    """[user]: distinct ids, sorted by hash."""
    hashes: Hashes
    """[user]: ascending."""


def order_events(users: pa.Array, times: AnyArray) -> EventOrder:
    """Return the order of events by user and time.

    Parameters
    ----------
    users, times : array [event]
        In input order.
    """
    encoded = users.dictionary_encode()
    hashes = hash_ids(encoded.dictionary)  # [user], users by first occurrence
    by_hash = np.argsort(hashes, kind="stable")
    ranks = np.empty(len(by_hash), np.int64)
    ranks[by_hash] = np.arange(len(ranks))  # first-occurrence index -> rank by hash
    codes = ranks[encoded.indices.to_numpy()]  # [event]
    return EventOrder(
        sort_by_code_and_time(codes, times), codes, encoded.dictionary.take(pa.array(by_hash)), hashes[by_hash]
    )


def sort_by_code_and_time(codes: Ints, times: AnyArray) -> Ints:
    """Return the stable order by code, then time, [event].

    Code, time and position are packed into the bits of one int64 where they fit: one plain sort is several times
    faster than a lexicographic one.

    Parameters
    ----------
    codes, times : ndarray [event]
        Codes are at least 0.

    Examples
    --------
    >>> sort_by_code_and_time(np.array([1, 0, 1, 1]), np.array([9, 5, 2, 2])).tolist()
    [1, 2, 3, 0]
    """
    size = len(codes)
    if not size:
        return np.zeros(0, np.int64)
    if times.dtype.kind == "i":
        earliest, latest = int(times.min()), int(times.max())
        position_bits, time_bits = size.bit_length(), (latest - earliest).bit_length()
        code_bits = int(codes.max()).bit_length()
        if position_bits + time_bits + code_bits <= 63:  # the sign bit stays 0
            packed = (((codes << time_bits) | (times - earliest)) << position_bits) | np.arange(size)
            packed.sort()  # unique keys, so an unstable sort gives the stable order
            return packed & ((1 << position_bits) - 1)
    return np.lexsort((times, codes))


def duplicate_positions(codes: Ints, times: AnyArray, items: AnyArray, order: Ints) -> Ints:
    """Return the positions of events whose user, item and time occurred before, ascending.

    Parameters
    ----------
    codes, times, items : ndarray [event]
        User, time and item of the events, in input order.
    order : ndarray [event]
        From `sort_by_code_and_time`.
    """
    # Only events that share user and time with a neighbour can be duplicates; these few are compared once more.
    tied = (codes[order][1:] == codes[order][:-1]) & (times[order][1:] == times[order][:-1])
    candidate = np.zeros(len(order), bool)
    candidate[1:] |= tied
    candidate[:-1] |= tied
    positions = np.sort(order[candidate])
    events = pd.DataFrame({"code": codes[positions], "time": times[positions], "item": items[positions]})
    return positions[events.duplicated()]


def count_out_of_order(codes: Ints, times: AnyArray) -> int:
    """Return how often an event of a user is earlier than that user's previous event in the input."""
    if (times[1:] >= times[:-1]).all():
        return 0
    order = sort_by_code_and_time(codes, np.zeros(len(codes), np.int64))  # by user, in input order
    return int(((np.diff(times[order]) < 0) & (np.diff(codes[order]) == 0)).sum())
