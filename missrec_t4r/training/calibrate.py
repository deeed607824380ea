"""After training: how much the neighbour prior counts, chosen by ranking validation sessions."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import chunk_size, exclude_seen, slice_sessions, target_ranks
from missrec_t4r.evaluation.model_scorer import ModelScorer
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.neighbours import PriorSettings
from missrec_t4r.progress import Progress, quiet

Counting = tuple[int, bool]
Point = tuple[float, float, float]

_DECAYS = (0.5, 0.7, 0.9)
_POWERS = (0.1, 0.3, 0.5, 0.7)
_LOGITS_PER_COUNT = (0.0, 0.2, 0.4, 0.8, 1.5, 2.5)
"""Weights on the grid: what one co-occurrence of two average items adds to a logit."""
_FOLLOWERS = 5
"""Window of the second way to count: items that come within so many events after another."""
_MOST_SESSIONS = 2000


def fit_prior(
    model: MISSRec, catalogue: Catalogue, train: Sessions, valid: Sessions, *, seed: int = 0, progress: Progress = quiet
) -> dict[str, Any]:
    """Count the training sessions' co-occurrences and choose the prior's settings on validation.

    Parameters
    ----------
    model : MISSRec
        Its prior is filled and set; a model without one is left alone.
    valid : Sessions
        Histories with their target; at most 2,000 of them are ranked.

    Returns
    -------
    dict
        The chosen settings, and validation NDCG@10 (mean of both protocols) with and without the prior.
    """
    if model.prior is None:
        return {}
    chosen = np.sort(np.random.default_rng(seed).permutation(len(valid))[:_MOST_SESSIONS])
    chosen = chosen[np.argsort(valid.lengths[chosen], kind="stable")]  # equal lengths in a chunk: little padding
    histories, targets = valid.take(chosen).split_last()
    histories = histories.known()
    grid = list(product(_DECAYS, _POWERS, _LOGITS_PER_COUNT))
    scorer = ModelScorer.with_popularity(model, catalogue)
    found: list[tuple[float, Counting, Point]] = []
    for counting in ((model.config.max_sequence_length, False), (_FOLLOWERS, True)):
        model.prior.choose(PriorSettings(0.0, 1.0, 0.0))
        model.prior.fit(train, counting[0], directed=counting[1])
        gains = np.zeros(len(grid))
        step = chunk_size(catalogue.n_rows)
        for start in progress.track(range(0, len(histories), step), "weighing neighbours"):
            chunk = slice_sessions(histories, start, start + step)
            gains += _gains(model, scorer, chunk, torch.from_numpy(targets[start : start + step]), grid)
        best = int(gains.argmax())
        found.append((float(gains[best]) / max(len(histories), 1), counting, grid[best]))
        without = float(gains[0]) / max(len(histories), 1)
    ndcg, (window, directed), point = max(found, key=lambda result: result[0])
    model.prior.fit(train, window, directed=directed)
    model.prior.choose(_settings(model, *point))
    counted = {"window": window, "directed": directed}
    return {**model.prior.chosen._asdict(), **counted, "valid_ndcg@10": ndcg, "without": without}


@torch.no_grad()
def _gains(
    model: MISSRec, scorer: ModelScorer, chunk: Sessions, targets: torch.Tensor, grid: list[Point]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sum of NDCG@10 over a chunk of sessions for every point of the grid."""
    prior = model.prior
    assert prior is not None
    item_ids = torch.from_numpy(chunk.padded(range(len(chunk)), model.config.max_sequence_length)).to(
        prior.counts.device
    )
    prior.choose(PriorSettings(0.0, 1.0, 0.0))
    own = scorer(chunk).cpu()
    gains = []
    unit, unit_key = own, (-1.0, -1.0)
    for decay, power, logits in grid:
        if (decay, power) != unit_key:
            unit_key = (decay, power)
            prior.choose(PriorSettings(1.0, decay, power))
            unit = prior(item_ids).cpu()
        scores = own + _settings(model, decay, power, logits).weight * unit
        gain = torch.zeros((), dtype=torch.float64)
        for ranked in (scores, exclude_seen(scores, chunk)):
            rank = target_ranks(ranked, targets).double()
            gain += torch.where(rank <= 10, 1 / torch.log2(rank + 1), 0.0).sum() / 2
        gains.append(float(gain))
    return np.array(gains)


def _settings(model: MISSRec, decay: float, power: float, logits: float) -> PriorSettings:
    """Translate logits per co-occurrence of average items into a weight in score units."""
    assert model.prior is not None
    frequency = model.prior.frequency
    average = float((frequency * (frequency + 5)).sum() / frequency.sum().clamp_min(1))
    return PriorSettings(logits * model.config.temperature * average ** (2 * power), decay, power)
