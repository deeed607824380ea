"""Explanations: the session's item, and the modality, with the largest influence on a recommended item's score."""

from __future__ import annotations

import numpy as np
import torch

from missrec_t4r.arrays import Ints
from missrec_t4r.data.event_features import EventArrays, compact_event_features
from missrec_t4r.retrieval.ranker import Ranker, compact
from missrec_t4r.schema import PADDING_ROW


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
        Index of the modality with the largest weight in the score, -1 for the ID embedding alone or for a
        fallback.
    """
    length = ranker.max_sequence_length
    known, aligned = compact(rows, length), compact_event_features(event_features or {}, rows, length)
    own = np.unique(known[known > PADDING_ROW])
    items, lowest = np.zeros(len(given), np.int64), np.full(len(given), np.inf)
    if not len(own) or not len(given):
        return items, np.full(len(given), -1)
    candidates = torch.from_numpy(given).to(ranker.device)[None]
    modalities = ranker.table.leading(ranker.encode(known, aligned), candidates)[0].cpu().numpy()
    for item in own:  # one at a time: every session needs a score per row of the catalogue
        rest = np.where(known == item, PADDING_ROW, known)
        if not rest.any():
            return np.full(len(given), item), modalities
        query = ranker.query(compact(rest, length), compact_event_features(aligned, rest, length))
        scores = ranker.table.exact(query.vectors, candidates) + query.added.gather(1, candidates)
        score = scores[0].cpu().numpy()
        items, lowest = np.where(score < lowest, item, items), np.minimum(score, lowest)
    return items, modalities
