"""Learning rate of a step: a linear warm-up, then constant as published or down to zero along a cosine."""

from __future__ import annotations

import math

from missrec_t4r.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, share: float) -> float:
    """Return the step's learning rate.

    Parameters
    ----------
    train : TrainConfig
    step : int
        Steps taken, this one included.
    share : float
        Share of the ``epochs`` that was trained before the step, in [0, 1]. Early stopping ends a cosine early: give it
        the number of epochs that the run is meant to last.

    Examples
    --------
    >>> cosine = TrainConfig(schedule="cosine", warmup_steps=4)
    >>> [round(learning_rate(cosine, step, share), 6) for step, share in [(1, 0.0), (4, 0.0), (9, 0.5), (17, 1.0)]]
    [0.00025, 0.001, 0.0005, 0.0]
    """
    rate = train.learning_rate * min(1.0, step / max(train.warmup_steps, 1))
    if train.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return rate
