"""The item-kNN term in plain Python, from its definition in `docs/equations.md` (E18). Ours; not in the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.equations.reference import FIRST_ITEM, Array


def cooccurrences(sessions: Sequence[Sequence[int]], window: int, directed: bool) -> dict[int, dict[int, int]]:
    """C[i, j]: how often two different items are at most ``window`` events apart; directed: only j after i."""
    counts: dict[int, dict[int, int]] = {}
    for session in sessions:
        for a, i in enumerate(session):
            for b, j in enumerate(session):
                if i != j and abs(a - b) <= window and min(i, j) >= FIRST_ITEM and (a < b or not directed):
                    counts.setdefault(i, {})[j] = counts.get(i, {}).get(j, 0) + 1
    return counts


def item_knn_term(
    session: Sequence[int],
    training: Sequence[Sequence[int]],
    n_rows: int,
    *,
    window: int,
    directed: bool,
    n_neighbours: int,
    weight: float,
    decay: float,
    power: float,
) -> Array:
    """Return weight * sum over i of decay^age(i) * C'[i, j] / ((n_i + 5)(n_j + 5))^power for every row j.

    C'[i, j] = C[i, j], less one where j is in the session.

    Only the strongest ``n_neighbours`` of an item count (equal ones in the order of their rows); the last item of the
    session has age 0.
    """
    counts, term = cooccurrences(training, window, directed), np.zeros(n_rows)
    frequency = [sum(list(s).count(row) for s in training) for row in range(n_rows)]
    for age, i in enumerate(reversed(session)):
        strongest = sorted(counts.get(i, {}).items(), key=lambda pair: (-pair[1], pair[0]))[:n_neighbours]
        for j, count in strongest:
            others = count - 1 if j in session else count
            term[j] += weight * decay**age * others / ((frequency[i] + 5) * (frequency[j] + 5)) ** power
    return term
