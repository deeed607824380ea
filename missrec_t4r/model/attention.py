"""Transformer layers of both stacks: post-norm, GELU, boolean masks that are True where a key may be seen (E5, E6, E8).

torch's own layers are not used because a decoder layer has to compute chosen positions only, and because a query
without any visible key (a session whose items have no interest) has to give zeros instead of NaN.
`missrec_t4r.model.fast.attention` computes the same with fewer products.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with projections (Vaswani et al., 2017; E5).

        attention(Q, K) = W_o softmax(W_q Q (W_k K)' / sqrt(dim / head)) W_v K        in every head, side by side

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
        blind = ~mask.any(-1, keepdim=True)  # [batch, query, 1]: these see all keys, and their result is zeroed below
        query, key, value = (
            self.split_heads(part) for part in (self.query(queries), self.key(keys), self.value(keys))
        )  # [batch, head, .., dim / head]
        dropout = self.dropout if self.training else 0.0
        visible = (mask | blind).unsqueeze(1)  # [batch, 1, query, key]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return self.join_heads(attended, blind)

    def split_heads(self, x: Tensor) -> Tensor:
        """Return [batch, head, token, dim / head] for [batch, token, dim]."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def join_heads(self, attended: Tensor, blind: Tensor) -> Tensor:
        """Project [batch, head, query, dim / head] to [batch, query, dim]; zeros enter where a query sees no key."""
        joined: Tensor = self.output(attended.transpose(1, 2).flatten(2).masked_fill(blind, 0.0))
        return joined


class FeedForward(nn.Sequential):
    """Linear, GELU, dropout, linear."""

    def __init__(self, d_model: int, d_feedforward: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(d_model, d_feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_feedforward, d_model)
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm (post-norm; E6)."""

    def __init__(self, d_model: int, n_head: int, d_feedforward: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_head, dropout)
        self.feedforward = FeedForward(d_model, d_feedforward, dropout)
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(d_model, eps), nn.LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, token, dim] for ``x`` of that shape; ``mask`` as in `MultiHeadAttention`."""
        x = self.norm_attention(x + self.dropout(self.self_attention(x, x, mask)))
        hidden: Tensor = self.norm_feedforward(x + self.dropout(self.feedforward(x)))
        return hidden


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory and feed-forward, post-norm (E8).

    Parameters
    ----------
    d_model, n_head, d_feedforward, dropout, eps
        Sizes of the layer.
    memory : bool
        False: without attention to a memory, for models that have no interests (ours).
    """

    cross_attention: MultiHeadAttention | None
    norm_cross: nn.LayerNorm | None

    def __init__(
        self, d_model: int, n_head: int, d_feedforward: int, dropout: float, eps: float, *, memory: bool = True
    ) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_head, dropout)
        self.cross_attention = MultiHeadAttention(d_model, n_head, dropout) if memory else None
        self.feedforward = FeedForward(d_model, d_feedforward, dropout)
        self.norm_self = nn.LayerNorm(d_model, eps)
        self.norm_cross = nn.LayerNorm(d_model, eps) if memory else None
        self.norm_feedforward = nn.LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Return [batch, query, dim].

        Parameters
        ----------
        queries : Tensor [batch, query, dim]
            The positions to compute: all of ``tokens``, or a few of them.
        tokens : Tensor [batch, token, dim]
            Keys of the self-attention.
        mask : Tensor, bool, broadcastable to [batch, query, token]
        memory : Tensor [batch, interest, dim]
        memory_mask : Tensor, bool, broadcastable to [batch, query, interest]
        """
        x = self.norm_self(queries + self.dropout(self.self_attention(queries, tokens, mask)))
        if self.cross_attention is not None and self.norm_cross is not None:
            x = self.norm_cross(x + self.dropout(self.cross_attention(x, memory, memory_mask)))
        hidden: Tensor = self.norm_feedforward(x + self.dropout(self.feedforward(x)))
        return hidden
