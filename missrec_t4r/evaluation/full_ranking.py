"""Full-catalogue ranking of each session's target, a chunk of sessions at a time, under three protocols.

* ``excluded``, as shops serve: the session's items are removed before ranking. A target that is in its own session is
  then a miss.
* ``kept_strict``, as most papers publish: every recommendable item is ranked, and no part of the score depends on
  which items were seen.
* ``kept_with_history_term`` (ours): every recommendable item is ranked, and the score may depend on it, as the history
  bias and the item-kNN term do (`missrec_t4r.ranking.protocols`).

A protocol is a filter here, and a choice of score terms there: only a scorer without such terms can be ranked under
``kept_strict``. The order is that of serving: descending score, ties by ascending row:

    rank = 1 + #(score > target's score) + #(score == target's score and row < target's row)

A target that is not recommendable (unknown row, or score -inf) is a miss and is counted. Memory is bounded by a chunk's
scores, never users x items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, ModalityError
from missrec_t4r.evaluation.metrics import MISSED, metrics
from missrec_t4r.progress import track
from missrec_t4r.schema import FIRST_ITEM_ROW

EXCLUDED: Final = "excluded"
KEPT_STRICT: Final = "kept_strict"
KEPT_WITH_HISTORY_TERM: Final = "kept_with_history_term"
PROTOCOLS: Final = (EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM)
PROTOCOL_TITLES: Final = {
    EXCLUDED: "excluded",
    KEPT_STRICT: "kept, strict",
    KEPT_WITH_HISTORY_TERM: "kept, with history term",
}
FORMER_PROTOCOLS: Final = {"seen_excluded": EXCLUDED, "seen_kept": KEPT_WITH_HISTORY_TERM}
"""Names in files of earlier versions. ``seen_kept`` allowed every term, so it is not the strict protocol."""

CHUNK_BYTES: Final = 64 * 2**20
"""Bytes of float32 scores per chunk; with the copies and masks of a protocol the peak stays below 256 MB for a
baseline, and below 384 MB for a model with its terms."""
MAX_SESSIONS: Final = 512
"""Sessions per chunk at most, which bounds the memory of a model's activations."""


class Scorer(Protocol):
    """Anything that scores the whole catalogue for a batch of sessions: a model or a baseline."""

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row], without NaN; -inf for rows that cannot be recommended, as rows 0 to 2 never are.

        Parameters
        ----------
        histories : Sessions
            The batch. Its sessions hold known items only and may be empty.
        """


class Scored(NamedTuple):
    """Scores of one system, and the protocols under which they are ranked."""

    system: str
    protocols: Sequence[str]
    scores: Tensor
    """[batch, row], as `Scorer` returns them."""


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


def chunk_size(n_rows: int) -> int:
    """Return the number of sessions per chunk.

    Examples
    --------
    >>> chunk_size(4_388), chunk_size(1_000_003)
    (512, 16)
    """
    return max(1, min(MAX_SESSIONS, CHUNK_BYTES // (4 * n_rows)))


def chunks_of(sessions: Sessions, n_rows: int, description: str) -> Iterator[tuple[slice, Sessions]]:
    """Yield some sessions at a time, and where they stand, with progress."""
    step = chunk_size(n_rows)
    for start in track(range(0, len(sessions), step), description):
        yield slice(start, start + step), sessions.slice(start, start + step)


def rank_catalogue(
    scorer: Scorer,
    histories: Sessions,
    targets: Ints,
    n_rows: int,
    *,
    top_k: int = 0,
    protocols: Sequence[str] | None = None,
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
    protocols : sequence of str, optional
        By default all for which the scorer is fit: `protocols_of`.

    Raises
    ------
    ConfigError
        The score depends on which items were seen, and ``kept_strict`` is among the protocols.
    ModalityError
        The scorer returned NaN.
    DataError
        Targets or scores do not fit the catalogue.
    """
    fit = protocols_of(scorer)
    chosen = fit if protocols is None else protocols
    if set(chosen) - set(fit):
        raise ConfigError(
            f"protocol {min(set(chosen) - set(fit))!r} for scores that depend on which items were seen",
            f"one of {', '.join(fit)}",
            "rank a scorer without history bias, item-kNN and content-kNN term, or use missrec evaluate",
        )
    ranked = rank_systems(
        lambda chunk: [Scored("", chosen, scorer(chunk))],
        histories,
        targets,
        n_rows,
        top_k=top_k,
        description=description,
    )
    return ranked.get("", Ranking({name: np.empty(0, np.int64) for name in chosen}, {}, 0))


def rank_systems(
    score: Callable[[Sessions], Iterable[Scored]],
    histories: Sessions,
    targets: Ints,
    n_rows: int,
    *,
    top_k: int = 0,
    description: str = "ranking",
) -> dict[str, Ranking]:
    """Rank every session's target among all items with several systems that share work on a chunk of sessions.

    Parameters
    ----------
    score : function
        Yields the scores of every system and protocol for a batch of sessions. Each is ranked before the next one is
        asked for, so that one pass through the network serves many and only a few are in memory.
    histories, targets, n_rows, top_k
        As in `rank_catalogue`.

    Returns
    -------
    dict of str to Ranking
        By name of the system; empty where there is no session.
    """
    _check_targets(histories, targets, n_rows)
    histories, top_k = histories.known(), min(top_k, n_rows - FIRST_ITEM_ROW)
    ranked: dict[str, dict[str, _Ranked]] = {}
    for at, chunk in chunks_of(histories, n_rows, description):
        target = torch.from_numpy(targets[at])  # [batch]
        for system, protocols, unchecked in score(chunk):
            scores = _checked(unchecked, len(chunk), n_rows, at.start)  # [batch, row]
            target = target.to(scores.device)
            own = ranked.setdefault(system, {})
            _rank_chunk(scores, chunk, target, top_k, {name: own.setdefault(name, _Ranked()) for name in protocols})
    return {
        system: Ranking(
            {protocol: np.concatenate(found.ranks) for protocol, found in own.items()},
            {protocol: np.concatenate(found.lists) for protocol, found in own.items() if found.lists},
            max(found.unrecommendable for found in own.values()),
        )
        for system, own in ranked.items()
    }


@dataclass
class _Ranked:
    """Ranks and lists of one system under one protocol, chunk by chunk."""

    ranks: list[Ints] = field(default_factory=list)
    lists: list[Ints] = field(default_factory=list)
    unrecommendable: int = 0


def _rank_chunk(scores: Tensor, chunk: Sessions, target: Tensor, top_k: int, found: Mapping[str, _Ranked]) -> None:
    """Append ranks and lists of a chunk; protocols with the same filter share them."""
    kept = target_ranks(scores, target)
    missed = int(torch.isneginf(scores.gather(1, target[:, None])).sum())
    for excludes in (False, True):
        with_this_filter = [ranked for protocol, ranked in found.items() if (protocol == EXCLUDED) is excludes]
        if not with_this_filter:
            continue
        ranks = (ranks_without_seen(kept, scores, chunk, target) if excludes else kept).cpu().numpy()
        lists = []
        if top_k:
            lists = [recommendable_rows(exclude_seen(scores, chunk) if excludes else scores, top_k).cpu().numpy()]
        for ranked in with_this_filter:
            ranked.ranks.append(ranks)
            ranked.lists += lists
            ranked.unrecommendable += missed


def protocols_of(scorer: Scorer) -> Sequence[str]:
    """Return the protocols under which a scorer can be ranked: its ``protocols``, or all where it states none."""
    return tuple(getattr(scorer, "protocols", PROTOCOLS))


def quick_metrics(
    scorer: Scorer,
    sessions: Sessions,
    n_rows: int,
    ks: Sequence[int] = (10,),
    *,
    protocols: Sequence[str] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Return mean metrics ``{protocol: {"recall@10": …, "ndcg@10": …, "mrr@10": …}}``, for early stopping.

    Parameters
    ----------
    sessions : Sessions
        Evaluation rows as ETL writes them: history and target, the target is the last item.
    protocols : sequence of str, optional
        By default all for which the scorer is fit.
    """
    histories, targets = sessions.split_last()
    ranking = rank_catalogue(scorer, histories, targets, n_rows, protocols=protocols)
    return {protocol: metrics(ranks, ks) for protocol, ranks in ranking.ranks.items()}


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each target, [batch]; `MISSED` where its score is -inf.

    Examples
    --------
    >>> target_ranks(torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([2])).tolist()  # one above, one tie before
    [3]
    """
    own = scores.gather(1, targets[:, None])
    better, as_good = n_true(scores > own), n_true(scores >= own)
    tied = torch.nonzero(as_good - better > 1).flatten()  # few sessions: the rest needs no look at the order of rows
    before = torch.arange(scores.shape[1], device=scores.device) < targets[tied, None]
    better.index_add_(0, tied, n_true((scores[tied] == own[tied]) & before))
    return torch.where(torch.isneginf(own[:, 0]), MISSED, 1 + better)


def n_true(mask: Tensor) -> Tensor:
    """Return how many are True per row [batch] of a mask [batch, row]; several times faster than a sum of bools."""
    return mask.view(torch.uint8).sum(1, dtype=torch.int32).long()


def ranks_without_seen(kept: Tensor, scores: Tensor, histories: Sessions, targets: Tensor) -> Tensor:
    """Return the ranks [batch] under ``excluded``: those among all items, less the seen items before the target.

    Parameters
    ----------
    kept : Tensor [batch]
        `target_ranks` of the scores.
    scores : Tensor [batch, row]
    histories : Sessions
        Known items only; an item that occurs twice counts once.
    targets : Tensor [batch]
    """
    n_rows = scores.shape[1]
    cells = np.unique(histories.session_of_event * n_rows + histories.values)
    session, seen = (torch.from_numpy(part).to(scores.device) for part in (cells // n_rows, cells % n_rows))
    own, theirs, target = scores.gather(1, targets[:, None])[:, 0][session], scores[session, seen], targets[session]
    before = (theirs > own) | ((theirs == own) & (seen < target))
    excluded = kept - torch.zeros_like(kept).index_add_(0, session, before.to(kept.dtype))
    is_seen = torch.zeros_like(kept).index_add_(0, session, (seen == target).to(kept.dtype)) > 0
    return torch.where(is_seen | (kept == MISSED), MISSED, excluded)


def exclude_seen(scores: Tensor, histories: Sessions) -> Tensor:
    """Return a copy of the scores [batch, row] with -inf for every item of the session."""
    sessions = torch.from_numpy(histories.session_of_event).to(scores.device)
    seen = torch.from_numpy(histories.values).to(scores.device)
    excluded = scores.clone()
    excluded[sessions, seen] = -torch.inf
    return excluded


def targets_in_history(histories: Sessions, targets: Ints) -> Bools:
    """Return which targets are in their own history, [session], bool: the misses of ``excluded`` by definition."""
    sessions = histories.session_of_event
    with_target = sessions[histories.values == targets[sessions]]
    return np.bincount(with_target, minlength=len(histories)) > 0


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best columns of every row.

    `torch.topk` does not define the order of equal scores, nor which of them it returns; two servers with the same
    bundle would give different lists, and coverage would depend on the machine. Of the items with the last score that
    fits the lowest rows are taken.

    Parameters
    ----------
    scores : Tensor [batch, catalogue]
        No NaN; -inf marks what cannot be recommended and comes last.
    k : int
        At most ``catalogue`` columns are returned.

    Returns
    -------
    scores : Tensor [batch, k]
        Descending.
    rows : Tensor [batch, k], int64
        Their columns; equal scores in ascending order.

    Examples
    --------
    >>> top_items(torch.tensor([[0.5, 0.9, 0.5, 0.5]]), 3)[1].tolist()
    [[1, 0, 2]]
    """
    k = min(k, scores.shape[1])
    if k < 1:
        return scores[:, :0], torch.zeros(len(scores), 0, dtype=torch.int64, device=scores.device)
    best, rows = scores.topk(k, dim=1)
    crowded = n_true(scores >= best[:, -1:]) > k  # [batch]: more items have the last score than fit
    if bool(crowded.any()):
        fits = (best == best[:, -1:]) & crowded[:, None]  # [batch, k]: places of the ties, for their lowest rows
        tied = scores[crowded] == best[crowded, -1:]
        tied &= tied.cumsum(1, dtype=torch.int32) <= n_true(fits)[crowded, None]
        rows[fits] = tied.nonzero()[:, 1]
    rows = rows.sort(dim=1).values  # ascending, so that a stable sort keeps the order of ties
    best, order = scores.gather(1, rows).sort(dim=1, descending=True, stable=True)
    return best, rows.gather(1, order)


def recommendable_rows(scores: Tensor, top_k: int) -> Tensor:
    """Return the best rows [batch, top_k] in ranking order, ties by ascending row, -1 where items run out.

    Examples
    --------
    >>> recommendable_rows(torch.tensor([[0.1, 0.7, 0.7, -torch.inf]]), 4).tolist()
    [[1, 2, 0, -1]]
    """
    best, rows = top_items(scores, top_k)
    return rows.masked_fill(torch.isneginf(best), -1)


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
    """Return the scores, -inf for the rows that are no items; an error if they are of another shape or hold NaN."""
    if scores.shape != (batch, n_rows):
        raise DataError(f"scores of shape {tuple(scores.shape)}", f"{(batch, n_rows)}: one score per session and row")
    has_nan = torch.isnan(scores).any(1)
    if has_nan.any():
        raise ModalityError(
            f"the scores of session {start + int(has_nan.nonzero()[0])} hold NaN",
            "numbers, or -inf for items that cannot be recommended",
            "training diverged or a modality vector is broken: lower train.learning_rate, or re-run missrec features",
        )
    if torch.isneginf(scores[:, :FIRST_ITEM_ROW]).all():
        return scores
    return scores.index_fill(1, torch.arange(FIRST_ITEM_ROW, device=scores.device), -torch.inf)
