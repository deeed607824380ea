"""Fit the score terms after training and tune their blend weights by ranking validation sessions.

Coordinate by coordinate: item-kNN on top of the network, content-kNN on top of both, item-kNN again, the history bias,
then the cold-start and the rare-item term (`missrec_t4r.ranking.tune_cold_start`, `tune_rare_items`). Item-kNN and
content-kNN lift what was seen again, so that beside the trained history bias a little of them may be worse than none
where much of them and a lower bias is best: all is done twice, the second time with what was seen hidden until the bias
has its turn, and the better result stays. `fit_terms` does so once, after training, for a model that is served with
seen items kept or excluded; `missrec_t4r.ranking.protocols` does so for each protocol of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, chunks_of, n_true
from missrec_t4r.evaluation.metrics import MISSED
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import Terms, terms_of
from missrec_t4r.ranking.scorer import ModelScorer, Parts
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings, ContentKNNTerm
from missrec_t4r.ranking.terms.history import HistoryBias, first_occurrences
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings, ItemKNNTerm
from missrec_t4r.ranking.tune_cold_start import fit_cold_start
from missrec_t4r.ranking.tune_rare_items import Chunk, fit_rare_items
from missrec_t4r.schema import UNKNOWN_ROW

TUNED_FOR: Final = (KEPT_WITH_HISTORY_TERM, EXCLUDED)
"""Protocols over whose mean the weights of a trained model are tuned: it is served in both ways."""

NDCG: Final = "valid_ndcg@10"
NDCG_WITHOUT: Final = "valid_ndcg@10_without_terms"
"""Keys of what `fit_terms` returns: NDCG@10 on validation, mean of the protocols, with the terms and without."""

Counting = tuple[int, bool]
"""How co-occurrences are counted: within so many events, and whether only what comes after the item."""

_DECAYS = (0.5, 0.7, 0.9)
_POWERS = (0.1, 0.3, 0.5, 0.7)
_LOGITS_PER_COUNT = (0.0, 0.2, 0.4, 0.8, 1.5, 2.5, 4.0)
"""Weights on the grid: what one co-occurrence of two average items adds to a logit."""
_ONE_LOGIT = (0.0, 1.0)
_LOGITS_PER_SIMILAR = (0.0, 0.35, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
"""Weights on the grid: what the most similar item of an average item adds to a logit."""
_FOLLOWERS = 5
"""Window of the second way to count: items that come within so many events after the other."""
_HIDDEN = -8.0
"""Logits that hide what was seen."""
_HISTORY_LOGITS = (0.0, 0.5, -0.5, -1.0, -2.0, -4.0, _HIDDEN)
"""What is added to the history bias on the grid, in logits; the first of equals is taken."""
MOST_SESSIONS: Final = 3000
"""Validation sessions that are ranked."""
_CUTOFF = 10
_KEPT_BYTES = 1 << 28
"""Scores of the network on validation that are kept; where there are more, they are computed for every grid."""
_MOST_ROWS = 200_000
"""Similar items are found by comparing all pairs; for larger catalogues the content-kNN term stays off."""


def fit_terms(model: MISSRec, catalogue: Catalogue, train: Sessions, valid: Sessions) -> dict[str, Any]:
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
        The chosen settings by term (``item_knn``, ``content_knn``, ``cold_start``, ``rare_items``, the number
        ``history_bias``), and validation NDCG@10 (mean of both protocols): ``valid_ndcg@10`` with the terms,
        ``valid_ndcg@10_without_terms`` before item-kNN and content-kNN were added.
    """
    terms = terms_of(model)
    others = terms.item_knn is not None or terms.content_knn is not None
    return tune_terms(model, Validation(model, catalogue, train, valid), TUNED_FOR, history=others)


def tune_terms(
    model: MISSRec, validation: Validation, protocols: Sequence[str], *, network: bool = True, history: bool = False
) -> dict[str, Any]:
    """Fit and tune the terms of a model for the mean of some protocols.

    Parameters
    ----------
    model : MISSRec
        The one that validation was made for, or a copy of it with other terms (`with_terms`).
    protocols : sequence of str
        NDCG@10 on validation is the mean over them.
    network : bool
        False tunes the terms as a system of their own.
    history : bool
        Also tune the history bias, around its value: training learns it for the network without the other terms.

    Returns
    -------
    dict
        As `fit_terms` returns it.
    """
    terms = terms_of(model)
    if terms.cold_start is not None:
        terms.cold_start.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
    if terms.rare_items is not None:
        terms.rare_items.switch_off()
    blend = _Blend(model, validation, protocols, network)
    history = history and terms.history_bias is not None
    found = _tune_from(blend, terms, 0.0, history=history)
    if history and NDCG_WITHOUT in found:  # other terms were tuned beside the bias, and may be better beside another
        hidden = _tune_from(blend, terms, _HIDDEN, history=True)
        found = max(found, hidden, key=lambda one: float(one[NDCG])) | {NDCG_WITHOUT: found[NDCG_WITHOUT]}
        _choose(blend, terms, found)
    if terms.cold_start is not None:
        found["cold_start"] = fit_cold_start(model, validation.catalogue, validation.valid)
    if terms.rare_items is not None:
        found["rare_items"] = fit_rare_items(
            terms.rare_items, blend.scored(), len(validation.histories), protocols, model.config.rare_item_cost
        )
    return found


def _tune_from(blend: _Blend, terms: Terms, start: float, *, history: bool) -> dict[str, Any]:
    """Tune item-kNN and content-kNN beside a history bias lowered by ``start`` logits, and then perhaps the bias."""
    item_knn, content_knn = terms.item_knn, terms.content_knn
    if terms.history_bias is not None:
        terms.history_bias.offset.fill_(start * blend.model.config.temperature)
    if item_knn is not None:
        item_knn.choose(ItemKNNSettings(0.0, 1.0, 0.0))
    if content_knn is not None:
        content_knn.choose(ContentKNNSettings(0.0, 1.0))
    found: dict[str, Any] = {}
    if item_knn is not None:
        countings = [(blend.model.config.max_sequence_length, False), (_FOLLOWERS, True)]
        found = _tune_item_knn(blend, item_knn, countings)
    if content_knn is not None and blend.validation.catalogue.n_rows <= _MOST_ROWS:
        found = {**(tuned := _tune_content_knn(blend, content_knn)), **found, NDCG: tuned[NDCG]}
        if item_knn is not None and content_knn.active:
            counting = found["item_knn"]["window"], found["item_knn"]["directed"]
            found |= {**_tune_item_knn(blend, item_knn, [counting]), NDCG_WITHOUT: found[NDCG_WITHOUT]}
    return found | _tune_history(blend, terms.history_bias) if history and terms.history_bias is not None else found


def _choose(blend: _Blend, terms: Terms, found: dict[str, Any]) -> None:
    """Set the settings that `_tune_from` found with a history bias."""
    if terms.history_bias is not None:
        terms.history_bias.offset.fill_(found["history_bias"] - float(terms.history_bias.bias.detach()))
    if terms.item_knn is not None:
        chosen = dict(found["item_knn"])
        counting = chosen.pop("window"), chosen.pop("directed")
        terms.item_knn.count_as(blend.validation.counted(terms.item_knn, counting))
        terms.item_knn.choose(ItemKNNSettings(**chosen))
    if terms.content_knn is not None and "content_knn" in found:
        terms.content_knn.choose(ContentKNNSettings(**found["content_knn"]))


def _tune_item_knn(blend: _Blend, item_knn: ItemKNNTerm, countings: Sequence[Counting]) -> dict[str, Any]:
    def of(item_ids: Tensor) -> Callable[[], Tensor]:
        return partial(item_knn, item_ids, item_knn.nearby(item_ids))

    found = []
    content_knn = terms_of(blend.model).content_knn
    is_alone = not blend.network and not (content_knn is not None and content_knn.active)
    weights = _ONE_LOGIT if is_alone else _LOGITS_PER_COUNT  # a term alone ranks alike with any weight
    for counting in countings:
        item_knn.count_as(blend.validation.counted(item_knn, counting))
        grid = [
            _settings(blend.model, item_knn, decay, power, logits)
            for decay, power, logits in product(_DECAYS, _POWERS, weights)
        ]
        found.append((counting, *blend.best(grid, lambda point: item_knn.choose(ItemKNNSettings(*point)), of)))
    counting, point, ndcg, without = max(found, key=lambda result: result[2])
    item_knn.count_as(blend.validation.counted(item_knn, counting))
    item_knn.choose(ItemKNNSettings(*point))
    window, directed = counting
    chosen = {**item_knn.chosen._asdict(), "window": window, "directed": directed}
    return {"item_knn": chosen, NDCG: ndcg, NDCG_WITHOUT: without}


def _tune_content_knn(blend: _Blend, content_knn: ContentKNNTerm) -> dict[str, Any]:
    content_knn.list_as(blend.validation.listed(content_knn))
    nearest = content_knn.likeness.amax(1)
    average = float(nearest.sum() / (nearest > 0).sum().clamp_min(1))
    grid = [
        (logits * blend.model.config.temperature / max(average, 1e-6), decay)
        for decay, logits in product(_DECAYS, _LOGITS_PER_SIMILAR)
    ]
    _, ndcg, without = blend.best(
        grid,
        lambda point: content_knn.choose(ContentKNNSettings(*point)),
        lambda item_ids: partial(content_knn, item_ids),
    )
    return {"content_knn": content_knn.chosen._asdict(), NDCG: ndcg, NDCG_WITHOUT: without}


def _tune_history(blend: _Blend, history: HistoryBias) -> dict[str, float]:
    grid = [(logits * blend.model.config.temperature,) for logits in _HISTORY_LOGITS]
    _, ndcg, _ = blend.best(
        grid, lambda point: history.offset.fill_(*point), lambda item_ids: partial(blend.seen, item_ids)
    )
    return {"history_bias": float(history.bias.detach() + history.offset), NDCG: ndcg}


class Validation:
    """Validation sessions for the tuning of terms; the network's scores, counts and lists are computed once for all.

    Parameters
    ----------
    model : MISSRec
        Its network scores the sessions, once.
    train : Sessions
        Training sessions, in which co-occurrences are counted.
    valid : Sessions
        Histories with their target; a seeded sample of at most 3,000 is ranked.
    """

    def __init__(self, model: MISSRec, catalogue: Catalogue, train: Sessions, valid: Sessions) -> None:
        chosen = np.sort(np.random.default_rng(0).permutation(len(valid))[:MOST_SESSIONS])
        chosen = chosen[np.argsort(valid.lengths[chosen], kind="stable")]  # equal lengths in a chunk: little padding
        histories, self.targets = valid.take(chosen).split_last()
        self.histories = histories.known()
        self.catalogue, self.train, self.valid = catalogue, train, valid
        self.scorer = ModelScorer.with_popularity(model, catalogue)
        self.scored: list[tuple[Parts, Tensor, Tensor]] = []
        self._counted: dict[Counting, ItemKNNTerm] = {}
        self._listed: dict[bool, ContentKNNTerm] = {}

    def chunks(self) -> Iterator[tuple[Parts, Tensor, Tensor]]:
        """Yield the network's scores of some sessions, `distinct` items of the whole sessions, and targets [batch].

        They are kept where they are few enough.
        """
        n_rows = self.catalogue.n_rows
        keep = 4 * n_rows * len(self.histories) <= _KEPT_BYTES
        for index, (at, chunk) in enumerate(chunks_of(self.histories, n_rows, "tuning score terms")):
            if index < len(self.scored):
                yield self.scored[index]
                continue
            scored = self.scorer.parts(chunk), distinct(chunk), torch.from_numpy(self.targets[at])
            if keep:
                self.scored.append(scored)
            yield scored

    def counted(self, like: ItemKNNTerm, counting: Counting) -> ItemKNNTerm:
        """Return an item-kNN term with the training sessions counted in this way; computed once."""
        if counting not in self._counted:
            window, directed = counting
            term = ItemKNNTerm(*like.neighbours.shape).to(like.counts)
            term.fit(self.train, window, directed=directed)
            self._counted[counting] = term
        return self._counted[counting]

    def listed(self, like: ContentKNNTerm) -> ContentKNNTerm:
        """Return a content-kNN term with the similar items of every item; computed once."""
        if like.itself not in self._listed:
            item_encoder = self.scorer.model.item_encoder
            term = ContentKNNTerm(*like.alike.shape, itself=like.itself).to(like.likeness)
            term.fit(
                {name: item_encoder.vectors.get_buffer(name) for name in item_encoder.names}, item_encoder.presence
            )
            self._listed[like.itself] = term
        return self._listed[like.itself]


class _Blend(NamedTuple):
    """A model's terms on validation, and the protocols that they are tuned for."""

    model: MISSRec
    validation: Validation
    protocols: Sequence[str]
    network: bool

    @torch.no_grad()
    def best(
        self,
        grid: Sequence[tuple[float, ...]],
        choose: Callable[[tuple[float, ...]], object],
        of: Callable[[Tensor], Callable[[], Tensor]],
    ) -> tuple[tuple[float, ...], float, float]:
        """Choose the settings of a term, by NDCG@10 of the model's present score plus the term, mean over protocols.

        Parameters
        ----------
        grid : sequence of tuple of float
            Settings, the weight first.
        choose : callable
            Makes such settings those of the term.
        of : callable
            Takes items [batch, seq] and returns what computes their term, [batch, row], with the present settings.

        Returns
        -------
        best : tuple of float
            The chosen settings, the first of equals.
        ndcg, without : float
            Their NDCG@10, and that of the first settings of the grid.
        """
        total, scorer = np.zeros(len(grid)), self.validation.scorer
        for parts, seen, targets in self.validation.chunks():
            choose((0.0, *grid[0][1:]))
            own = scorer.combined(parts, self.model.terms, network=self.network)
            seen, targets, unit, computed = seen.to(own.device), targets.to(own.device), own, None
            term = of(parts.item_ids)
            for index, (weight, *others) in enumerate(grid):
                if others != computed:
                    choose((1.0, *others))
                    unit, computed = term(), others
                total[index] += _ndcg(torch.add(own, unit, alpha=weight), targets, seen, self.protocols)
        best = int(total.argmax())
        choose(grid[best])
        ndcg = total / max(len(self.validation.histories), 1)
        return grid[best], float(ndcg[best]), float(ndcg[0])

    def scored(self) -> Iterator[Chunk]:
        """Yield the validation sessions that have a known item, with the model's present scores."""
        for parts, seen, targets in self.validation.chunks():
            scores, known = self.validation.scorer.combined(parts, self.model.terms, network=self.network), ~parts.empty
            yield Chunk(scores[known], parts.item_ids[known], seen.to(known.device)[known], targets[known.cpu()])

    def seen(self, item_ids: Tensor) -> Tensor:
        """Return [batch, row]: 1 for the items of the session, 0 for all others."""
        found = torch.zeros(len(item_ids), self.validation.catalogue.n_rows, device=item_ids.device)
        return found.scatter_(1, item_ids, (item_ids > UNKNOWN_ROW).to(found.dtype))


def distinct(sessions: Sessions) -> Tensor:
    """Return the items of whole sessions, [batch, seq], each once and elsewhere 0: what ``excluded`` leaves out.

    Examples
    --------
    >>> distinct(Sessions(np.array([5, 7, 5, 9]), np.array([0, 3, 4]))).tolist()
    [[5, 7, 0], [9, 0, 0]]
    """
    items = torch.from_numpy(sessions.padded(range(len(sessions)), int(sessions.lengths.max(initial=1))))
    return items * first_occurrences(items)


def _ndcg(scores: Tensor, targets: Tensor, seen: Tensor, protocols: Sequence[str]) -> float:
    """Return the sum over sessions of NDCG@10, mean over protocols; one pass over the scores [batch, row].

    Only sessions whose target has fewer than ten better items are looked at again, for ties and for what was seen.
    """
    own = scores.gather(1, targets[:, None])
    better, theirs, is_item = n_true(scores > own), scores.gather(1, seen), seen > UNKNOWN_ROW
    better_seen = (is_item & (theirs > own)).sum(1)
    near = torch.nonzero(better - better_seen < _CUTOFF).flatten()
    ties = (scores[near] == own[near]) & (torch.arange(scores.shape[1], device=near.device) < targets[near, None])
    kept = torch.where(torch.isneginf(own[near, 0]), MISSED, 1 + better[near] + n_true(ties))
    ranks = [kept for protocol in protocols if protocol != EXCLUDED]
    if EXCLUDED in protocols:
        tied_seen = (is_item & (theirs == own) & (seen < targets[:, None])).sum(1)
        is_seen = (seen == targets[:, None]).any(1)
        is_missed = is_seen[near] | (kept == MISSED)
        ranks.append(torch.where(is_missed, MISSED, kept - (better_seen + tied_seen)[near]))
    stacked = torch.stack(ranks).double()
    return float(torch.where(stacked <= _CUTOFF, 1 / torch.log2(stacked + 1), 0.0).sum() / len(ranks))


def _settings(model: MISSRec, item_knn: ItemKNNTerm, decay: float, power: float, logits: float) -> ItemKNNSettings:
    """Translate logits per co-occurrence of average items into a weight in score units."""
    frequency = item_knn.frequency
    average = float((frequency * (frequency + 5)).sum() / frequency.sum().clamp_min(1))
    return ItemKNNSettings(logits * model.config.temperature * average ** (2 * power), decay, power)
