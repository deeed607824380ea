"""Explanations: the session's item, and the modality or term, with the largest influence on a recommended item's score.

The score is that of the network plus the score terms. If leaving the item out lowers the item-kNN term by more than the
network's score, the recommended item is *bought together* with it; otherwise the network's modality is named. Of the
network's score the part counts that the average item does not get: only that part changes a ranking.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.data.event_features import EventArrays, compact_event_features
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.retrieval.ranker import Ranker, compact
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW

BOUGHT_TOGETHER: Final = -2
"""In place of a modality: the item-kNN term made more of the score than the network."""
_N_AVERAGED = 256
"""Items of the catalogue whose mean network score stands for that of the average item."""


@torch.inference_mode()
def reasons(ranker: Ranker, rows: Ints, given: Ints, event_features: EventArrays | None = None) -> tuple[Ints, Ints]:
    """Explain the recommended items of one session.

    Parameters
    ----------
    ranker : Ranker
        The ranker that recommended them.
    rows : ndarray [1, seq], int64
        The session.
    given : ndarray [item], int64
        Recommended rows.
    event_features : mapping of str to ndarray [1, seq] or [1, seq, size], optional
        The session's event features.

    Returns
    -------
    items : ndarray [item], int64
        The item of the session without which the recommended item's score would be lowest; 0 for a fallback.
    modalities : ndarray [item], int64
        Index of the modality with the largest weight in the network's score, -1 for the ID embedding alone or for a
        fallback; `BOUGHT_TOGETHER` where that session item counts for more in the item-kNN term than in the network.
    """
    length = ranker.max_sequence_length
    known, aligned = compact(rows, length), compact_event_features(event_features or {}, rows, length)
    session_items = np.unique(known[known > PADDING_ROW])
    items = np.zeros(len(given), np.int64)
    if not len(session_items) or not len(given):
        return items, np.full(len(given), -1)
    candidates = torch.from_numpy(given).to(ranker.device)[None]
    modalities = ranker.table.leading(ranker.encode(known, aligned), candidates)[0].cpu().numpy()
    scores = _scores(ranker, known, aligned, candidates)
    lowest = np.zeros_like(scores)
    lowest[0] = np.inf
    for item in session_items:  # one at a time: every session needs a score per row of the catalogue
        rest = np.where(known == item, PADDING_ROW, known)
        if not rest.any():
            items = np.full(len(given), item)
            break
        features = compact_event_features(aligned, rest, length)
        without = _scores(ranker, compact(rest, length), features, candidates)
        is_lower = without[0] < lowest[0]
        items, lowest = np.where(is_lower, item, items), np.where(is_lower, without, lowest)
    _, by_network, by_co_occurrence = scores - lowest
    is_co_occurrence = (by_co_occurrence > 0) & (by_co_occurrence > by_network)
    return items, np.where(is_co_occurrence, BOUGHT_TOGETHER, modalities)


def _scores(ranker: Ranker, known: Ints, event_features: EventArrays, candidates: Tensor) -> Doubles:
    """Return [3, item]: the scores, those of the network above its mean of `_N_AVERAGED` items, the item-kNN term."""
    query = ranker.query(known, event_features)
    network = ranker.table.exact(query.vectors, candidates)
    added = query.added.gather(1, candidates)
    n_rows = ranker.table.n_rows
    sample = np.unique(np.linspace(FIRST_ITEM_ROW, n_rows - 1, min(_N_AVERAGED, n_rows - FIRST_ITEM_ROW)).astype(int))
    average = ranker.table.exact(query.vectors, torch.from_numpy(sample).to(candidates)[None]).mean()
    term = terms_of(ranker.model).item_knn
    counted = torch.zeros_like(network)
    if term is not None and term.active:
        session = torch.from_numpy(known).to(candidates)
        counted = term(session).gather(1, candidates).to(network)
    return torch.cat([network + added, network - average, counted]).cpu().numpy()
