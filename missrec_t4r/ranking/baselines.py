"""Baselines: popularity, sequential item-kNN and content-kNN, the latter two tuned on validation.

    popularity    score(j)    = n_j, the training interactions with item j
    item-kNN      score(s, j) = sum over i in s of decay^age(i) * C_ji / ((n_i + 5) (n_j + 5))^power
    content-kNN   score(s, j) = mean of cos(q_m(s), x_mj) over the modalities m that j and the history have,
                  q_m(s)      = sum over i in s of decay^age(i) * x_mi

C_ji counts the training sessions (one per user) that hold both items, or how often j followed i within a few events;
n_i those that hold i. The diagonal C_ii, the sessions with i or how often i was repeated, is in use where seen items
are kept and validation is better with it, else 0. x_mi is the modality vector, centred and of unit length. age is 0
for the last item. All statistics come from the train split, for the test split too, as a model's weights do; that
gives the known floors. Counting the validation items as well would be legitimate for the test split, and stronger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, PROTOCOLS, Scored
from missrec_t4r.ranking.cooccurrence import SHRINKAGE, pairs_within, repeats_within, sessions_with_both
from missrec_t4r.ranking.similarity import centred
from missrec_t4r.schema import FIRST_ITEM_ROW

DENSE_SHARE: Final = 0.05
"""Above this share of filled cells a dense co-occurrence matrix is faster than a sparse one."""
DENSE_BYTES: Final = 512 * 2**20
"""Larger matrices stay sparse."""


@dataclass(frozen=True)
class Popularity:
    """Popularity baseline: the same list for every session, the items by their number of training events."""

    counts: Tensor
    """[row], float32."""

    @classmethod
    def fit(cls, catalogue: Catalogue) -> Popularity:
        """Take the counts that ETL wrote."""
        return cls(_only_items(torch.from_numpy(catalogue.train_count).float()))

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row]."""
        return self.counts.expand(len(histories), -1)


@dataclass(frozen=True)
class CoOccurrence:
    """Co-occurrence matrix of the training sessions: how often each item occurs, and each pair of items together.

    Parameters
    ----------
    pairs : Tensor [row, row], float32, dense or sparse
        ``pairs[j, i]`` counts how often candidate j occurs with history item i; zero diagonal.
    counts : Tensor [row], float32
        Sessions with the item, each counted once.
    own : Tensor [row], float32
        The diagonal of ``pairs``: sessions with the item, or how often it comes after itself.
    """

    pairs: Tensor
    counts: Tensor
    own: Tensor

    @classmethod
    def count(cls, sessions: Sessions, n_rows: int, follow_within: int = 0) -> CoOccurrence:
        """Count over training sessions.

        Parameters
        ----------
        follow_within : int
            0: sessions that hold both items, each counted once, in any order and at any distance. Else: how often j
            comes after i, by at most so many events; better for long sessions, in which all items co-occur.

        Examples
        --------
        >>> sessions = Sessions.from_lists([[3, 4], [3, 4, 4]])
        >>> counted = CoOccurrence.count(sessions, 5)
        >>> counted.pairs.to_dense()[3, 4].item(), counted.pairs.to_dense()[4, 3].item(), counted.counts.tolist()
        (2.0, 2.0, [0.0, 0.0, 0.0, 2.0, 2.0])
        >>> followed = CoOccurrence.count(sessions, 5, follow_within=2)
        >>> followed.pairs.to_dense()[3, 4].item(), followed.pairs.to_dense()[4, 3].item()  # 4 never precedes 3
        (0.0, 3.0)
        >>> counted.own.tolist(), followed.own.tolist()  # 4 was repeated once
        ([0.0, 0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 1.0])
        """
        known = sessions.known()
        together = sessions_with_both(known, n_rows)
        rows, columns = together.indices()  # [pair]
        diagonal = rows == columns
        counts = torch.zeros(n_rows).index_copy_(0, rows[diagonal], together.values()[diagonal])
        if follow_within:
            earlier, later, followed = pairs_within(known, follow_within, directed=True)
            order = np.lexsort((earlier, later))
            index = torch.from_numpy(np.stack([later[order], earlier[order]]))
            pairs = _sparse(index, torch.from_numpy(followed[order]).float(), n_rows)
            own = torch.from_numpy(repeats_within(known, follow_within, n_rows)).float()
        else:
            own = counts
            pairs = _sparse(together.indices()[:, ~diagonal], together.values()[~diagonal], n_rows)
        dense = len(pairs.values()) > DENSE_SHARE * n_rows**2 and 4 * n_rows**2 <= DENSE_BYTES
        return cls(pairs.to_dense() if dense else pairs, counts, own)


@dataclass(frozen=True)
class ItemKNN:
    """Item-kNN baseline: co-occurrence of the candidate with the session's items, weighted by recency.

    Parameters
    ----------
    seen : CoOccurrence
        Statistics of the training split.
    decay : float
        Weight of an item relative to the one after it, in (0, 1].
    power : float
        Popularity discount, in [0, 1]; 0.5 is the cosine.
    diagonal : bool
        Whether an item of the history counts for itself; without effect where seen items are excluded.
    """

    seen: CoOccurrence
    decay: float
    power: float
    diagonal: bool = False

    @property
    def protocols(self) -> Sequence[str]:
        """The protocols to rank it under: with the diagonal not ``excluded``, where the diagonal has no effect."""
        return [name for name in PROTOCOLS if not self.diagonal or name != EXCLUDED]

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row]; all 0 for an empty session."""
        scores, own, discount = self._products(histories)
        return _only_items((scores + own if self.diagonal else scores) * discount)

    def with_and_without_diagonal(self, histories: Sessions) -> Iterator[Scored]:
        """Yield the scores for both values of ``diagonal``, as `rank_systems` takes them: "False" and "True"."""
        scores, own, discount = self._products(histories)
        for diagonal in (False, True):
            protocols = replace(self, diagonal=diagonal).protocols
            yield Scored(str(diagonal), protocols, _only_items((scores + own if diagonal else scores) * discount))

    def _products(self, histories: Sessions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores without the diagonal and what it adds [batch, row], and the candidates' discount [row]."""
        discount = (self.seen.counts + SHRINKAGE) ** -self.power  # [row]
        weights = recency_weights(histories, len(discount), self.decay).to_dense() * discount  # [batch, row]
        if self.seen.pairs.is_sparse:
            scores = torch.sparse.mm(self.seen.pairs, weights.t().contiguous()).t().contiguous()
        else:
            scores = weights @ self.seen.pairs.t()
        return scores, weights * self.seen.own, discount


@dataclass(frozen=True)
class ContentKNN:
    """Content-kNN baseline: similarity of the candidate's content to the session's; ranks cold items too.

    Parameters
    ----------
    vectors : mapping of str to Tensor [row, width]
        Per modality, centred over the items that have it and of unit length; zero where the item lacks it.
    present : mapping of str to Tensor [row], bool
        True where the item has the modality.
    decay : float
        As in `ItemKNN`.
    """

    vectors: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    decay: float

    @classmethod
    def fit(cls, catalogue: Catalogue, decay: float = 0.7) -> ContentKNN:
        """Centre and scale the catalogue's vectors.

        Centring makes modalities comparable: raw cosines of CLIP images are around 0.7 for any two products, so that
        items with an image would win over items without one.
        """
        names = [name for name, modality in catalogue.modalities.items() if modality.present.any()]
        present = {name: torch.from_numpy(catalogue.modalities[name].present) for name in names}
        vectors = {name: centred(torch.from_numpy(catalogue.modalities[name].vectors), present[name]) for name in names}
        return cls(vectors, present, decay)

    def using(self, modalities: Sequence[str], decay: float) -> ContentKNN:
        """Return the same vectors, of these modalities only and with another decay."""
        return ContentKNN(
            {name: self.vectors[name] for name in modalities}, {name: self.present[name] for name in modalities}, decay
        )

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row] in [-1, 1]; -1 where item and history have no modality in common."""
        n_rows = len(next(iter(self.present.values())))
        weights = recency_weights(histories, n_rows, self.decay)
        cosines, shared = [], []
        for name, vectors in self.vectors.items():
            query = F.normalize(torch.sparse.mm(weights, vectors), dim=-1)  # [batch, width]
            cosines.append(query @ vectors.t())  # [batch, row]
            shared.append(query.any(1, keepdim=True) & self.present[name])
        count = torch.stack(shared).sum(0)
        return _only_items(torch.where(count > 0, torch.stack(cosines).sum(0) / count.clamp_min(1), -1.0))


def recency_weights(histories: Sessions, n_rows: int, decay: float) -> Tensor:
    """Return decay^age summed per session and item, [batch, row], sparse float32; age is 0 for the last item.

    Examples
    --------
    >>> recency_weights(Sessions.from_lists([[3, 4, 3]]), 5, 0.5).to_dense().tolist()  # item 3: 1 + 0.25, item 4: 0.5
    [[0.0, 0.0, 0.0, 1.25, 0.5]]
    """
    lengths, start = histories.lengths, histories.offsets[0]
    sessions = histories.session_of_event
    ages = np.repeat(histories.offsets[1:], lengths) - 1 - np.arange(start, start + len(sessions))
    values = torch.from_numpy((decay ** ages.astype(np.float64)).astype(np.float32))
    index = torch.from_numpy(np.stack([sessions, histories.values]))
    return torch.sparse_coo_tensor(index, values, (len(histories), n_rows), check_invariants=False).coalesce()


def _sparse(index: Tensor, values: Tensor, n_rows: int) -> Tensor:
    return torch.sparse_coo_tensor(index, values, (n_rows, n_rows), is_coalesced=True, check_invariants=False)


def _only_items(scores: Tensor) -> Tensor:
    items = torch.arange(scores.shape[-1]) >= FIRST_ITEM_ROW
    return torch.where(items, scores, -torch.inf)
