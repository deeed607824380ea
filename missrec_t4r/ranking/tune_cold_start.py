"""Tune the cold-start term on validation, with a tenth of the warm items as pseudo-cold items (E20).

The pseudo-cold items are hidden: out of the histories, without counts, and with the mean network score of their most
similar items in place of their own, since the network learned them as targets. For every point of the grid the bias
gives them the share of the top-10 exposure that they have among the targets; of the points that find hidden targets
about as often as the best, the one is taken that costs the other targets least. Where there are real cold items, the
bias is then calibrated on them: they take the share of the exposure that as many warm items deserve, and not what the
stand-in scores of the pseudo-cold ones happen to give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Bools
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import chunks_of, exclude_seen
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings, ColdStartTerm, tenth_largest
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.schema import FIRST_ITEM_ROW, UNKNOWN_ROW

Choice = tuple[float, ...]
"""Modalities by which similar items are found: 1 or 0 for each."""

_SHARE = 0.1
_MOST_HIDDEN = 2000
_FEWEST_TARGETS = 20
"""Hidden targets below which nothing is tuned: the term stays off."""
_TOP = 10
"""Length of the lists whose exposure is shared out."""
_DRAWS = 2
"""How often a tenth is drawn and hidden; the points of the grid are compared by their means."""
_MOST_SESSIONS = 3000
_MOST_TARGETS = 1000
"""Sessions drawn at random, and further ones whose target is hidden, which a tenth of the first would be too few of."""
_SLACK = 0.5
"""Standard errors of the best hidden recall within which a point with less cost is taken."""
_NEIGHBOURS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Factors of the imputed item-kNN term on the grid; 1 is the mean of the similar items, below their best."""
_THRESHOLDS = (0.0, 0.5, 0.75, 1.0)
_CONTENT = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
"""Score per cosine on the grid, in units of the mean distance between a session's first and tenth score."""


class _Parts(NamedTuple):
    """What a point of the grid is computed from: the best scores of other items, and the parts of the hidden items."""

    best: Tensor
    """[session, 10]: scores of the best other items that the session does not hold, descending."""
    target: Tensor
    """[session]: score of the target, -inf where it is hidden or seen."""
    hidden_target: Tensor
    """[session]: which hidden item is the target, -1 where none is."""
    drawn: Tensor
    """[session], bool: True where the session was drawn at random, so that it counts for exposure and other targets."""
    own: Tensor
    """[session, hidden]: scores of the hidden items without the term."""
    neighbours: Tensor
    """[session, hidden]."""
    content: Tensor
    """[session, hidden]."""
    threshold: Tensor
    """[session, 1]."""


class _Outcome(NamedTuple):
    hidden: float
    """Recall@10 on the hidden targets."""
    others: float
    """NDCG@10 on the other targets."""
    exposure: float
    """Share of the top-10 lists that hidden items take."""


def fit_cold_start(model: MISSRec, catalogue: Catalogue, valid: Sessions) -> dict[str, Any]:
    """Tune the settings of `ColdStartTerm`; item-kNN and content-kNN term are tuned already.

    Parameters
    ----------
    model : MISSRec
        With a fitted item-kNN term.
    valid : Sessions
        Histories with their target.

    Returns
    -------
    dict
        The chosen settings and modalities; on validation the Recall@10 of hidden and the NDCG@10 of other targets, and
        the exposure. Empty where validation has too few hidden targets.
    """
    term = terms_of(model).cold_start
    assert term is not None
    term.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
    scorer = ModelScorer.with_popularity(model, catalogue)
    draws = [_draw(scorer, term.item_knn, valid, seed) for seed in range(_DRAWS)]
    choices = [choice for choice in draws[0] if all(choice in draw for draw in draws)]
    n_hidden_targets = sum(int((parts.hidden_target >= 0).sum()) for draw in draws for parts in list(draw.values())[:1])
    if n_hidden_targets < _FEWEST_TARGETS or not choices:
        term.refresh()
        return {}
    tried = [
        (outcome, settings, choice)
        for choice in choices
        for settings, outcome in _try_grid([draw[choice] for draw in draws], model.config.cold_start_exposure)
    ]
    best = max(outcome.hidden for outcome, *_ in tried)
    enough = best - _SLACK * math.sqrt(best * (1 - best) / n_hidden_targets)
    outcome, settings, choice = max(
        (trial for trial in tried if trial[0].hidden >= enough), key=lambda trial: (trial[0].others, trial[0].hidden)
    )
    term.choose(settings)
    term.modalities.copy_(torch.tensor(choice))
    term.refresh()
    if len(term.rows):
        share = model.config.cold_start_exposure * _worth(draws, len(term.rows))
        term.choose(_calibrated(scorer, term, valid, share))
    return {
        **term.chosen._asdict(),
        "modalities": [name for name, used in zip(term.names, choice, strict=True) if used],
        "valid": {"recall@10": outcome.hidden, "others_ndcg@10": outcome.others, "exposure": outcome.exposure},
    }


def _draw(scorer: ModelScorer, item_knn: ItemKNNTerm, valid: Sessions, seed: int) -> dict[Choice, _Parts]:
    """Hide a tenth of the items; return, by choice of modalities, what the grid is computed from."""
    hidden = _hide(scorer.model, item_knn, seed)
    sample = _sample(valid, hidden.cpu().numpy(), seed)
    trials = _trials(scorer.model, item_knn, hidden) if hidden.any() and len(sample.shown) else []
    return _measure(scorer, item_knn, trials, sample, hidden) if trials else {}


class _Sample(NamedTuple):
    shown: Sessions
    """Histories without the hidden items."""
    targets: Tensor
    """[session]."""
    drawn: Tensor
    """[session], bool: as in `_Parts`."""


def _sample(valid: Sessions, hidden: Bools, seed: int) -> _Sample:
    histories, targets = valid.split_last()
    values = np.where(hidden[histories.values], UNKNOWN_ROW, histories.values)
    shown = Sessions(values, histories.offsets, histories.features).known()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(shown.lengths > 0))
    further = order[_MOST_SESSIONS:]
    chosen = np.concatenate([order[:_MOST_SESSIONS], further[hidden[targets[further]]][:_MOST_TARGETS]])
    by_length = np.argsort(shown.lengths[chosen], kind="stable")  # equal lengths in a chunk: little padding
    drawn = torch.from_numpy(by_length < _MOST_SESSIONS)
    return _Sample(shown.take(chosen[by_length]), torch.from_numpy(targets[chosen[by_length]]), drawn)


def _hide(model: MISSRec, item_knn: ItemKNNTerm, seed: int) -> Tensor:
    """Return [row], bool: the warm items with content that are hidden."""
    trained = (item_knn.frequency > 0) & model.recommendable & model.item_encoder.presence.any(0)
    trained[:FIRST_ITEM_ROW] = False
    rows = torch.nonzero(trained).flatten().cpu().numpy()
    drawn = np.random.default_rng(seed).permutation(rows)[: min(int(_SHARE * len(rows)), _MOST_HIDDEN)]
    hidden = torch.zeros_like(trained)
    hidden[torch.from_numpy(drawn)] = True
    return hidden


def _trials(model: MISSRec, item_knn: ItemKNNTerm, hidden: Tensor) -> list[ColdStartTerm]:
    """Return terms with the hidden items as cold ones: by all modalities, and by each that all of them have."""
    n_modalities = len(model.item_encoder.names)
    choices = [torch.ones(n_modalities), *(torch.eye(n_modalities) if n_modalities > 1 else ())]
    trials = []
    for modalities in choices:
        trial = ColdStartTerm(model.item_encoder, item_knn).to(hidden.device)
        trial.modalities.copy_(modalities)
        trial.find(hidden, (item_knn.frequency > 0) & ~hidden, by_embeddings=False)
        trials += [trial] if len(trial.rows) == int(hidden.sum()) else []
    return trials


@torch.no_grad()
def _measure(
    scorer: ModelScorer, item_knn: ItemKNNTerm, trials: list[ColdStartTerm], sample: _Sample, hidden: Tensor
) -> dict[Choice, _Parts]:
    """Return what the grid is computed from, by choice of modalities; the model scores the sessions once."""
    model, content_knn = scorer.model, terms_of(scorer.model).content_knn
    rows = trials[0].rows
    index_of = torch.full((len(hidden),), -1).index_copy_(0, rows.cpu(), torch.arange(len(rows)))
    measured: dict[Choice, list[_Parts]] = {tuple(trial.modalities.tolist()): [] for trial in trials}
    for at, chunk in chunks_of(sample.shown, len(hidden), "tuning the cold-start term"):
        targets = sample.targets[at]
        item_ids = torch.from_numpy(chunk.padded(range(len(chunk)), model.config.max_sequence_length)).to(scorer.device)
        scores = scorer(chunk)
        similar = content_knn(item_ids) if content_knn is not None and content_knn.active else torch.zeros_like(scores)
        counted = item_knn(item_ids) if item_knn.active else torch.zeros_like(scores)
        network = (scores - counted - similar).masked_fill_(torch.isneginf(scores), 0.0)
        others = exclude_seen(scores.masked_fill(hidden, -torch.inf), chunk)
        best, target = others.topk(_TOP, dim=1).values, others.gather(1, targets[:, None].to(scores.device))[:, 0]
        for trial, parts in zip(trials, measured.values(), strict=True):
            tensors = (
                best,
                target,
                index_of[targets],
                sample.drawn[at],
                trial.mean_of_similar(network) + similar[:, rows],
                trial.mean_of_similar(counted),
                trial.likeness_to(item_ids),
                tenth_largest(counted),
            )
            parts.append(_Parts(*(tensor.cpu() for tensor in tensors)))
    return {choice: _Parts(*map(torch.cat, zip(*parts, strict=True))) for choice, parts in measured.items()}


def _try_grid(draws: list[_Parts], exposure: float) -> Iterator[tuple[ColdStartSettings, _Outcome]]:
    """Yield every point of the grid, at the mean of the biases with which hidden items take their exposure."""
    unit = sum(float((parts.best[:, 0] - parts.best[:, -1]).nan_to_num(posinf=0.0).mean()) for parts in draws)
    counted = any(bool(parts.neighbours.any()) for parts in draws)
    for factor, cosine in product(_NEIGHBOURS if counted else (0.0,), _CONTENT):
        content = cosine * unit / len(draws)
        imputed = [parts.own + factor * parts.neighbours + content * parts.content for parts in draws]
        tops = [scores.topk(min(_TOP, scores.shape[1]), dim=1).values for scores in imputed]
        for threshold in _THRESHOLDS if counted else (0.0,):
            outcomes = [
                _at_exposure(parts, scores + threshold * parts.threshold, top + threshold * parts.threshold, exposure)
                for parts, scores, top in zip(draws, imputed, tops, strict=True)
            ]
            bias = sum(bias for bias, _ in outcomes) / len(outcomes)
            means = np.mean([outcome for _, outcome in outcomes], axis=0).tolist()
            yield ColdStartSettings(factor, content, threshold, bias), _Outcome(*means)


def _at_exposure(parts: _Parts, scores: Tensor, top: Tensor, exposure: float) -> tuple[float, _Outcome]:
    """Return the bias that gives hidden items ``exposure`` times their share of the targets, and the outcome."""
    share = exposure * float((parts.hidden_target[parts.drawn] >= 0).float().mean())
    bias = _bias(parts.best[parts.drawn], top[parts.drawn], share)
    return bias, _outcome(parts, scores + bias, top + bias)


def _worth(draws: list[dict[Choice, _Parts]], count: int) -> float:
    """Return the share of the targets that ``count`` further items would have if they were as frequent."""
    parts = [next(iter(draw.values())) for draw in draws]
    shares = [float((part.hidden_target[part.drawn] >= 0).float().mean()) / part.own.shape[1] for part in parts]
    further = count * sum(shares) / len(shares)
    return further / (1 + further)


@torch.no_grad()
def _calibrated(scorer: ModelScorer, term: ColdStartTerm, valid: Sessions, share: float) -> ColdStartSettings:
    """Return the settings with the bias that gives the real cold items ``share`` of the top-10 exposure."""
    histories = valid.split_last()[0].known()
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(histories.lengths > 0))[:_MOST_SESSIONS]
    shown = histories.take(drawn[np.argsort(histories.lengths[drawn], kind="stable")])
    best, top = [], []
    for _, chunk in chunks_of(shown, scorer.model.item_encoder.n_rows, "calibrating the cold-start bias"):
        scores = exclude_seen(scorer(chunk), chunk)
        of_cold = scores[:, term.rows]
        top.append(of_cold.topk(min(_TOP, of_cold.shape[1]), dim=1).values.cpu())
        best.append(scores.index_fill_(1, term.rows, -torch.inf).topk(_TOP, dim=1).values.cpu())
    settings = term.chosen
    return settings._replace(bias=settings.bias + _bias(torch.cat(best), torch.cat(top), share))


def _bias(best: Tensor, top: Tensor, share: float) -> float:
    """Return, by bisection, the bias with which the hidden items take ``share`` of the top-10 exposure."""
    warm, cold = best[torch.isfinite(best)], top[torch.isfinite(top)]
    if not len(warm) or not len(cold):
        return 0.0
    low, high = float(warm.min() - cold.max()) - 1, float(warm.max() - cold.min()) + 1  # nowhere, everywhere
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _exposure(best, top + middle) > share else (middle, high)
    return low


def _exposure(best: Tensor, top: Tensor) -> float:
    above = (best.unsqueeze(1) > top.unsqueeze(2)).sum(2) + torch.arange(top.shape[1])
    return float((above < _TOP).sum()) / (_TOP * len(best))


def _outcome(parts: _Parts, scores: Tensor, top: Tensor) -> _Outcome:
    hidden, other = parts.hidden_target >= 0, (parts.hidden_target < 0) & parts.drawn
    own = scores[hidden].gather(1, parts.hidden_target[hidden, None])
    above = (parts.best[hidden] > own).sum(1) + (scores[hidden] > own).sum(1)
    target = parts.target[other, None]
    passed = (parts.best[other] > target).sum(1) + (top[other] > target).sum(1)
    gains = torch.where(passed < _TOP, 1 / torch.log2(passed.double() + 2), 0.0)
    recall = float((above < _TOP).double().mean().nan_to_num(0.0))
    return _Outcome(recall, float(gains.mean().nan_to_num(0.0)), _exposure(parts.best[parts.drawn], top[parts.drawn]))
