"""The transformer layers of both stacks: post-norm, GELU, boolean masks that are True where a key may be seen.

torch's own layers are not used because a decoder layer here must answer for chosen positions only, and because a row
without any visible key (a session whose items have no interest) has to give zeros instead of NaN.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with projections (Vaswani et al., 2017).

    Parameters
    ----------
    d_model, n_head : int
        Width and number of heads.
    dropout : float
        Dropout of the attention weights.
    """

    def __init__(self, d_model: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.query, self.key = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.value, self.output = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, query, dim].

        Parameters
        ----------
        queries : Tensor [batch, query, dim]
        keys : Tensor [batch, key, dim]
            Also the values.
        mask : Tensor, bool, broadcastable to [batch, query, key]
            True where the key may be seen; a query that sees none gets the output projection's bias.
        """
        blind = ~mask.any(-1, keepdim=True)
        if queries.shape[1] == 1 and not self.training:
            return self.output(self._one_query(queries, keys, mask | blind).masked_fill(blind, 0.0))
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(queries)),
            self._heads(self.key(keys)),
            self._heads(self.value(keys)),
            attn_mask=(mask | blind).unsqueeze(1),
            dropout_p=self.dropout if self.training else 0.0,
        )
        merged = attended.transpose(1, 2).flatten(2).masked_fill(blind, 0.0)
        return self.output(merged)

    def _one_query(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, 1, dim] before the output projection, projecting the query in place of the keys and values.

        ``q . (K x) = (K^T q) . x`` and ``sum_i a_i V x_i = V sum_i a_i x_i``: the same up to rounding, and a session of
        20 tokens costs a tenth. The key's bias is the same for all keys, which a softmax does not see.
        """
        key, value = (
            part.weight.unflatten(0, (self.n_head, -1)) for part in (self.key, self.value)
        )  # [head, own, dim]
        query = self.query(queries).unflatten(-1, (self.n_head, -1)).squeeze(1).transpose(0, 1)  # [head, batch, own]
        asked = (query @ key).transpose(0, 1)
        logits = asked @ keys.transpose(1, 2) / query.shape[-1] ** 0.5
        weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
        gathered = (weights @ keys).transpose(0, 1) @ value.transpose(1, 2)  # [head, batch, own]
        return gathered.transpose(0, 1).flatten(1).add(self.value.bias).unsqueeze(1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class FeedForward(nn.Sequential):
    """Linear, GELU, dropout, linear."""

    def __init__(self, d_model: int, d_feedforward: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(d_model, d_feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_feedforward, d_model)
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm (post-norm)."""

    def __init__(self, d_model: int, n_head: int, d_feedforward: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_head, dropout)
        self.feedforward = FeedForward(d_model, d_feedforward, dropout)
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(d_model, eps), nn.LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, token, dim]; ``mask`` as in `MultiHeadAttention`."""
        x = self.norm_attention(x + self.dropout(self.self_attention(x, x, mask)))
        hidden: Tensor = self.norm_feedforward(x + self.dropout(self.feedforward(x)))
        return hidden


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory and feed-forward, post-norm."""

    def __init__(self, d_model: int, n_head: int, d_feedforward: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_head, dropout)
        self.cross_attention = MultiHeadAttention(d_model, n_head, dropout)
        self.feedforward = FeedForward(d_model, d_feedforward, dropout)
        self.norm_self, self.norm_cross = nn.LayerNorm(d_model, eps), nn.LayerNorm(d_model, eps)
        self.norm_feedforward = nn.LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Return [batch, query, dim].

        Parameters
        ----------
        queries : Tensor [batch, query, dim]
            The positions to answer for: all of ``tokens``, or a few of them.
        tokens : Tensor [batch, token, dim]
            Keys of the self-attention.
        mask : Tensor, bool, broadcastable to [batch, query, token]
        memory : Tensor [batch, interest, dim]
        memory_mask : Tensor, bool, broadcastable to [batch, query, interest]
        """
        x = self.norm_self(queries + self.dropout(self.self_attention(queries, tokens, mask)))
        x = self.norm_cross(x + self.dropout(self.cross_attention(x, memory, memory_mask)))
        hidden: Tensor = self.norm_feedforward(x + self.dropout(self.feedforward(x)))
        return hidden
