"""Co-occurrence counts of item pairs in sessions, for the item-kNN term and the item-kNN baseline.

    score(s, j) = sum over items i of s of decay^age(i) * C[i,j] / ((n_i + 5) (n_j + 5))^power

C counts how often two items occur together (within a window of events, in either order or in one, or anywhere in a
session), n how often an item occurs. The shrinkage of 5 lowers the scores of items with few events; age is 0 for the
last item. The term and the baseline differ in what they count and store, not in the formula: see `terms.item_knn` and
`baselines`.
"""

from __future__ import annotations

import warnings
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Ints
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.schema import UNKNOWN_ROW

SHRINKAGE: Final = 5.0
"""Added to every item count."""
_PAIRS_PER_CHUNK = 1 << 24
"""Pairs that are merged at a time: 128 MiB of keys."""


class Pairs(NamedTuple):
    """Counts of ordered pairs of different items, sorted by both; no pair twice."""

    rows: Ints
    """[pair]: the earlier item, where the order counts."""
    others: Ints
    """[pair]: the later item."""
    counts: Ints
    """[pair]."""


def pairs_within(sessions: Sessions, window: int, *, directed: bool = False) -> Pairs:
    """Count pairs of different items at most ``window`` events apart in a session.

    Parameters
    ----------
    sessions : Sessions
    window : int
        In events; small for long histories, where everything occurs with everything.
    directed : bool
        Count only what comes later; else every pair counts in both orders.

    Examples
    --------
    >>> [part.tolist() for part in pairs_within(Sessions.from_lists([[3, 4], [4, 3, 5]]), 1)]
    [[3, 3, 4, 5], [4, 5, 3, 3], [2, 1, 2, 1]]
    """
    values = sessions.values
    session = sessions.session_of_event
    n_rows = int(values.max(initial=0)) + 1
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    pending: list[Ints] = []
    for distance in range(1, min(window, int(sessions.lengths.max(initial=1)) - 1) + 1):
        left, right = values[:-distance], values[distance:]
        is_pair = (session[:-distance] == session[distance:]) & (left != right)
        is_pair &= (left > UNKNOWN_ROW) & (right > UNKNOWN_ROW)
        pending.append(left[is_pair] * n_rows + right[is_pair])
        if sum(map(len, pending)) > _PAIRS_PER_CHUNK:
            keys, counts, pending = *_merged(keys, counts, pending), []
    keys, counts = _merged(keys, counts, pending)
    rows, others = keys // n_rows, keys % n_rows
    if directed:
        return Pairs(rows, others, counts)
    keys, inverse = np.unique(np.concatenate([keys, others * n_rows + rows]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([counts, counts])).astype(np.int64)
    return Pairs(keys // n_rows, keys % n_rows, counts)


def repeats_within(sessions: Sessions, window: int, n_rows: int) -> Ints:
    """Return how often each row comes after itself, at most ``window`` events later, [row]: the pairs left out above.

    Examples
    --------
    >>> repeats_within(Sessions.from_lists([[3, 4, 3], [4]]), 2, 5).tolist()
    [0, 0, 0, 1, 0]
    """
    values, found = sessions.values, np.zeros(n_rows, np.int64)
    session = sessions.session_of_event
    for distance in range(1, window + 1):
        again = (session[:-distance] == session[distance:]) & (values[:-distance] == values[distance:])
        found += np.bincount(values[distance:][again], minlength=n_rows)
    return found


def sessions_with_both(sessions: Sessions, n_rows: int) -> Tensor:
    """Return how many sessions hold both items, [row, row], sparse; the diagonal counts the sessions of each item."""
    cells = np.unique(sessions.session_of_event * n_rows + sessions.values)  # each item once per session
    index = torch.from_numpy(np.stack([cells // n_rows, cells % n_rows]))
    shape = (len(sessions), n_rows)
    holds = torch.sparse_coo_tensor(index, torch.ones(len(cells)), shape, is_coalesced=True, check_invariants=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch multiplies COO through CSR
        return torch.sparse.mm(holds.t(), holds).coalesce()


def _merged(keys: Ints, counts: Ints, pending: list[Ints]) -> tuple[Ints, Ints]:
    """Add the keys of ``pending`` to the counts of the distinct keys so far."""
    fresh, fresh_counts = np.unique(np.concatenate([*pending, np.empty(0, np.int64)]), return_counts=True)
    merged, inverse = np.unique(np.concatenate([keys, fresh]), return_inverse=True)
    return merged, np.bincount(inverse, np.concatenate([counts, fresh_counts])).astype(np.int64)
