"""Cold-start term: what ranking adds to the items without any event in the training split (E20; ours).

The item-kNN term lifts every item with events above those without. A cold item gets the mean item-kNN term of its 32
most similar warm items, the similarity of its content to the session's, and a bias that is calibrated on validation so
that cold items take a target share of the top-10 exposure (`missrec_t4r.ranking.tune_cold_start`). Warm items keep
their scores to the bit. Its effect: docs/experiments.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model.item_encoder import ItemEncoder
from missrec_t4r.ranking.similarity import mean_similarity
from missrec_t4r.ranking.terms.item_content import ItemContentTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.schema import FIRST_ITEM_ROW

_N_ALIKE = 32
"""Warm items per cold item, as in `ContentKNNTerm`."""
_SHARPNESS = 10.0
"""Inverse temperature of the softmax over these warm items (docs/experiments.md)."""
_TENTH = 10
_MOST_COLD = 1 << 14
"""Cold items beyond which the term is off."""
_MOST_WARM = 50_000
"""Warm items that are compared."""
_CHUNK_BYTES = 1 << 26


class ColdStartSettings(NamedTuple):
    """Settings of the cold-start term, chosen on validation."""

    neighbours: float
    """Factor of the imputed item-kNN term."""
    content: float
    """Score units per cosine between the session's mean content and the cold item's."""
    threshold: float
    """Share of a session's tenth largest item-kNN term that is added: without it, sessions with many co-occurrences
    would show no cold item."""
    bias: float
    """Added to every cold item, in score units."""


class ColdStartTerm(ItemContentTerm):
    """Score of the cold items, on top of the network's and the content-kNN term's.

    ``term(s, j) = neighbours * sum_k a[j,k] knn(s, k) + content * cos(q(s), g[j]) + threshold * tenth(s) + bias``

    ``knn`` is the item-kNN term (E18); ``a[j,k]`` the softmax over the 32 warm items k most similar to j, of 10 times
    their similarity: the mean of the cosines of raw vectors (E19) and of modality embeddings, which the adapters have
    trained on what is bought together; ``g`` are vectors around the mean of the warm items, ``q(s) = sum_i .7**age(i)
    unit(g[i])`` over the session; the cosine is the mean over the modalities that validation chose and that session and
    item have; ``tenth`` is the tenth largest ``knn`` of the session.

    Parameters
    ----------
    item_encoder : ItemEncoder
        Of the network: has the modality vectors and the adapters.
    item_knn : ItemKNNTerm
        Has the event counts: an item without any is cold. Both stay the parts of others; no weight of theirs is saved
        with this term.
    """

    settings: Tensor
    modalities: Tensor
    alike: Tensor
    likeness: Tensor

    def __init__(self, item_encoder: ItemEncoder, item_knn: ItemKNNTerm) -> None:
        super().__init__(item_encoder, item_knn, save_centres=False)
        self._weights = ColdStartSettings(0.0, 0.0, 0.0, 0.0)  # numbers: tensors are slow to read one by one
        self.register_buffer("settings", torch.zeros(4))
        self.register_buffer("modalities", torch.ones(len(self.names)))
        self.register_buffer("alike", torch.zeros(0, 1, dtype=torch.int64), persistent=False)
        self.register_buffer("likeness", torch.zeros(0, 1), persistent=False)

    def refresh(self) -> None:
        """Find the cold items and the warm items that they resemble; after tuning and after loading weights."""
        cold = cold_item_mask(self.item_knn.frequency)
        self.find(cold & self.settings.any(), ~cold)

    @torch.no_grad()
    def find(self, cold: Tensor, warm: Tensor, *, by_embeddings: bool = True) -> None:
        """Find the most similar warm items of every cold item, under the chosen modalities that a warm item has.

        Parameters
        ----------
        cold, warm : Tensor [row], bool
            At most 50,000 warm items are compared, those of the lowest rows; beyond 16,384 cold items the term is off.
        by_embeddings : bool
            False compares raw vectors alone: for warm items that stand for cold ones, since the adapters were trained
            on their events.
        """
        presence = self.item_encoder.presence
        chosen = (self.modalities > 0) & (presence & warm).any(1)
        self._used, self._weights = torch.nonzero(chosen).flatten().tolist(), self.chosen
        here = presence[chosen].any(0)
        rows, others = torch.nonzero(cold & here).flatten(), torch.nonzero(warm & here).flatten()[:_MOST_WARM]
        if len(rows) > _MOST_COLD:
            rows = rows[:0]
        if len(rows):
            for index in self._used:
                centre = self.table(index)[others[presence[index, others]]].mean(0)
                setattr(self, f"centre_{self.names[index]}", centre)
        self.score_rows(rows, self._used)
        self.alike, self.likeness = rows.new_zeros(0, 1), self.settings.new_zeros(0, 1)
        if len(rows):
            self._compare(others, by_embeddings)

    def _compare(self, others: Tensor, by_embeddings: bool) -> None:
        items = torch.cat([self.rows, others])
        unit = [self.unit(index, items) for index in self._used]  # [item, width] each, zero where missing
        if by_embeddings:
            unit += [self.item_encoder.unit_embeddings(index, items) for index in self._used]
        here = self.item_encoder.presence[self._used][:, items].repeat(len(unit) // len(self._used), 1)
        cold, warm = torch.arange(len(items), device=items.device).split([len(self.rows), len(others)])
        alike, likeness = [], []
        for part in cold.split(max(1, _CHUNK_BYTES // (4 * len(others)))):
            nearest, at = mean_similarity(unit, here, part, warm).topk(min(_N_ALIKE, len(others)), dim=1)
            alike.append(others[at])
            likeness.append(torch.softmax(_SHARPNESS * nearest, dim=1).nan_to_num(0.0))  # NaN: nothing is comparable
        self.alike, self.likeness = torch.cat(alike), torch.cat(likeness).to(self.settings.dtype)

    @torch.no_grad()
    def choose(self, settings: ColdStartSettings) -> None:
        """Use these settings from now on."""
        self.settings.copy_(torch.tensor(settings))
        self._weights = self.chosen

    @property
    def chosen(self) -> ColdStartSettings:
        """The settings in use."""
        return ColdStartSettings(*self.settings.tolist())

    @property
    def active(self) -> bool:
        """Whether there is a cold item and a setting that is not zero."""
        return self._is_on and any(self._weights)

    def add_to(self, scores: Tensor, item_ids: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Return scores plus term: the columns of the cold items alone change."""
        counted = earlier.get("item_knn")
        counted = torch.zeros_like(scores) if counted is None else counted  # [batch, catalogue]
        return scores.index_add(1, self.rows, self.imputed(item_ids, counted).to(scores.dtype))

    def imputed(self, item_ids: Tensor, item_knn: Tensor) -> Tensor:
        """Return what is added to the scores of the cold items, [batch, cold], in the order of ``rows``.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int64
        item_knn : Tensor [batch, catalogue]
            The item-kNN term of the same sessions.
        """
        neighbours, content, threshold, bias = self._weights
        added = neighbours * self.mean_of_similar(item_knn) + bias
        if threshold:
            added.add_(tenth_largest(item_knn), alpha=threshold)
        if content:
            added.add_(self.likeness_to(item_ids), alpha=content)
        return added

    def mean_of_similar(self, scores: Tensor) -> Tensor:
        """Return the mean [batch, cold] of scores [batch, catalogue] over each cold item's most similar warm items."""
        table = scores.T.contiguous()
        return F.embedding_bag(self.alike, table, per_sample_weights=self.likeness.to(table.dtype), mode="sum").T


def tenth_largest(item_knn: Tensor) -> Tensor:
    """Return a session's tenth largest item-kNN term, [batch, 1]."""
    return item_knn.topk(min(_TENTH, item_knn.shape[1]), dim=1).values[:, -1:]  # [batch, 1]


def cold_item_mask(frequency: Tensor) -> Tensor:
    """Return [row], bool: True for items without an event in training; nowhere before anything was counted."""
    none = frequency == 0
    none[:FIRST_ITEM_ROW] = False
    return none & frequency.any()
