"""Item-kNN term: co-occurrence with the session's items, added to the score when ranking (E18; ours).

The published model has no collaborative memory beyond its ID embeddings, and on small shops a tuned item-kNN has the
higher NDCG. Training stays as published; after it, co-occurrence counts of the training sessions are added with a
weight that validation chooses. Zero weight gives the published scores. Its effect: docs/experiments.md.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.score_terms import ScoreTerm
from missrec_t4r.ranking.cooccurrence import SHRINKAGE, pairs_within
from missrec_t4r.ranking.terms.history import recency


class ItemKNNSettings(NamedTuple):
    """Settings of the item-kNN term, chosen on validation."""

    weight: float
    """Factor of the term in score units; 0 switches it off."""
    decay: float
    """Weight of an item relative to the one after it in the session."""
    power: float
    """Popularity discount: counts are divided by ``((n_i + 5) (n_j + 5)) ** power``."""


class Nearby(NamedTuple):
    """The items that occurred together with those of sessions."""

    rows: Tensor
    """[batch, seq * neighbour], int64."""
    own_share: Tensor | None
    """[batch, seq * neighbour]: the part of the count C that the session itself may have made: 1 / C where both items
    are in it, so that C' / C = 1 - 1 / C, and 0 elsewhere; None where own pairs stay."""


class ItemKNNTerm(ScoreTerm):
    """Sum of co-occurrence strengths between the session's items and a candidate.

    ``term(s, j) = weight * sum over items i of s of decay**age(i) * C'[i,j] / ((n_i + 5) (n_j + 5)) ** power``

    C' is the count C, less one where j is in the session too: two items of a customer whose past is in the training
    split met at least once, in that very past, which carries no information on the next item (leave-one-session-out).

    Parameters
    ----------
    n_rows : int
        Rows of the catalogue.
    n_neighbours : int
        Strongest co-occurring items kept per item.
    own_pairs : bool
        Leave C as it is, so that the term does not depend on whether j is in the session: for the protocol
        ``kept_strict``.
    """

    neighbours: Tensor
    counts: Tensor
    strengths: Tensor
    frequency: Tensor
    settings: Tensor

    def __init__(self, n_rows: int, n_neighbours: int, *, own_pairs: bool = False) -> None:
        super().__init__()
        self.own_pairs = own_pairs
        self._is_on = False  # while the weight is zero
        self.register_buffer("neighbours", torch.zeros(n_rows, n_neighbours, dtype=torch.int32))
        self.register_buffer("counts", torch.zeros(n_rows, n_neighbours))
        self.register_buffer("strengths", torch.zeros(n_rows, n_neighbours))
        self.register_buffer("frequency", torch.zeros(n_rows))
        self.register_buffer("settings", torch.tensor([0.0, 1.0, 0.0]))

    @torch.no_grad()
    def fit(self, sessions: Sessions, window: int, *, directed: bool = False) -> None:
        """Count, for every item, the items within ``window`` events of it in a session.

        Parameters
        ----------
        sessions : Sessions
            Training sessions.
        window : int
            Small for long histories, where everything occurs with everything.
        directed : bool
            Count only what comes after the item.
        """
        rows, others, counts = pairs_within(sessions, window, directed=directed)
        order = np.lexsort((others, -counts, rows))  # of every item the strongest first
        rows, others, counts = rows[order], others[order], counts[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        keep = rank < self.neighbours.shape[1]
        self.neighbours.zero_()
        self.counts.zero_()
        at = torch.from_numpy(rows[keep]), torch.from_numpy(rank[keep])
        self.neighbours[at] = torch.from_numpy(others[keep]).to(self.neighbours)
        self.counts[at] = torch.from_numpy(counts[keep]).to(self.counts)
        self.frequency.copy_(torch.from_numpy(np.bincount(sessions.values, minlength=len(self.frequency))))
        self.choose(self.chosen)

    def count_as(self, other: ItemKNNTerm) -> None:
        """Use another term's counts from now on, without a copy."""
        self.neighbours, self.counts, self.frequency = other.neighbours, other.counts, other.frequency
        self.strengths = torch.zeros_like(other.strengths)
        self.choose(self.chosen)

    @torch.no_grad()
    def choose(self, settings: ItemKNNSettings) -> None:
        """Use these settings from now on; what each neighbour adds is computed here, once."""
        self.settings.copy_(torch.tensor(settings))
        self.refresh()
        shrunk = self.frequency + SHRINKAGE  # [row]
        discount = shrunk.unsqueeze(1) * shrunk[self.neighbours.long()]  # [row, neighbour]
        self.strengths.copy_(settings.weight * self.counts / discount**settings.power)

    @property
    def chosen(self) -> ItemKNNSettings:
        """The settings in use."""
        return ItemKNNSettings(*self.settings.tolist())

    def add_to(self, scores: Tensor, item_ids: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Return scores plus term; the term itself is kept for the cold-start term."""
        earlier["item_knn"] = self(item_ids)
        return scores.add_(earlier["item_knn"])

    def forward(self, item_ids: Tensor, nearby: Nearby | None = None) -> Tensor:
        """Return the term [batch, catalogue] for sessions ``item_ids`` [batch, seq], whose `nearby` may be given."""
        nearby = nearby or self.nearby(item_ids)
        added = (recency(item_ids, self.settings[1]).unsqueeze(-1) * F.embedding(item_ids, self.strengths)).flatten(1)
        if nearby.own_share is not None:
            added.addcmul_(added, nearby.own_share, value=-1)
        shape = item_ids.shape[0], self.frequency.shape[0]  # a trace counts no `len`
        return added.new_zeros(shape).scatter_add_(1, nearby.rows, added)

    def nearby(self, item_ids: Tensor) -> Nearby:
        """Return what the term reads of sessions [batch, seq] whatever its settings are."""
        rows = F.embedding(item_ids, self.neighbours).long().flatten(1)
        if self.own_pairs:
            return Nearby(rows, None)
        inside = torch.zeros(item_ids.shape[0], self.frequency.shape[0], dtype=torch.bool, device=rows.device)
        inside = inside.scatter_(1, item_ids, 1).gather(1, rows)
        return Nearby(rows, inside / F.embedding(item_ids, self.counts).flatten(1).clamp_min_(1))

    def refresh(self) -> None:
        """Read again whether the term is on."""
        self._is_on = self.chosen.weight != 0
