"""After training: how much neighbours and look-alikes count, chosen by ranking validation sessions.

Coordinate by coordinate: the neighbour prior on top of the model, the look-alikes on top of both, the neighbours again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import chunk_size, slice_sessions, target_ranks
from missrec_t4r.evaluation.metrics import MISSED
from missrec_t4r.model.missrec import MISSRec, first_occurrences
from missrec_t4r.progress import track
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings, ContentKNNTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings, ItemKNNTerm
from missrec_t4r.ranking.tune_cold_start import fit_cold_start
from missrec_t4r.schema import UNKNOWN_ROW

Counting = tuple[int, bool]

_DECAYS = (0.5, 0.7, 0.9)
_POWERS = (0.1, 0.3, 0.5, 0.7)
_LOGITS_PER_COUNT = (0.0, 0.2, 0.4, 0.8, 1.5, 2.5, 4.0)
"""Weights on the grid: what one co-occurrence of two average items adds to a logit."""
_LOGITS_PER_LOOKALIKE = (0.0, 0.35, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
"""Weights on the grid: what the nearest look-alike of an average item adds to a logit."""
_FOLLOWERS = 5
"""Window of the second way to count: items that come within so many events after another."""
_MOST_SESSIONS = 3000
_MOST_ROWS = 200_000
"""Look-alikes are found by comparing all pairs of items; for larger catalogues they stay off."""


_NO_NEIGHBOURS, _NO_LOOKALIKES = ItemKNNSettings(0.0, 1.0, 0.0), ContentKNNSettings(0.0, 1.0)


class _Point(NamedTuple):
    """One point of a grid: a prior of unit weight, and what it is multiplied with."""

    unit: tuple[float, ...]
    weight: float


def fit_terms(
    model: MISSRec, catalogue: Catalogue, train: Sessions, valid: Sessions, *, seed: int = 0
) -> dict[str, Any]:
    """Count the training sessions' co-occurrences, find look-alikes, and choose both priors' settings on validation.

    Parameters
    ----------
    model : MISSRec
        Its priors are filled and set; a model without them is left alone.
    valid : Sessions
        Histories with their target; at most 3,000 of them are ranked.

    Returns
    -------
    dict
        The chosen settings, and validation NDCG@10 (mean of both protocols) with and without the priors.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(valid))[:_MOST_SESSIONS])
    chosen = chosen[np.argsort(valid.lengths[chosen], kind="stable")]  # equal lengths in a chunk: little padding
    histories, targets = valid.take(chosen).split_last()
    rated = _Rated(model, ModelScorer.with_popularity(model, catalogue), histories.known(), targets)
    prior, lookalikes = model.item_knn, model.content_knn
    if prior is not None and prior.cold_start is not None:
        prior.cold_start.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
    for part, off in ((prior, _NO_NEIGHBOURS), (lookalikes, _NO_LOOKALIKES)):
        if part is not None:
            part.choose(off)  # type: ignore[arg-type]  # each its own settings
    found: dict[str, Any] = {}
    if prior is not None:
        found = _fit_neighbours(
            model, prior, train, rated, [(model.config.max_sequence_length, False), (_FOLLOWERS, True)]
        )
    if lookalikes is not None and catalogue.n_rows <= _MOST_ROWS:
        alike = _fit_lookalikes(model, lookalikes, rated)
        found = {"without": alike["without"], **found, "valid_ndcg@10": alike["valid_ndcg@10"]}
        if prior is not None and lookalikes.active:
            again = _fit_neighbours(model, prior, train, rated, [(found["window"], found["directed"])])
            found = {**again, "without": found["without"]}
        found["lookalikes"] = lookalikes.chosen._asdict()
    if prior is not None and prior.cold_start is not None:
        found["newcomers"] = fit_cold_start(model, catalogue, valid, seed=seed)
    return found


def _fit_neighbours(
    model: MISSRec, prior: ItemKNNTerm, train: Sessions, rated: _Rated, countings: Sequence[Counting]
) -> dict[str, Any]:
    found = []
    for window, directed in countings:
        prior.choose(_NO_NEIGHBOURS)
        prior.fit(train, window, directed=directed)
        grid = [
            _settings(model, prior, decay, power, logits)
            for decay, power, logits in product(_DECAYS, _POWERS, _LOGITS_PER_COUNT)
        ]
        gains = rated.gains(
            [_Point(point[1:], point.weight) for point in grid],
            lambda unit: prior.choose(ItemKNNSettings(1.0, *unit)),
            lambda: prior.choose(_NO_NEIGHBOURS),
            prior,
        )
        best = int(gains.argmax())
        found.append((float(gains[best]), window, directed, grid[best], float(gains[0])))
    ndcg, window, directed, point, without = max(found, key=lambda result: result[0])
    prior.fit(train, window, directed=directed)
    prior.choose(point)
    counted = {"window": window, "directed": directed}
    return {**prior.chosen._asdict(), **counted, "valid_ndcg@10": ndcg, "without": without}


def _fit_lookalikes(model: MISSRec, lookalikes: ContentKNNTerm, rated: _Rated) -> dict[str, float]:
    vectors = {name: model.item_encoder.vectors.get_buffer(name) for name in model.item_encoder.names}
    lookalikes.fit(vectors, model.item_encoder.presence)
    nearest = lookalikes.likeness.amax(1)
    average = float(nearest.sum() / (nearest > 0).sum().clamp_min(1))
    grid = [
        _Point((decay,), logits * model.config.temperature / max(average, 1e-6))
        for decay, logits in product(_DECAYS, _LOGITS_PER_LOOKALIKE)
    ]
    gains = rated.gains(
        grid,
        lambda unit: lookalikes.choose(ContentKNNSettings(1.0, *unit)),
        lambda: lookalikes.choose(_NO_LOOKALIKES),
        lookalikes,
    )
    best = int(gains.argmax())
    lookalikes.choose(ContentKNNSettings(grid[best].weight, *grid[best].unit))
    return {"valid_ndcg@10": float(gains[best]), "without": float(gains[0])}


class _Rated:
    """Validation sessions, and how well a prior of every setting on top of the model's present score ranks them."""

    def __init__(
        self,
        model: MISSRec,
        scorer: ModelScorer,
        histories: Sessions,
        targets: npt.NDArray[np.int64],
    ) -> None:
        self.model, self.scorer, self.histories, self.targets = model, scorer, histories, targets

    @torch.no_grad()
    def gains(
        self,
        grid: Sequence[_Point],
        choose: Callable[[tuple[float, ...]], None],
        switch_off: Callable[[], None],
        prior: Callable[[Tensor], Tensor],
    ) -> npt.NDArray[np.float64]:
        """Return the mean over both protocols of NDCG@10 for every point of the grid."""
        total = np.zeros(len(grid))
        step = chunk_size(self.scorer.candidates.mask.shape[1])
        for start in track(range(0, len(self.histories), step), "weighing priors"):
            chunk = slice_sessions(self.histories, start, start + step)
            targets = torch.from_numpy(self.targets[start : start + step])
            padded = chunk.padded(range(len(chunk)), self.model.config.max_sequence_length)
            item_ids = torch.from_numpy(padded).to(self.scorer.device)
            switch_off()
            own = self.scorer(chunk).cpu()
            unit, computed = own, None
            for index, point in enumerate(grid):
                if point.unit != computed:
                    choose(point.unit)
                    unit, computed = prior(item_ids).cpu(), point.unit
                total[index] += _ndcg(torch.add(own, unit, alpha=point.weight), targets, item_ids.cpu())
        switch_off()
        return total / max(len(self.histories), 1)


def _ndcg(scores: Tensor, targets: Tensor, item_ids: Tensor) -> float:
    """Return the sum over sessions of NDCG@10, the mean of both protocols; one pass over the scores [batch, row]."""
    kept = target_ranks(scores, targets)
    own, seen = scores.gather(1, targets[:, None]), scores.gather(1, item_ids)
    before = (seen > own) | ((seen == own) & (item_ids < targets[:, None]))
    excluded = kept - (before & first_occurrences(item_ids) & (item_ids > UNKNOWN_ROW)).sum(1)
    excluded = torch.where((item_ids == targets[:, None]).any(1), MISSED, excluded)
    ranks = torch.stack([kept, excluded]).double()
    return float(torch.where(ranks <= 10, 1 / torch.log2(ranks + 1), 0.0).sum() / 2)


def _settings(model: MISSRec, prior: ItemKNNTerm, decay: float, power: float, logits: float) -> ItemKNNSettings:
    """Translate logits per co-occurrence of average items into a weight in score units."""
    frequency = prior.frequency
    average = float((frequency * (frequency + 5)).sum() / frequency.sum().clamp_min(1))
    return ItemKNNSettings(logits * model.config.temperature * average ** (2 * power), decay, power)
