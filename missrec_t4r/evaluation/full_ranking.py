"""Full-catalogue ranking of each session's target, a chunk of sessions at a time, under two protocols.

* ``seen_kept`` (seen items kept), as in the published tables: every recommendable item is ranked, those of the session
  included.
* ``seen_excluded`` (seen items excluded), as shops serve: the session's items are removed before ranking. A target that
  is in its own session is then a miss.

The order is that of serving: descending score, ties by ascending row:

    rank = 1 + #(score > target's score) + #(score == target's score and row < target's row)

A target that is not recommendable (unknown row, or score -inf) is a miss and is counted. Memory is bounded by a chunk's
scores, never users x items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, ModalityError
from missrec_t4r.evaluation.metrics import MISSED, metrics
from missrec_t4r.progress import track
from missrec_t4r.schema import FIRST_ITEM_ROW

SEEN_KEPT: Final = "seen_kept"
SEEN_EXCLUDED: Final = "seen_excluded"
PROTOCOLS: Final = (SEEN_KEPT, SEEN_EXCLUDED)

CHUNK_BYTES: Final = 64 * 2**20
"""Bytes of float32 scores per chunk; with the second protocol's copy and masks the peak stays below 256 MB."""
MAX_SESSIONS: Final = 512
"""Sessions per chunk at most, which bounds the memory of a model's activations."""


class Scorer(Protocol):
    """Anything that scores the whole catalogue for a batch of sessions: a model or a baseline."""

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row], without NaN; -inf for rows that cannot be recommended.

        Parameters
        ----------
        histories : Sessions
            The batch. Its sessions hold known items only and may be empty.
        """


@dataclass(frozen=True)
class Ranking:
    """Ranks and recommendation lists of one system.

    Parameters
    ----------
    ranks : mapping of str to ndarray [session], int64
        Rank of the target per protocol, `MISSED` where it cannot be found.
    recommended : mapping of str to ndarray [session, k]
        Top-k lists of catalogue rows per protocol, -1 after the last recommendable item; empty for ``top_k=0``.
    n_unrecommendable : int
        Number of targets that the system can never recommend.
    """

    ranks: Mapping[str, Ints]
    recommended: Mapping[str, Ints]
    n_unrecommendable: int


def chunk_size(n_rows: int, at_most: int = MAX_SESSIONS) -> int:
    """Return the number of sessions per chunk.

    Examples
    --------
    >>> chunk_size(4_388), chunk_size(1_000_003)
    (512, 16)
    """
    return max(1, min(at_most, CHUNK_BYTES // (4 * n_rows)))


def rank_catalogue(
    scorer: Scorer,
    histories: Sessions,
    targets: Ints,
    n_rows: int,
    *,
    top_k: int = 0,
    protocols: Sequence[str] = PROTOCOLS,
    description: str = "ranking",
) -> Ranking:
    """Rank every session's target among all items.

    Parameters
    ----------
    scorer : Scorer
        The system to evaluate.
    histories : Sessions
        Sessions without their targets. Null and unknown rows are dropped first.
    targets : ndarray [session], int64
        Catalogue row of the item that came next.
    n_rows : int
        Width of a score vector, `Catalogue.n_rows`.
    top_k : int
        Length of the lists to return, for coverage; 0 returns none and is faster.
    protocols : sequence of str
        ``"seen_kept"``, ``"seen_excluded"`` or both.

    Raises
    ------
    ModalityError
        The scorer returned NaN.
    DataError
        Targets or scores do not fit the catalogue.
    """
    _check_targets(histories, targets, n_rows)
    histories, top_k = histories.known(), min(top_k, n_rows - FIRST_ITEM_ROW)
    step = chunk_size(n_rows)
    ranks: dict[str, list[Ints]] = {protocol: [] for protocol in protocols}
    lists: dict[str, list[Ints]] = {protocol: [] for protocol in protocols}
    unrecommendable = 0
    for start in track(range(0, len(histories), step), description):
        chunk = slice_sessions(histories, start, start + step)
        scores = _checked(scorer(chunk), len(chunk), n_rows, start)  # [batch, row]
        target = torch.from_numpy(targets[start : start + step]).to(scores.device)  # [batch]
        unrecommendable += int(torch.isneginf(scores.gather(1, target[:, None])).sum())
        for protocol in protocols:
            ranked = scores if protocol == SEEN_KEPT else exclude_seen(scores, chunk)
            ranks[protocol].append(target_ranks(ranked, target).cpu().numpy())
            if top_k:
                lists[protocol].append(recommendable_rows(ranked, top_k).cpu().numpy())
    return Ranking(
        {name: np.concatenate([*parts, np.empty(0, np.int64)]) for name, parts in ranks.items()},
        {name: np.concatenate(parts) for name, parts in lists.items() if parts},
        unrecommendable,
    )


def quick_metrics(
    scorer: Scorer, sessions: Sessions, n_rows: int, ks: Sequence[int] = (10,)
) -> dict[str, dict[str, float | None]]:
    """Return mean metrics ``{protocol: {"recall@10": …, "ndcg@10": …, "mrr@10": …}}``, for early stopping.

    Parameters
    ----------
    sessions : Sessions
        Evaluation rows as ETL writes them: history and target, the target is the last item.
    """
    histories, targets = sessions.split_last()
    ranking = rank_catalogue(scorer, histories, targets, n_rows)
    return {protocol: metrics(ranks, ks) for protocol, ranks in ranking.ranks.items()}


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each target, [batch]; `MISSED` where its score is -inf.

    Examples
    --------
    >>> target_ranks(torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([2])).tolist()  # one above, one tie before
    [3]
    """
    own = scores.gather(1, targets[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    better = (scores > own).sum(1) + ((scores == own) & before).sum(1)
    return torch.where(torch.isneginf(own[:, 0]), MISSED, 1 + better)


def exclude_seen(scores: Tensor, histories: Sessions) -> Tensor:
    """Return a copy of the scores [batch, row] with -inf for every item of the session."""
    sessions = torch.from_numpy(np.repeat(np.arange(len(histories)), histories.lengths)).to(scores.device)
    seen = torch.from_numpy(histories.values).to(scores.device)
    excluded = scores.clone()
    excluded[sessions, seen] = -torch.inf
    return excluded


def targets_in_history(histories: Sessions, targets: Ints) -> Bools:
    """Return which targets are in their own history, [session], bool: the misses of ``seen_excluded`` by definition."""
    sessions = np.repeat(np.arange(len(histories)), histories.lengths)
    with_target = sessions[histories.values == targets[sessions]]
    return np.bincount(with_target, minlength=len(histories)) > 0


def recommendable_rows(scores: Tensor, top_k: int) -> Tensor:
    """Return the best rows [batch, top_k] in ranking order, ties by ascending row, -1 where items run out.

    The order of ties in `torch.topk` is undefined, so that coverage would depend on the machine. Here it only finds the
    threshold; of the items that are equal to it the lowest rows are taken.

    Examples
    --------
    >>> recommendable_rows(torch.tensor([[0.1, 0.7, 0.7, -torch.inf]]), 4).tolist()
    [[1, 2, 0, -1]]
    """
    threshold = scores.topk(top_k, dim=1).values[:, -1:]  # [batch, 1]
    above, tied = scores > threshold, scores == threshold
    n_tied = top_k - above.sum(1, keepdim=True)  # ties to take
    chosen = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= n_tied))  # top_k True per session
    rows = chosen.nonzero()[:, 1].view(len(scores), top_k)  # ascending, so a stable sort keeps the order of ties
    values, order = scores.gather(1, rows).sort(dim=1, descending=True, stable=True)
    return rows.gather(1, order).masked_fill(torch.isneginf(values), -1)


def slice_sessions(sessions: Sessions, start: int, stop: int) -> Sessions:
    """Return sessions ``start`` to ``stop`` as views, with their event features."""
    return sessions.slice(start, stop)


def _check_targets(histories: Sessions, targets: Ints, n_rows: int) -> None:
    """Raise an error if targets or histories do not fit each other or the catalogue."""
    if len(targets) != len(histories):
        raise DataError(f"{len(targets)} targets for {len(histories)} sessions", "one target per session")
    for name, rows in (("target", targets), ("history", histories.values)):
        if len(rows) and (rows.min() < 0 or rows.max() >= n_rows):
            raise DataError(
                f"{name} row {rows.max() if rows.max() >= n_rows else rows.min()}",
                f"rows from 0 to {n_rows - 1}, as in the catalogue",
                "evaluate with the data folder that the catalogue belongs to",
            )


def _checked(scores: Tensor, batch: int, n_rows: int, start: int) -> Tensor:
    """Return the scores; an error if they are of another shape or hold NaN."""
    if scores.shape != (batch, n_rows):
        raise DataError(f"scores of shape {tuple(scores.shape)}", f"{(batch, n_rows)}: one score per session and row")
    has_nan = torch.isnan(scores).any(1)
    if has_nan.any():
        raise ModalityError(
            f"the scores of session {start + int(has_nan.nonzero()[0])} hold NaN",
            "numbers, or -inf for items that cannot be recommended",
            "training diverged or a modality vector is broken: lower train.learning_rate, or re-run missrec features",
        )
    return scores
