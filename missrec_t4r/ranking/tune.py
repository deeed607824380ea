"""Fit the score terms after training and tune their blend weights by ranking validation sessions.

Coordinate by coordinate: item-kNN on top of the network, content-kNN on top of both, item-kNN again, then the
cold-start term (`missrec_t4r.ranking.tune_cold_start`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import chunk_size, slice_sessions, target_ranks
from missrec_t4r.evaluation.metrics import MISSED
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import track
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings, ContentKNNTerm
from missrec_t4r.ranking.terms.history import first_occurrences
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings, ItemKNNTerm
from missrec_t4r.ranking.tune_cold_start import fit_cold_start
from missrec_t4r.schema import UNKNOWN_ROW

Counting = tuple[int, bool]

_DECAYS = (0.5, 0.7, 0.9)
_POWERS = (0.1, 0.3, 0.5, 0.7)
_LOGITS_PER_COUNT = (0.0, 0.2, 0.4, 0.8, 1.5, 2.5, 4.0)
"""Weights on the grid: what one co-occurrence of two average items adds to a logit."""
_LOGITS_PER_SIMILAR = (0.0, 0.35, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
"""Weights on the grid: what the most similar item of an average item adds to a logit."""
_FOLLOWERS = 5
"""Window of the second way to count: items that come within so many events after the other."""
_MOST_SESSIONS = 3000
"""Validation sessions that are ranked."""
_MOST_ROWS = 200_000
"""Similar items are found by comparing all pairs; for larger catalogues the content-kNN term stays off."""


_NO_ITEM_KNN, _NO_CONTENT_KNN = ItemKNNSettings(0.0, 1.0, 0.0), ContentKNNSettings(0.0, 1.0)


class _Point(NamedTuple):
    """One point of a grid: the settings of a term of unit weight, and its weight."""

    unit: tuple[float, ...]
    weight: float


def fit_terms(
    model: MISSRec, catalogue: Catalogue, train: Sessions, valid: Sessions, *, seed: int = 0
) -> dict[str, Any]:
    """Count co-occurrences in the training sessions, find similar items, and tune all terms on validation.

    Parameters
    ----------
    model : MISSRec
        Its terms are fitted and tuned; a model without them is left unchanged.
    valid : Sessions
        Histories with their target; at most 3,000 of them are ranked.

    Returns
    -------
    dict
        The chosen settings, and validation NDCG@10 (mean of both protocols) with and without the terms.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(valid))[:_MOST_SESSIONS])
    chosen = chosen[np.argsort(valid.lengths[chosen], kind="stable")]  # equal lengths in a chunk: little padding
    histories, targets = valid.take(chosen).split_last()
    validation = _Validation(model, ModelScorer.with_popularity(model, catalogue), histories.known(), targets)
    terms = terms_of(model)
    item_knn, content_knn = terms.item_knn, terms.content_knn
    if terms.cold_start is not None:
        terms.cold_start.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
    for part, off in ((item_knn, _NO_ITEM_KNN), (content_knn, _NO_CONTENT_KNN)):
        if part is not None:
            part.choose(off)  # type: ignore[arg-type]  # each its own settings
    found: dict[str, Any] = {}
    if item_knn is not None:
        found = _tune_item_knn(
            model, item_knn, train, validation, [(model.config.max_sequence_length, False), (_FOLLOWERS, True)]
        )
    if content_knn is not None and catalogue.n_rows <= _MOST_ROWS:
        alike = _tune_content_knn(model, content_knn, validation)
        found = {"without": alike["without"], **found, "valid_ndcg@10": alike["valid_ndcg@10"]}
        if item_knn is not None and content_knn.active:
            again = _tune_item_knn(model, item_knn, train, validation, [(found["window"], found["directed"])])
            found = {**again, "without": found["without"]}
        found["lookalikes"] = content_knn.chosen._asdict()
    if terms.cold_start is not None:
        found["newcomers"] = fit_cold_start(model, catalogue, valid, seed=seed)
    return found


def _tune_item_knn(
    model: MISSRec, item_knn: ItemKNNTerm, train: Sessions, validation: _Validation, countings: Sequence[Counting]
) -> dict[str, Any]:
    found = []
    for window, directed in countings:
        item_knn.choose(_NO_ITEM_KNN)
        item_knn.fit(train, window, directed=directed)
        grid = [
            _settings(model, item_knn, decay, power, logits)
            for decay, power, logits in product(_DECAYS, _POWERS, _LOGITS_PER_COUNT)
        ]
        scores = validation.ndcg(
            [_Point(point[1:], point.weight) for point in grid],
            lambda unit: item_knn.choose(ItemKNNSettings(1.0, *unit)),
            lambda: item_knn.choose(_NO_ITEM_KNN),
            item_knn,
        )
        best = int(scores.argmax())
        found.append((float(scores[best]), window, directed, grid[best], float(scores[0])))
    ndcg, window, directed, point, without = max(found, key=lambda result: result[0])
    item_knn.fit(train, window, directed=directed)
    item_knn.choose(point)
    counted = {"window": window, "directed": directed}
    return {**item_knn.chosen._asdict(), **counted, "valid_ndcg@10": ndcg, "without": without}


def _tune_content_knn(model: MISSRec, content_knn: ContentKNNTerm, validation: _Validation) -> dict[str, float]:
    vectors = {name: model.item_encoder.vectors.get_buffer(name) for name in model.item_encoder.names}
    content_knn.fit(vectors, model.item_encoder.presence)
    nearest = content_knn.likeness.amax(1)
    average = float(nearest.sum() / (nearest > 0).sum().clamp_min(1))
    grid = [
        _Point((decay,), logits * model.config.temperature / max(average, 1e-6))
        for decay, logits in product(_DECAYS, _LOGITS_PER_SIMILAR)
    ]
    scores = validation.ndcg(
        grid,
        lambda unit: content_knn.choose(ContentKNNSettings(1.0, *unit)),
        lambda: content_knn.choose(_NO_CONTENT_KNN),
        content_knn,
    )
    best = int(scores.argmax())
    content_knn.choose(ContentKNNSettings(grid[best].weight, *grid[best].unit))
    return {"valid_ndcg@10": float(scores[best]), "without": float(scores[0])}


class _Validation:
    """Validation sessions, and the NDCG of the model's present score plus a term, at every point of a grid."""

    def __init__(self, model: MISSRec, scorer: ModelScorer, histories: Sessions, targets: Ints) -> None:
        self.model, self.scorer, self.histories, self.targets = model, scorer, histories, targets

    @torch.no_grad()
    def ndcg(
        self,
        grid: Sequence[_Point],
        choose: Callable[[tuple[float, ...]], None],
        switch_off: Callable[[], None],
        term: Callable[[Tensor], Tensor],
    ) -> Doubles:
        """Return the mean over both protocols of NDCG@10 for every point of the grid."""
        total = np.zeros(len(grid))
        step = chunk_size(self.scorer.candidates.mask.shape[1])
        for start in track(range(0, len(self.histories), step), "tuning score terms"):
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
                    unit, computed = term(item_ids).cpu(), point.unit
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


def _settings(model: MISSRec, item_knn: ItemKNNTerm, decay: float, power: float, logits: float) -> ItemKNNSettings:
    """Translate logits per co-occurrence of average items into a weight in score units."""
    frequency = item_knn.frequency
    average = float((frequency * (frequency + 5)).sum() / frequency.sum().clamp_min(1))
    return ItemKNNSettings(logits * model.config.temperature * average ** (2 * power), decay, power)
