"""After the priors: what items without events borrow, and their level, chosen on trained items that are treated as new.

A tenth of the trained items is hidden: out of the histories, without own counts, and with the mean fused score of their
look-alikes in place of their own, since the model learned them as targets. The level gives them the share of the first
ten places that they have among the targets; of the weights that find hidden targets about as often as the best, those
are taken that cost the other targets least. Where there are real newcomers, the level is then set anew on them: they
take the share of the places that as many trained items would be worth, and not what the stand-in scores make of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import chunk_size, exclude_seen, slice_sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import track
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings, ColdStartTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.schema import FIRST_ITEM_ROW, UNKNOWN_ROW

Choice = tuple[float, ...]
"""Modalities by which look-alikes are found: 1 or 0 for each."""

_SHARE = 0.1
_MOST_HIDDEN = 2000
_FEWEST_TARGETS = 20
"""Hidden targets below which nothing is chosen: newcomers stay where the model puts them."""
_PLACES = 10
_DRAWS = 2
"""How often a tenth is hidden; the points of the grid are compared by their means."""
_MOST_SESSIONS = 3000
_MOST_TARGETS = 1000
"""Sessions drawn at random, and further ones whose target is hidden, which a tenth of the first would be too few of."""
_SLACK = 0.5
"""Standard errors of the best hidden recall within which a cheaper point is taken."""
_NEIGHBOURS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Factors of the borrowed prior on the grid; 1 is the look-alikes' mean, which lies below their best."""
_BARS = (0.0, 0.5, 0.75, 1.0)
_CONTENT = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
"""Score per cosine on the grid, in units of the mean distance between a session's first and tenth score."""


class _Parts(NamedTuple):
    """What a point of the grid needs of the sessions: other items' best scores, and the hidden items' parts."""

    best: Tensor
    """[session, 10]: scores of the best other items that the session does not hold, descending."""
    target: Tensor
    """[session]: score of the target, -inf where it is hidden or seen."""
    place: Tensor
    """[session]: which hidden item is the target, -1 where none is."""
    drawn: Tensor
    """[session], bool: True where the session was drawn at random, so that it counts for places and other targets."""
    own: Tensor
    """[session, hidden]: what the hidden items score without being lent anything."""
    neighbours: Tensor
    """[session, hidden]."""
    content: Tensor
    """[session, hidden]."""
    bar: Tensor
    """[session, 1]."""


class _Outcome(NamedTuple):
    hidden: float
    """Recall@10 on the hidden targets."""
    others: float
    """NDCG@10 on the other targets."""
    exposure: float
    """Share of the first ten places that hidden items take."""


def fit_cold_start(model: MISSRec, catalogue: Catalogue, valid: Sessions, *, seed: int = 0) -> dict[str, Any]:
    """Choose the settings of `ColdStartTerm`; the priors are in place.

    Parameters
    ----------
    model : MISSRec
        With a neighbour prior that has been fitted.
    valid : Sessions
        Histories with their target.

    Returns
    -------
    dict
        The chosen settings and modalities; on validation the Recall@10 of hidden and the NDCG@10 of other targets, and
        the share of the places. Empty where validation has too few targets to choose by.
    """
    prior = model.item_knn
    assert prior is not None
    assert prior.cold_start is not None
    newcomers, names = prior.cold_start, model.item_encoder.names
    newcomers.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
    draws = [_draw(model, prior, catalogue, valid, seed + number) for number in range(_DRAWS)]
    choices = [choice for choice in draws[0] if all(choice in draw for draw in draws)]
    asked = sum(int((parts.place >= 0).sum()) for draw in draws for parts in list(draw.values())[:1])
    if asked < _FEWEST_TARGETS or not choices:
        model.find_cold_items()
        return {}
    found = [
        (outcome, settings, choice)
        for choice in choices
        for settings, outcome in _tried([draw[choice] for draw in draws], model.config.cold_start_exposure)
    ]
    best = max(outcome.hidden for outcome, *_ in found)
    enough = best - _SLACK * math.sqrt(best * (1 - best) / asked)
    outcome, settings, choice = max(
        (one for one in found if one[0].hidden >= enough), key=lambda one: (one[0].others, one[0].hidden)
    )
    newcomers.choose(settings)
    newcomers.modalities.copy_(torch.tensor(choice))
    model.find_cold_items()
    if len(newcomers.rows):
        share = model.config.cold_start_exposure * _worth(draws, len(newcomers.rows))
        newcomers.choose(_levelled(model, newcomers, catalogue, valid, share, seed))
    chosen = [name for name, used in zip(names, choice, strict=True) if used]
    measures = {"recall@10": outcome.hidden, "others_ndcg@10": outcome.others, "exposure": outcome.exposure}
    return {**newcomers.chosen._asdict(), "modalities": chosen, "valid": measures}


def _draw(model: MISSRec, prior: ItemKNNTerm, catalogue: Catalogue, valid: Sessions, seed: int) -> dict[Choice, _Parts]:
    """Hide a tenth of the items and return, by choice of modalities, what the grid needs."""
    hidden = _hide(model, prior, seed)
    shown, targets, drawn = _sample(valid, hidden.cpu().numpy(), seed)
    trials = _trials(model, prior, hidden) if hidden.any() and len(shown) else []
    if not trials:
        return {}
    measured = _measure(model, prior, trials, catalogue, shown, targets, drawn, hidden)
    return {tuple(trial.modalities.tolist()): parts for trial, parts in zip(trials, measured, strict=True)}


def _sample(valid: Sessions, hidden: npt.NDArray[np.bool_], seed: int) -> tuple[Sessions, Tensor, Tensor]:
    """Return histories without the hidden items, their targets, and which of them stand for all [session]."""
    histories, targets = valid.split_last()
    values = np.where(hidden[histories.values], UNKNOWN_ROW, histories.values)
    shown = Sessions(values, histories.offsets, histories.features).known()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(shown.lengths > 0))
    further = order[_MOST_SESSIONS:]
    chosen = np.concatenate([order[:_MOST_SESSIONS], further[hidden[targets[further]]][:_MOST_TARGETS]])
    by_length = np.argsort(shown.lengths[chosen], kind="stable")  # equal lengths in a chunk: little padding
    drawn = torch.from_numpy(by_length < _MOST_SESSIONS)
    return shown.take(chosen[by_length]), torch.from_numpy(targets[chosen[by_length]]), drawn


def _hide(model: MISSRec, prior: ItemKNNTerm, seed: int) -> Tensor:
    """Return [row], bool: the trained items with content that count as new."""
    trained = (prior.frequency > 0) & model.recommendable & model.item_encoder.presence.any(0)
    trained[:FIRST_ITEM_ROW] = False
    rows = torch.nonzero(trained).flatten().cpu().numpy()
    drawn = np.random.default_rng(seed).permutation(rows)[: min(int(_SHARE * len(rows)), _MOST_HIDDEN)]
    hidden = torch.zeros_like(trained)
    hidden[torch.from_numpy(drawn)] = True
    return hidden


def _trials(model: MISSRec, prior: ItemKNNTerm, hidden: Tensor) -> list[ColdStartTerm]:
    """Return the look-alikes of the hidden items by all modalities, and by each that all of them have."""
    widths = [model.item_encoder.vectors.get_buffer(name).shape[1] for name in model.item_encoder.names]
    choices = [torch.ones(len(widths)), *(torch.eye(len(widths)) if len(widths) > 1 else ())]
    trials = []
    for modalities in choices:
        trial = ColdStartTerm(widths).to(hidden.device)
        trial.modalities.copy_(modalities)
        trial.find(model.item_encoder, hidden, (prior.frequency > 0) & ~hidden, by_tokens=False)
        trials += [trial] if len(trial.rows) == int(hidden.sum()) else []
    return trials


@torch.no_grad()
def _measure(
    model: MISSRec,
    prior: ItemKNNTerm,
    trials: list[ColdStartTerm],
    catalogue: Catalogue,
    shown: Sessions,
    targets: Tensor,
    drawn: Tensor,
    hidden: Tensor,
) -> list[_Parts]:
    """Return for every trial what the grid needs; the model scores the sessions once."""
    scorer, lookalikes = ModelScorer.with_popularity(model, catalogue), model.content_knn
    rows = trials[0].rows
    place = torch.full((len(hidden),), -1).index_copy_(0, rows.cpu(), torch.arange(len(rows)))
    chunks: list[list[_Parts]] = [[] for _ in trials]
    step = chunk_size(len(hidden))
    for start in track(range(0, len(shown), step), "weighing newcomers"):
        chunk, wanted = slice_sessions(shown, start, start + step), targets[start : start + step]
        item_ids = torch.from_numpy(chunk.padded(range(len(chunk)), model.config.max_sequence_length)).to(scorer.device)
        scores = scorer(chunk)
        similar = lookalikes(item_ids) if lookalikes is not None and lookalikes.active else torch.zeros_like(scores)
        bought = prior(item_ids) if prior.active else torch.zeros_like(scores)
        fused = (scores - bought - similar).masked_fill_(torch.isneginf(scores), 0.0)
        others = exclude_seen(scores.masked_fill(hidden, -torch.inf), chunk)
        best, target = others.topk(_PLACES, dim=1).values, others.gather(1, wanted[:, None].to(scores.device))[:, 0]
        for trial, done in zip(trials, chunks, strict=True):
            own = trial.lent(fused) + similar[:, rows]
            part = _Parts(
                best,
                target,
                place[wanted],
                drawn[start : start + step],
                own,
                *trial.borrowed(item_ids, bought, model.item_encoder),
            )
            done.append(_Parts(*(tensor.cpu() for tensor in part)))
    return [_Parts(*(torch.cat(tensors) for tensors in zip(*done, strict=True))) for done in chunks]


def _tried(draws: list[_Parts], exposure: float) -> Iterator[tuple[ColdStartSettings, _Outcome]]:
    """Yield every point of the grid, at the mean of the levels where hidden items take their share of the places."""
    unit = sum(float((parts.best[:, 0] - parts.best[:, -1]).nan_to_num(posinf=0.0).mean()) for parts in draws)
    bought = any(bool(parts.neighbours.any()) for parts in draws)
    for factor, cosine in product(_NEIGHBOURS if bought else (0.0,), _CONTENT):
        content = cosine * unit / len(draws)
        lent = [parts.own + factor * parts.neighbours + content * parts.content for parts in draws]
        tops = [scores.topk(min(_PLACES, scores.shape[1]), dim=1).values for scores in lent]
        for bar in _BARS if bought else (0.0,):
            tried = [
                _placed(parts, scores + bar * parts.bar, top + bar * parts.bar, exposure)
                for parts, scores, top in zip(draws, lent, tops, strict=True)
            ]
            level = sum(level for level, _ in tried) / len(tried)
            means = (sum(values) / len(tried) for values in zip(*(outcome for _, outcome in tried), strict=True))
            yield ColdStartSettings(factor, content, bar, level), _Outcome(*means)


def _placed(parts: _Parts, scores: Tensor, top: Tensor, exposure: float) -> tuple[float, _Outcome]:
    """Return the level that gives hidden items ``exposure`` times their share of the targets, and what comes of it."""
    share = exposure * float((parts.place[parts.drawn] >= 0).float().mean())
    level = _level(parts.best[parts.drawn], top[parts.drawn], share)
    return level, _outcome(parts, scores + level, top + level)


def _worth(draws: list[dict[Choice, _Parts]], count: int) -> float:
    """Return the share of the targets that ``count`` further items would have if asked for like hidden ones."""
    parts = [next(iter(draw.values())) for draw in draws]
    asked = sum(float((part.place[part.drawn] >= 0).float().mean()) / part.own.shape[1] for part in parts) / len(parts)
    return count * asked / (1 + count * asked)


@torch.no_grad()
def _levelled(
    model: MISSRec,
    newcomers: ColdStartTerm,
    catalogue: Catalogue,
    valid: Sessions,
    share: float,
    seed: int,
) -> ColdStartSettings:
    """Return the settings with the level that gives the real newcomers ``share`` of the first ten places."""
    scorer = ModelScorer.with_popularity(model, catalogue)
    histories = valid.split_last()[0].known()
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(histories.lengths > 0))[:_MOST_SESSIONS]
    shown = histories.take(drawn[np.argsort(histories.lengths[drawn], kind="stable")])
    best, top, step = [], [], chunk_size(catalogue.n_rows)
    for start in track(range(0, len(shown), step), "levelling newcomers"):
        chunk = slice_sessions(shown, start, start + step)
        scores = exclude_seen(scorer(chunk), chunk)
        theirs = scores[:, newcomers.rows]
        top.append(theirs.topk(min(_PLACES, theirs.shape[1]), dim=1).values.cpu())
        best.append(scores.index_fill_(1, newcomers.rows, -torch.inf).topk(_PLACES, dim=1).values.cpu())
    settings = newcomers.chosen
    return settings._replace(level=settings.level + _level(torch.cat(best), torch.cat(top), share))


def _level(best: Tensor, top: Tensor, share: float) -> float:
    """Return, by halving, what is added to the hidden items so that they take ``share`` of the first ten places."""
    finite, theirs = best[torch.isfinite(best)], top[torch.isfinite(top)]
    if not len(finite) or not len(theirs):
        return 0.0
    low, high = float(finite.min() - theirs.max()) - 1, float(finite.max() - theirs.min()) + 1
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _exposure(best, top + middle) > share else (middle, high)
    return low


def _exposure(best: Tensor, top: Tensor) -> float:
    above = (best.unsqueeze(1) > top.unsqueeze(2)).sum(2) + torch.arange(top.shape[1])
    return float((above < _PLACES).sum()) / (_PLACES * len(best))


def _outcome(parts: _Parts, scores: Tensor, top: Tensor) -> _Outcome:
    hidden, other = parts.place >= 0, (parts.place < 0) & parts.drawn
    own = scores[hidden].gather(1, parts.place[hidden, None])
    above = (parts.best[hidden] > own).sum(1) + (scores[hidden] > own).sum(1)
    target = parts.target[other, None]
    passed = (parts.best[other] > target).sum(1) + (top[other] > target).sum(1)
    gains = torch.where(passed < _PLACES, 1 / torch.log2(passed.double() + 2), 0.0)
    recall = float((above < _PLACES).double().mean().nan_to_num(0.0))
    return _Outcome(recall, float(gains.mean().nan_to_num(0.0)), _exposure(parts.best[parts.drawn], top[parts.drawn]))
