"""Decisions that a trace of the network keeps: which of two ways to the same result is taken.

``torch.jit.trace`` warns wherever Python reads a size, since the trace goes on with what the example had. Sizes that
only choose between ways to the same result, or that are the catalogue's, change no score, and are read here. Sizes of
sessions that a result depends on are not: there the warning is right.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def sizes(x: Tensor) -> tuple[int, ...]:
    """Return the shape as plain numbers, which are constants in a trace; for decisions, not for results.

    Examples
    --------
    >>> sizes(torch.zeros(2, 3)) == (2, 3)
    True
    """
    if not torch.jit.is_tracing():
        return x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in x.shape)
