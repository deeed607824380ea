"""Beyond-accuracy metrics of the first ten items of lists: coverage, novelty, popularity bias, diversity.

    novelty         mean of -log2 p_j, in bits;  p_j = (n_j + 1) / (sum of n + number of items)
    popularity      mean n_j of the recommended items, and of the targets; popularity_bias is their quotient
    diversity       1 - mean cosine of the pairs of a list, over the modalities that both items have

n_j are the training events of item j. The one added to it is ours: items without events have no finite self-information
otherwise. Vectors are centred, as for content-kNN (`missrec_t4r.ranking.similarity`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.evaluation.metrics import coverage
from missrec_t4r.ranking.similarity import centred
from missrec_t4r.schema import FIRST_ITEM_ROW

PLACES: Final = 10
MEASURES: Final = ("coverage@10", "novelty", "popularity", "popularity_bias", "diversity")


class BeyondAccuracy:
    """Beyond-accuracy metrics of recommendation lists from one catalogue.

    Parameters
    ----------
    catalogue : Catalogue
    targets : ndarray [session]
        Catalogue rows of what came next; rows that are no items are left out.
    """

    def __init__(self, catalogue: Catalogue, targets: Ints) -> None:
        self.catalogue = catalogue
        counts = catalogue.train_count.astype(np.float64)
        total = counts[FIRST_ITEM_ROW:].sum() + catalogue.n_items
        self.counts, self.information = counts, -np.log2((counts + 1) / total)
        items = targets[targets >= FIRST_ITEM_ROW]
        self.of_targets = float(counts[items].mean()) if len(items) else 0.0
        self.vectors = [
            centred(torch.from_numpy(np.asarray(modality.vectors)), torch.from_numpy(modality.present)).numpy()
            for modality in catalogue.modalities.values()
            if modality.present.any()
        ]

    def __call__(self, lists: Ints) -> dict[str, float | None]:
        """Return the measures of lists [session, place] of catalogue rows; other rows than items are left out."""
        shown = lists[:, :PLACES]
        items = shown[shown >= FIRST_ITEM_ROW]
        popularity = float(self.counts[items].mean()) if len(items) else None
        bias = None if popularity is None or not self.of_targets else popularity / self.of_targets
        return {
            "coverage@10": coverage(items, self.catalogue.n_items),
            "novelty": float(self.information[items].mean()) if len(items) else None,
            "popularity": popularity,
            "popularity_bias": bias,
            "diversity": self._diversity(shown),
        }

    def _diversity(self, shown: Ints) -> float | None:
        # Sum of the cosines of all pairs = (|sum of unit vectors|^2 - number of vectors) / 2
        cosines, pairs = 0.0, 0.0
        for start in range(0, len(shown), 1024):
            part = shown[start : start + 1024]
            for vectors in self.vectors:
                unit = vectors[np.where(part >= FIRST_ITEM_ROW, part, 0)]  # [session, place, width]
                n: Doubles = (np.abs(unit).sum(2) > 0).sum(1).astype(np.float64)
                cosines += float(((unit.sum(1) ** 2).sum(1) - n).sum()) / 2
                pairs += float((n * (n - 1) / 2).sum())
        return 1 - cosines / pairs if pairs else None
