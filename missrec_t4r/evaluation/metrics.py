"""Ranking metrics with one relevant item per session, and their bootstrap confidence intervals.

With one relevant item all metrics are functions of its rank: Recall@k (equal to HIT@k) = [rank <= k],
NDCG@k = [rank <= k] / log2(1 + rank), MRR@k = [rank <= k] / rank. Coverage is the share of the catalogue in at least
one list.

Intervals are from a bootstrap over users; the sessions of a user are drawn together. Users of equal ranks are
interchangeable, so resampling n users is one multinomial draw over what occurs: the same distribution, at a cost that
hardly depends on n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError

MISSED: Final = int(np.iinfo(np.int64).max)
"""Rank of a target that is not in the ranking: not recommendable, or excluded with the seen items."""
KS: Final = (10, 20, 50)
"""Cut-offs k of the report."""
CRITERION: Final = "ndcg@10"
"""Metric by which settings are tuned and systems compared."""
CONFIDENCE: Final = 0.95
"""Confidence level of the intervals."""
RESAMPLES: Final = 2000
"""Bootstrap resamples."""
_CELLS: Final = 1 << 23
"""Draws in memory at a time: 64 MB."""


class Difference(NamedTuple):
    """Paired difference of two systems on the same sessions: first minus second."""

    difference: float
    low: float
    high: float
    share_better: float
    """Share of bootstrap resamples in which the first system is better; 0.5 for equal systems."""


def metric_names(ks: Sequence[int] = KS) -> list[str]:
    """Return the names in the order of `metric_values`.

    Examples
    --------
    >>> metric_names([10])
    ['recall@10', 'ndcg@10', 'mrr@10']
    """
    return [f"{name}@{k}" for k in ks for name in ("recall", "ndcg", "mrr")]


def metric_values(ranks: Ints, ks: Sequence[int] = KS) -> Doubles:
    """Return the metrics of every session.

    Parameters
    ----------
    ranks : ndarray [session] or [session, seed], int64
        From 1; `MISSED` for targets that are not in the ranking. The metrics of several seeds are averaged.
    ks : sequence of int
        Cut-offs.

    Returns
    -------
    ndarray [session, 3 * len(ks)]
        In the order of `metric_names`.
    """
    rank = ranks.astype(np.float64)
    gains = np.stack([np.ones_like(rank), 1 / np.log2(1 + rank), 1 / rank], axis=-1)  # [session, (seed,) 3]
    values = np.concatenate([gains * (rank <= k)[..., None] for k in ks], axis=-1)  # [session, (seed,) 3 * len(ks)]
    return values if ranks.ndim == 1 else np.asarray(values.mean(axis=1))


def metrics(ranks: Ints, ks: Sequence[int] = KS) -> dict[str, float | None]:
    """Return the mean metrics over sessions; None for each metric without a session.

    Examples
    --------
    >>> metrics(np.array([1, 3, 11]), [10])["ndcg@10"]  # (1 + 1/log2(4) + 0) / 3
    0.5
    """
    names = metric_names(ks)
    if not len(ranks):
        return dict.fromkeys(names)
    return dict(zip(names, metric_values(ranks, ks).mean(axis=0).tolist(), strict=True))


def bootstrap_intervals(
    ranks: Ints, ks: Sequence[int] = KS, *, users: Ints | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float] | None]:
    """Return a 95 % interval [low, high] per metric; None for each metric without a session.

    Parameters
    ----------
    ranks : ndarray [session] or [session, seed], int64
    users : ndarray [session], int64, optional
        Number of each session's user (`users_of`); by default every session is of another user.

    Examples
    --------
    >>> bootstrap_intervals(np.array([1, 1, 1]), [10])["recall@10"]
    [1.0, 1.0]
    """
    names = metric_names(ks)
    if not len(ranks):
        return dict.fromkeys(names)
    unique, pattern = _patterns(_truncate(ranks, ks))
    low, high = _quantiles(_resampled_means(_units(metric_values(unique, ks), pattern, users), resamples, seed))
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}


def paired_differences(
    first: Ints, second: Ints, ks: Sequence[int] = KS, *, users: Ints | None = None, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """Compare two systems on the same sessions; sessions hard for both cancel, so this detects smaller differences.

    Parameters
    ----------
    first, second : ndarray [session] or [session, seed], int64
        Ranks of the same sessions in the same order; the systems may have different numbers of seeds.
    users : ndarray [session], int64, optional
        As in `bootstrap_intervals`.

    Raises
    ------
    DataError
        No session, or two different numbers of sessions.

    Examples
    --------
    >>> paired_differences(np.array([1, 2]), np.array([50, 60]), [10])["recall@10"].difference
    1.0
    """
    if not len(first) or len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} ranks to compare", "two systems ranked on the same sessions")
    pairs = np.column_stack([_truncate(first, ks), _truncate(second, ks)])  # [session, seeds of both]
    unique, pattern = _patterns(pairs)
    seeds = 1 if first.ndim == 1 else first.shape[1]
    values = metric_values(unique[:, :seeds], ks) - metric_values(unique[:, seeds:], ks)  # [pair, metric]
    units = _units(values, pattern, users)
    mean = units.counts @ units.values / (units.counts @ units.sizes)
    means = _resampled_means(units, resamples, seed=0)
    low, high = _quantiles(means)
    better = ((means > 0) + 0.5 * (means == 0)).mean(axis=0)
    columns = np.stack([mean, low, high, better], axis=1).tolist()
    return {name: Difference(*column) for name, column in zip(metric_names(ks), columns, strict=True)}


def users_of(sessions: Sessions) -> Ints | None:
    """Return the number of every session's user, [session]; None where no user has two sessions."""
    if sessions.users is None:
        return None
    numbers = np.asarray(sessions.users.dictionary_encode().indices.fill_null(-1), np.int64)
    return numbers if len(np.unique(numbers)) < len(numbers) else None


def coverage(recommended: Ints, n_items: int) -> float:
    """Return the share of items in at least one list.

    Parameters
    ----------
    recommended : ndarray of catalogue rows, any shape
        Top-k lists; negative rows pad lists that are shorter than k.
    n_items : int
        Items of the catalogue.

    Examples
    --------
    >>> coverage(np.array([[3, 4], [3, -1]]), 8)
    0.25
    """
    return len(np.unique(recommended[recommended >= 0])) / max(n_items, 1)


def named_differences(differences: dict[str, Difference]) -> dict[str, Any]:
    """Return the differences as JSON-able values."""
    return {name: difference._asdict() for name, difference in differences.items()}


def _truncate(ranks: Ints, ks: Sequence[int]) -> Ints:
    """Return the ranks with those beyond the largest cut-off as `MISSED`: their metrics are zero alike."""
    return np.where(ranks <= max(ks), ranks, MISSED)


class _Units(NamedTuple):
    """Resampling units of the bootstrap: users, those with equal values counted together."""

    counts: Ints
    """[unit]: users."""
    values: Doubles
    """[unit, metric]: sums over the sessions of one of them."""
    sizes: Ints
    """[unit]: sessions of one of them."""


def _patterns(ranks: Ints) -> tuple[Ints, Ints]:
    """Return the distinct ranks, or rows of ranks, and which of them each session has, [session]."""
    unique, pattern = np.unique(ranks, axis=0, return_inverse=True)
    return unique, pattern.reshape(-1)


def _units(values: Doubles, pattern: Ints, users: Ints | None) -> _Units:
    """Return the resampling units, from the metrics [pattern, metric] of the distinct ranks."""
    if users is None:
        return _Units(np.bincount(pattern), values, np.ones(len(values), np.int64))
    owner = np.unique(users, return_inverse=True)[1]
    sums = [np.bincount(owner, column[pattern]) for column in values.T]
    rows, counts = np.unique(np.column_stack([*sums, np.bincount(owner)]), axis=0, return_counts=True)
    return _Units(counts, rows[:, :-1], rows[:, -1].astype(np.int64))


def _resampled_means(units: _Units, resamples: int, seed: int) -> Doubles:
    """Return the mean metrics of each bootstrap resample, [resample, metric]; draws of some resamples at a time."""
    counts, values, sizes = units
    total, step = int(counts.sum()), max(1, _CELLS // len(counts))
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, step):
        drawn = rng.multinomial(total, counts / total, size=min(step, resamples - start))  # [resample, unit]
        means.append(drawn @ values / (drawn @ sizes)[:, None])
    return np.concatenate(means)


def _quantiles(means: Doubles) -> tuple[Doubles, Doubles]:
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high
