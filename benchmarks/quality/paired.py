"""Paired comparison of two systems on the same users over several seeds, with a bootstrap over users."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

RESAMPLES = 5000


def paired(first: Values, second: Values) -> dict[str, float]:
    """Return the mean difference, first minus second, and a 95 % interval from a bootstrap over users.

    Parameters
    ----------
    first, second : ndarray [seed, user]
        A metric of the same users. A user's value is the mean over seeds: users are drawn, seeds are as they are.

    Returns
    -------
    dict
        ``difference``, ``low``, ``high``, and ``share_better``: the resamples in which the first is better.

    Examples
    --------
    >>> paired(np.ones((2, 5)), np.zeros((3, 5)))
    {'difference': 1.0, 'low': 1.0, 'high': 1.0, 'share_better': 1.0}
    """
    difference = first.mean(0) - second.mean(0)
    rng, n = np.random.default_rng(0), len(difference)
    means = np.array([difference[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "difference": round(float(difference.mean()), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
        "share_better": round(float((means > 0).mean()), 4),
    }
