"""The transformer layers of both stacks: post-norm, GELU, boolean masks that are True where a key may be seen.

torch's own layers are not used because a decoder layer here must answer for chosen positions only, because a row
without any visible key (a session whose items have no interest) has to give zeros instead of NaN, and because keys and
values need not be projected where few queries ask for many of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.model.ops.dropout import Dropout, dropout


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
        n_queries, n_keys, width = queries.shape[1], keys.shape[1], queries.shape[2]
        if n_queries * (width + self.n_head * n_keys) < n_keys * width:
            return self._few_queries(queries, keys, mask)
        if queries is keys:
            query, key, value = self.project(queries).chunk(3, -1)
        else:
            query, (key, value) = self.query(queries), _project(keys, self.key, self.value).chunk(2, -1)
        return self.attend(query, key, value, mask)

    def project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values for self-attention side by side, [.., 3 * dim]."""
        return _project(x, self.query, self.key, self.value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, query, dim] from projected queries, keys and values [batch, .., dim]."""
        blind = ~mask.any(-1, keepdim=True)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        visible = (mask | blind).unsqueeze(1)
        if self.training and self.dropout:
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
            attended = dropout(scores.masked_fill(~visible, -torch.inf).softmax(-1), self.dropout) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.output(attended.transpose(1, 2).flatten(2).masked_fill(blind, 0.0))

    def _few_queries(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Attend without projecting the keys: the key projection moves over to the few queries, the value projection
        behind the weighted sum. By associativity the same result, at the cost of the queries' projections alone.
        """
        heads, (batch, n_queries, width) = self.n_head, queries.shape
        blind = ~mask.any(-1, keepdim=True)
        query = self.query(queries).view(-1, heads, width // heads) * (width // heads) ** -0.5
        towards = torch.bmm(query.transpose(0, 1), self.key.weight.view(heads, -1, width))  # [head, batch * query, dim]
        towards = towards.view(heads, batch, n_queries, width).transpose(0, 1).reshape(batch, -1, width)
        constant = (query * self.key.bias.view(heads, -1)).sum(-1).view(batch, n_queries, heads, 1).transpose(1, 2)
        scores = torch.bmm(towards, keys.transpose(1, 2)).view(batch, heads, n_queries, -1) + constant
        weights = scores.masked_fill(~(mask | blind).unsqueeze(1), -torch.inf).softmax(-1)
        if self.training:
            weights = dropout(weights, self.dropout)
        mixed = torch.bmm(weights.flatten(1, 2), keys).view(batch, heads, n_queries, width)
        mixed = mixed.transpose(0, 1).reshape(heads, -1, width)
        value = torch.bmm(mixed, self.value.weight.view(heads, -1, width).transpose(1, 2))  # [head, batch * query, ..]
        value = value.view(heads, batch, n_queries, -1).permute(1, 2, 0, 3)
        value = value + weights.sum(-1).transpose(1, 2).unsqueeze(-1) * self.value.bias.view(heads, -1)
        return self.output(value.flatten(2).masked_fill(blind, 0.0))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


def _project(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Apply several linear layers to the same input as one product, results side by side."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


class FeedForward(nn.Sequential):
    """Linear, GELU, dropout, linear."""

    def __init__(self, d_model: int, d_feedforward: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(d_model, d_feedforward), nn.GELU(), Dropout(dropout), nn.Linear(d_feedforward, d_model)
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm (post-norm)."""

    def __init__(self, d_model: int, n_head: int, d_feedforward: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_head, dropout)
        self.feedforward = FeedForward(d_model, d_feedforward, dropout)
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(d_model, eps), nn.LayerNorm(d_model, eps)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, projected: Tensor | None = None) -> Tensor:
        """Return [batch, token, dim].

        Parameters
        ----------
        x : Tensor [batch, token, dim]
        mask : Tensor, bool
            As in `MultiHeadAttention`.
        projected : Tensor [batch, token, 3 * dim], optional
            What `MultiHeadAttention.project` makes of ``x``, where it is at hand.
        """
        if projected is None:
            projected = self.self_attention.project(x)
        query, key, value = projected.chunk(3, -1)
        x = self.norm_attention(x + self.dropout(self.self_attention.attend(query, key, value, mask)))
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
        self.dropout = Dropout(dropout)

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
