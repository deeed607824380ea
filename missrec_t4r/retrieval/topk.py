"""Exact top-k in a fixed order, ties by ascending row, from upper bounds of the scores and an exactness check.

A first pass bounds every item's score from above (a scan in 32 bits, or `int8_bounds`, more loosely for a fraction of
the bytes). The items with the best bounds are scored exactly. An item without an exact score is ruled out
once its bound is below the k-th exact score; while one is not, the search widens. The result is that of scoring
everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.retrieval.packed_scores import SCAN_ERROR, PackedItems

SPARE = 8
"""Items scored exactly beyond k, so that most searches need no second round."""
_BLOCK = 256
"""Items of a block, whose best bound is compared when the first threshold is chosen."""
_TOGETHER = 1 << 15
"""Up to so many rows the sessions of a batch are searched together; beyond, one after the other."""
_ROUND = 4096
"""Items scored at a time when the search has to widen."""
_FEW = 256
"""More items than these are scored in 32 bits first."""
_ROUNDING = 8e-6
"""By how much scores in 32 and in 64 bits may differ."""


class Found(NamedTuple):
    """The best items of one session."""

    scores: Tensor
    """[k], float32: descending."""
    rows: Tensor
    """[k], int64: equal scores in ascending order."""
    scored: int
    """Items that were scored exactly."""


class Batch(NamedTuple):
    """The best items of a batch of sessions."""

    found: list[Found]
    """Per session, at most k items."""
    passed: list[int]
    """Per session, the items that might have been returned."""


class Query(NamedTuple):
    """Session vectors of a batch, what is added to their scores, and the items that may be returned."""

    vectors: Tensor
    """[batch, dim]: unit length; zero for a session that is ranked by ``added`` alone."""
    added: Tensor
    """[batch, row]: what is added to the network's scores: score terms, or popularity."""
    allowed: Tensor
    """[batch, row], bool: False for items that must not be returned."""

    def take(self, sessions: slice | Tensor) -> Query:
        """Return the query of some sessions."""
        return Query(self.vectors[sessions], self.added[sessions], self.allowed[sessions])


def scan_bounds(table: PackedItems, query: Query) -> Tensor:
    """Return upper bounds [batch, row] that exceed the scores by rounding alone; -inf where not allowed."""
    scores = table.scan(query.vectors).add_(query.added).add_(SCAN_ERROR)
    if scores.device.type != "cpu":
        return scores.masked_fill_(~query.allowed, -torch.inf)
    np.copyto(scores.numpy(), -np.inf, where=~query.allowed.numpy())  # `masked_fill_` takes five times as long
    return scores


def search(table: PackedItems, query: Query, bounds: Tensor, k: int) -> list[Found]:
    """Return every session's k best allowed items, fewer where fewer are allowed.

    Parameters
    ----------
    table : PackedItems
    query : Query
    bounds : Tensor [batch, row]
        No score may exceed its bound; -inf where not allowed.
    k : int
        At least 1.
    """
    if bounds.shape[1] > _TOGETHER:
        return [_widening(table, query, bounds[session], session, k) for session in range(len(bounds))]
    best = bounds.topk(min(k + SPARE, bounds.shape[1]), dim=1)
    rows = best.indices.sort(dim=1).values
    scores = _scores(table.exact, query, rows).masked_fill(~query.allowed.gather(1, rows), -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    k, rows, worst = min(k, rows.shape[1]), rows.gather(1, order), best.values[:, -1]
    certain = (worst < scores[:, k - 1]) | (worst == -torch.inf) | (rows.shape[1] == bounds.shape[1])
    scores, n_scored = scores[:, :k], rows.shape[1]
    counts, sure = torch.isfinite(scores).sum(1).tolist(), certain.tolist()
    lines = zip(scores.unbind(), rows[:, :k].unbind(), counts, sure, strict=True)
    return [
        (Found(line, at, n_scored) if n == k else Found(line[:n], at[:n], n_scored))
        if exact
        else _widening(table, query, bounds[session], session, k)
        for session, (line, at, n, exact) in enumerate(lines)
    ]


def _widening(table: PackedItems, query: Query, bounds: Tensor, session: int, k: int) -> Found:
    """Score exactly all items that may be among the best, in rounds from the highest bounds down."""
    own = query.take(slice(session, session + 1))
    scores, rows, scored = bounds[:0], torch.empty(0, dtype=torch.int64, device=bounds.device), 0
    threshold, done, reached = _first_threshold(bounds, k), torch.inf, -torch.inf
    while True:
        fresh = torch.nonzero((bounds >= threshold) & (bounds < done) & (bounds > -torch.inf)).flatten()
        fresh_scores, fresh = _contenders(table, own, fresh, k, reached)
        rows, order = torch.cat([rows, fresh]).sort()
        scores, best = torch.cat([scores, fresh_scores])[order].sort(descending=True, stable=True)
        scores, rows, scored = scores[:k], rows[best[:k]], scored + len(fresh)
        reached = float(scores[-1]) if len(scores) == k else -torch.inf
        done = threshold
        left = bounds[(bounds < done) & (bounds >= reached) & (bounds > -torch.inf)]
        if not len(left):
            return Found(scores, rows, scored)
        threshold = reached if len(left) <= _ROUND else float(left.topk(_ROUND).values[-1])


def _first_threshold(bounds: Tensor, k: int) -> float:
    """Return a value that at least k bounds reach (-inf where fewer are finite), cheaply."""
    n_blocks = len(bounds) // _BLOCK
    if k > n_blocks:
        return float(bounds.topk(min(k, len(bounds))).values[-1])
    peaks = bounds[: n_blocks * _BLOCK].view(n_blocks, _BLOCK).amax(1)
    return float(peaks.topk(k).values[-1])


def _contenders(table: PackedItems, query: Query, rows: Tensor, k: int, reached: float) -> tuple[Tensor, Tensor]:
    """Return exact scores of ``rows`` and the rows, less those that a score in 32 bits already rules out."""
    if len(rows) > _FEW:
        quick = torch.cat([_scores(table.quick, query, part[None])[0] for part in rows.split(_ROUND)])
        floor = max(reached, float(quick.topk(k).values[-1]) if k < len(quick) else -torch.inf)
        rows = rows[quick >= floor - _ROUNDING]
    return _scores(table.exact, query, rows[None])[0], rows


def _scores(method: Callable[[Tensor, Tensor], Tensor], query: Query, rows: Tensor) -> Tensor:
    return (method(query.vectors, rows) + query.added.gather(1, rows)).float()
