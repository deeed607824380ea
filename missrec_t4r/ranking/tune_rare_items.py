"""Tune the rare-item term on validation: the best ranking of rare and cold targets for at most a given cost (E21).

    maximise NDCG@10 of rare targets + NDCG@10 of cold targets
    subject to NDCG@10 of all targets >= (1 - cost) times that without the term

The second line is the mean over the protocols that the model is tuned for, in which cold targets count twice: training
has none, the next split has those of this one and new ones. The points of a grid are compared by the Lagrangian, group
by group, for a falling multiplier; the first result that meets the constraint is taken. Without enough rare targets the
term stays off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.evaluation.full_ranking import EXCLUDED
from missrec_t4r.evaluation.slices import RARE_BELOW
from missrec_t4r.progress import track
from missrec_t4r.ranking.terms.rare_items import N_GROUPS, RareItemTerm
from missrec_t4r.schema import UNKNOWN_ROW

Point = tuple[float, float]
"""Content weight and offset of a group, in units of a session's score range."""
Points = tuple[Point, ...]
"""One per group."""
Choice = tuple[float, ...]
"""Modalities whose cosine is used: 1 or 0 for each."""

_OFF: Final = (0.0, 0.0)
_CONTENT = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_OFFSETS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
_GRID = tuple(point for point in product(_CONTENT, _OFFSETS) if sum(point) >= 0)
"""Points that do not lower the ten most similar items: few targets do not show what lowering them costs."""
_MULTIPLIERS = (0.005, 5.0)
"""What a unit of NDCG@10 of rare and cold targets is worth, in units of that of all: least and most."""
_BISECTIONS = 7
_ROUNDS = 2
_FEWEST_TARGETS = 20
"""Rare targets on validation below which the term stays off."""
_COLD_COUNTS = 2.0
_TOP = 10
_MOST_CELLS = 1 << 24
"""Sessions times rare items that are kept; where there are more, every second, third ... session is left out."""


class Chunk(NamedTuple):
    """A batch of validation sessions with their scores."""

    scores: Tensor
    """[batch, row]: with all other terms."""
    item_ids: Tensor
    """[batch, seq]: what the model reads of the session."""
    seen: Tensor
    """[batch, any]: the items of the whole session, elsewhere 0."""
    targets: Tensor
    """[batch]."""


class _Ranked(NamedTuple):
    """Scores from which NDCG@10 is computed under one protocol."""

    best: Tensor
    """[session, 10]: scores of the best items that the term does not change, descending."""
    target: Tensor
    """[session]: score of the target; -inf where it cannot be recommended."""
    own: Tensor
    """[session, rare]: scores without the term; -inf for items that it does not change."""
    place: Tensor
    """[session]: which rare item the target is, -1 where the term does not change it."""


class _Group(NamedTuple):
    """The scores of a group with one point of the grid."""

    top: Tensor
    """[session, 10]: the best of them, descending."""
    target: Tensor
    """[session]: score of the target, NaN where it is of another group."""


class _Outcome(NamedTuple):
    overall: float
    """NDCG@10 of all targets, cold ones counted twice."""
    rare: float
    cold: float

    def worth(self, multiplier: float) -> float:
        """Return the Lagrangian."""
        return self.overall + multiplier * (self.rare + self.cold)


def fit_rare_items(
    term: RareItemTerm, chunks: Iterable[Chunk], n_sessions: int, protocols: Sequence[str], cost: float
) -> dict[str, Any]:
    """Choose the settings of the term; all other terms are tuned already, and this one is off.

    Parameters
    ----------
    term : RareItemTerm
    chunks : iterable of Chunk
        The validation sessions.
    n_sessions : int
        Their number.
    protocols : sequence of str
        NDCG@10 is the mean over them.
    cost : float
        Largest share of the overall NDCG@10 that may be lost.

    Returns
    -------
    dict
        Content weights and offsets per group (cold, 1 or 2 events, 3 or 4), the modalities, and the NDCG@10 on
        validation of all, rare and cold targets, with and without the term. Empty where the term stays off.
    """
    term.fit()
    term.switch_off()
    term.find(term.rare())
    if not len(term.rows):
        return {}
    stride = -(-n_sessions * len(term.rows) // _MOST_CELLS)
    search = _Search(term, (Chunk(*(part[::stride] for part in chunk)) for chunk in chunks), protocols)
    term.switch_off()
    if int(search.rare.sum()) < _FEWEST_TARGETS:
        return {}
    choice = search.choice()
    before = search.measure(choice, (_OFF,) * N_GROUPS)
    points, after = search.constrained(choice, (1 - cost) * before.overall)
    settings = torch.tensor([search.scaled(choice, point) for point in points]).T  # [2, group]
    term.choose(settings, choice)
    return {
        "content": settings[0].tolist(),
        "offset": settings[1].tolist(),
        "modalities": [name for name, used in zip(term.names, choice, strict=True) if used],
        "valid": after._asdict(),
        "valid_without": before._asdict(),
    }


class _Search:
    """The validation sessions, measured under any settings of the term."""

    def __init__(self, term: RareItemTerm, chunks: Iterable[Chunk], protocols: Sequence[str]) -> None:
        n_modalities = len(term.names)
        self.choices: list[Choice] = [(1.0,) * n_modalities]
        if n_modalities > 1:
            self.choices += map(tuple, torch.eye(n_modalities).tolist())
        self.columns = [torch.nonzero(term.groups.cpu() == group).flatten() for group in range(N_GROUPS)]
        ranked: list[list[_Ranked]] = [[] for _ in protocols]
        likeness: list[list[Tensor]] = [[] for _ in self.choices]
        counts: list[Tensor] = []
        for chunk in chunks:
            counts.append(term.item_knn.frequency.cpu()[chunk.targets])
            for protocol, chunks_ranked in zip(protocols, ranked, strict=True):
                chunks_ranked.append(_ranked(term, chunk, protocol))
            for choice, cosines in zip(self.choices, likeness, strict=True):
                term.compare_by(choice)
                cosines.append(term.likeness_to(chunk.item_ids).cpu())
        self.ranked = [_Ranked(*map(torch.cat, zip(*chunks_ranked, strict=True))) for chunks_ranked in ranked]
        self.likeness = dict(zip(self.choices, map(torch.cat, likeness), strict=True))
        count = torch.cat(counts)
        self.rare, self.cold = count < RARE_BELOW, count == 0
        weights = torch.where(self.cold, _COLD_COUNTS, 1.0).double()
        self.weights = weights / weights.sum()
        ranges = [(own.best[:, 0] - own.best[:, -1]).nan_to_num(0.0, 0.0, 0.0).mean() for own in self.ranked]
        self.range = float(torch.stack(ranges).mean())
        top = min(_TOP, len(term.rows))
        self.near = {choice: float(own.topk(top, dim=1).values.mean()) for choice, own in self.likeness.items()}
        self.measure, self._group = cache(self._measure), cache(self._scores_of)  # the search comes back to them

    def scaled(self, choice: Choice, point: Point) -> Point:
        """Return a point in score units: a weight of 1 gives a session's ten most similar items its score range."""
        return point[0] * self.range / max(self.near[choice], 1e-6), point[1] * self.range

    def choice(self) -> Choice:
        """Return the modalities whose cosine alone, with the best weight, is worth most."""
        tried = track(list(product(self.choices, _CONTENT)), "choosing modalities for rare items")
        return max(tried, key=lambda trial: self.measure(trial[0], ((trial[1], 0.0),) * N_GROUPS).worth(1.0))[0]

    def constrained(self, choice: Choice, least: float) -> tuple[Points, _Outcome]:
        """Return the best points whose overall NDCG@10 is at least ``least``, by bisection of the multiplier."""
        points = (_OFF,) * N_GROUPS
        after = self.measure(choice, points)
        low, high = _MULTIPLIERS
        for _ in track(range(_BISECTIONS), "tuning the rare-item term"):
            middle = (low * high) ** 0.5
            tried = self.best(choice, middle)
            outcome = self.measure(choice, tried)
            low, high = (middle, high) if outcome.overall >= least else (low, middle)
            if outcome.overall >= least and outcome.rare + outcome.cold > after.rare + after.cold:
                points, after = tried, outcome
        return points, after

    def best(self, choice: Choice, multiplier: float) -> Points:
        """Return the best point of every group, found group by group."""

        def worth(points: Points) -> float:
            return self.measure(choice, points).worth(multiplier)

        points = max(((point,) * N_GROUPS for point in _GRID), key=worth)
        for _ in range(_ROUNDS):
            before = points
            for group in range(N_GROUPS):
                points = max(((*points[:group], point, *points[group + 1 :]) for point in _GRID), key=worth)
            if points == before:
                break
        return points

    def _measure(self, choice: Choice, points: Points) -> _Outcome:
        """Return NDCG@10 with one point per group."""
        outcomes = []
        for number, ranked in enumerate(self.ranked):
            groups = [self._group(choice, group, point)[number] for group, point in enumerate(points)]
            target = ranked.target
            for group in groups:
                target = torch.where(torch.isnan(group.target), target, group.target)
            above = (torch.cat([ranked.best, *(group.top for group in groups)], dim=1) > target[:, None]).sum(1)
            gains = torch.where((above < _TOP) & ~torch.isneginf(target), 1 / torch.log2(above.double() + 2), 0.0)
            slices = [float(gains[mask].mean().nan_to_num(0.0)) for mask in (self.rare, self.cold)]
            outcomes.append((float(gains @ self.weights), *slices))
        return _Outcome(*np.mean(outcomes, axis=0).tolist())

    def _scores_of(self, choice: Choice, group: int, point: Point) -> list[_Group]:
        """Return the scores of a group per protocol."""
        columns, (content, offset) = self.columns[group], self.scaled(choice, point)
        added = content * self.likeness[choice][:, columns] + offset
        inside = torch.full((self.likeness[choice].shape[1] + 1,), -1)  # the last place: no rare item
        inside[columns] = torch.arange(len(columns))
        return [_of_group(ranked.own[:, columns] + added, inside[ranked.place]) for ranked in self.ranked]


def _of_group(scores: Tensor, place: Tensor) -> _Group:
    if not scores.shape[1]:
        return _Group(scores, torch.full((len(scores),), torch.nan))
    target = scores.gather(1, place.clamp_min(0)[:, None])[:, 0]
    top = scores.topk(min(_TOP, scores.shape[1]), dim=1).values
    return _Group(top, torch.where(place >= 0, target, torch.nan))


def _ranked(term: RareItemTerm, chunk: Chunk, protocol: str) -> _Ranked:
    """Return what NDCG@10 of a chunk is computed from; items that the session holds keep their scores."""
    scores = chunk.scores.masked_fill(_held(chunk, chunk.seen), -torch.inf) if protocol == EXCLUDED else chunk.scores
    fixed = torch.zeros_like(scores, dtype=torch.bool) if term.itself else _held(chunk, chunk.item_ids)
    moved = torch.zeros_like(fixed)
    moved[:, term.rows] = ~fixed[:, term.rows]
    best = scores.masked_fill(moved, -torch.inf).topk(min(_TOP, scores.shape[1]), dim=1).values
    targets = chunk.targets.to(scores.device)[:, None]
    place = torch.where(moved.gather(1, targets)[:, 0], term.column[targets[:, 0]], -1)
    own = scores[:, term.rows].masked_fill(fixed[:, term.rows], -torch.inf)
    return _Ranked(*(part.cpu() for part in (best, scores.gather(1, targets)[:, 0], own, place)))


def _held(chunk: Chunk, items: Tensor) -> Tensor:
    """Return [batch, row], bool: True for the items."""
    return torch.zeros_like(chunk.scores, dtype=torch.bool).scatter_(1, items * (items > UNKNOWN_ROW), True)
