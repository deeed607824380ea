"""Ranking metrics with one relevant item per session, and their bootstrap confidence intervals.

With one relevant item all metrics are functions of its rank: Recall@k (equal to HIT@k) = [rank <= k],
NDCG@k = [rank <= k] / log2(1 + rank), MRR@k = [rank <= k] / rank. Coverage is the share of the catalogue in at least
one list.

Intervals are from a bootstrap over users. Sessions of equal rank are interchangeable, so resampling n users is one
multinomial draw over the ranks that occur: the same distribution, at a cost that does not depend on n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.errors import DataError

MISSED: Final = int(np.iinfo(np.int64).max)
"""Rank of a target that is not in the ranking: not recommendable, or excluded with the seen items."""
KS: Final = (10, 20, 50)
"""Cut-offs k of the report."""
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
    ranks: Ints, ks: Sequence[int] = KS, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float] | None]:
    """Return a 95 % interval [low, high] per metric; None for each metric without a session.

    Examples
    --------
    >>> bootstrap_intervals(np.array([1, 1, 1]), [10])["recall@10"]
    [1.0, 1.0]
    """
    names = metric_names(ks)
    if not len(ranks):
        return dict.fromkeys(names)
    unique, counts = np.unique(_truncate(ranks, ks), axis=0, return_counts=True)
    means = _resampled_means(counts, metric_values(unique, ks), resamples, seed)
    low, high = _quantiles(means)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}


def paired_differences(
    first: Ints, second: Ints, ks: Sequence[int] = KS, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Compare two systems on the same sessions; sessions hard for both cancel, so this detects smaller differences.

    Parameters
    ----------
    first, second : ndarray [session] or [session, seed], int64
        Ranks of the same sessions in the same order; the systems may have different numbers of seeds.

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
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    seeds = 1 if first.ndim == 1 else first.shape[1]
    values = metric_values(unique[:, :seeds], ks) - metric_values(unique[:, seeds:], ks)  # [pair, metric]
    mean = counts @ values / counts.sum()
    means = _resampled_means(counts, values, resamples, seed)
    low, high = _quantiles(means)
    better = ((means > 0) + 0.5 * (means == 0)).mean(axis=0)
    columns = np.stack([mean, low, high, better], axis=1).tolist()
    return {name: Difference(*column) for name, column in zip(metric_names(ks), columns, strict=True)}


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


def _resampled_means(counts: Ints, values: Doubles, resamples: int, seed: int) -> Doubles:
    """Return the mean metrics of each bootstrap resample, [resample, metric]; draws of some resamples at a time."""
    total, step = int(counts.sum()), max(1, _CELLS // len(counts))
    rng = np.random.default_rng(seed)
    means = [
        rng.multinomial(total, counts / total, size=min(step, resamples - start)) @ values / total
        for start in range(0, resamples, step)
    ]
    return np.concatenate(means)


def _quantiles(means: Doubles) -> tuple[Doubles, Doubles]:
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high
