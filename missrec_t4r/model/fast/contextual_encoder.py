"""Contextual encoder whose first projection is made once per distinct centroid of a batch.

The first layer's inputs are rows of one table (the centroids) and carry neither position nor dropout, so that equal
interests have equal queries, keys and values. A server keeps the projections of all centroids of a catalogue version.
Where a graph is traced or compiled, the interests of a session have a fixed number of slots.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.fast.attention import FastAttention
from missrec_t4r.model.interests import InterestTokens, InterestVocabulary
from missrec_t4r.tracing import sizes

MANY = 256
"""Interest tokens of a batch from which on it is worth to look for those that occur more than once."""


class FastContextualEncoder(ContextualEncoder):
    """`ContextualEncoder` with the shortcut of the module."""

    def forward(self, interests: InterestTokens, projections: Tensor | None = None) -> Tensor:
        """Return the memory [batch, interest, dim].

        Parameters
        ----------
        interests : InterestTokens
        projections : Tensor [interest + 1, 3 * dim], optional
            `project` of all centroids.
        """
        memory, mask = interests.tokens, self.visible(interests)
        projected = self._first_projection(interests, projections)
        for layer in self.layers:
            memory = layer(memory, mask, projected)
            projected = None
        normed: Tensor = self.norm(memory)
        return normed

    def project(self, centroids: Tensor) -> Tensor:
        """Return the first layer's query, key and value of centroids, side by side; there must be a layer."""
        return cast(FastAttention, self.layers[0].get_submodule("self_attention")).project(centroids)

    def _first_projection(self, interests: InterestTokens, projections: Tensor | None) -> Tensor | None:
        """Project each centroid that occurs in the batch once; None where too few occur for that to be worth it."""
        ids, centroids = interests.ids, interests.centroids
        if ids is not None and projections is not None:
            return F.embedding(ids, projections)
        if ids is None or centroids is None or not len(self.layers) or math.prod(sizes(ids)) < MANY:
            return None
        if ids.device.type == "cuda":  # to find those that occur, the host would have to wait
            return F.embedding(ids, self.project(centroids)) if len(centroids) <= ids.numel() else None
        if not torch.compiler.is_compiling():
            occurs = torch.zeros(sizes(centroids)[0], dtype=torch.bool, device=ids.device)
            occurs[ids] = True
            centroids, ids = centroids[occurs], (occurs.cumsum(0) - 1)[ids]
        return F.embedding(ids, self.project(centroids))


class FastInterestVocabulary(InterestVocabulary):
    """`InterestVocabulary` that can be traced and compiled: a graph keeps one slot per item and modality."""

    def n_slots(self, mask: Tensor, item_ids: Tensor, empty_slots: int) -> int:
        """Return the number of slots; all of them in a graph, since their number would be a constant there."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return mask.shape[1]
        return super().n_slots(mask, item_ids, empty_slots)
