"""Contextual encoder: self-attention over the session's interest tokens (specification 4)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config import Attention
from missrec_t4r.model.attention import EncoderLayer, MultiHeadAttention
from missrec_t4r.model.interests import InterestTokens

_MANY = 256
"""Interest tokens of a batch from which on it is worth to look for those that occur more than once."""


class ContextualEncoder(nn.Module):
    """Relate the interests of a session to each other; no positions, so their order does not matter.

    Parameters
    ----------
    n_layers, d_model, n_head, d_feedforward, dropout, eps
        Sizes of the transformer layers.
    attention : {"bidirectional", "causal"}
        ``causal``: an interest sees the interests that the session showed at the same item or earlier (ours; needed to
        train all positions at once).
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        n_head: int,
        d_feedforward: int,
        dropout: float,
        eps: float,
        attention: Attention = "bidirectional",
    ) -> None:
        super().__init__()
        self.attention = attention
        self.layers = nn.ModuleList(EncoderLayer(d_model, n_head, d_feedforward, dropout, eps) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, eps)

    def forward(self, interests: InterestTokens) -> Tensor:
        """Return the memory [batch, interest, dim] for the decoder."""
        memory, mask = interests.tokens, interests.mask.unsqueeze(1)
        if self.attention == "causal":
            mask = mask & (interests.position.unsqueeze(1) <= interests.position.unsqueeze(2))
        projected = self._first_projection(interests)
        for layer in self.layers:
            memory = layer(memory, mask, projected)
            projected = None
        normed: Tensor = self.norm(memory)
        return normed

    def _first_projection(self, interests: InterestTokens) -> Tensor | None:
        """Project each centroid that the batch names once; None where too few are named to be worth it.

        The first layer's inputs are rows of one table and carry neither position nor dropout.
        """
        rows, centroids = interests.rows, interests.centroids
        if rows is not None and interests.projections is not None:
            return F.embedding(rows, interests.projections)
        if rows is None or centroids is None or not len(self.layers) or rows.numel() < _MANY:
            return None
        if not torch.compiler.is_compiling():
            named = torch.zeros(len(centroids), dtype=torch.bool, device=rows.device)
            named[rows] = True
            centroids, rows = centroids[named], (named.cumsum(0) - 1)[rows]
        return F.embedding(rows, self.project(centroids))

    def project(self, centroids: Tensor) -> Tensor:
        """Return the first layer's query, key and value of centroids, side by side; there must be a layer."""
        attention = cast(MultiHeadAttention, self.layers[0].get_submodule("self_attention"))
        projected: Tensor = attention.project(centroids)
        return projected
