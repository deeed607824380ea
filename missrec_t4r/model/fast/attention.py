"""Attention with fewer products: joint projections, and keys that need no projection where few queries attend to many.

    key projection:    q' (W_k x + b_k)            = (W_k' q)' x + q' b_k
    value projection:  sum of a_i (W_v x_i + b_v)  = W_v (sum of a_i x_i) + (sum of a_i) b_v

With one query per session (the last position in the decoder) the keys' projections would cost more than all the rest.
The same result as `missrec_t4r.model.attention`, up to rounding and another stream of random numbers for dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.model.attention import EncoderLayer, MultiHeadAttention
from missrec_t4r.model.fast.dropout import dropout
from missrec_t4r.tracing import sizes


class FastAttention(MultiHeadAttention):
    """`MultiHeadAttention` by the cheaper of two orders of the products."""

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, query, dim], as `MultiHeadAttention.forward` does."""
        (_, n_queries, width), n_keys = sizes(queries), sizes(keys)[1]
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
        query, key, value = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        visible = (mask | blind).unsqueeze(1)
        if self.training and self.dropout:  # torch's own draws random numbers one at a time on a CPU
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)  # [batch, head, query, key]
            attended = dropout(scores.masked_fill(~visible, -torch.inf).softmax(-1), self.dropout) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.join_heads(attended, blind)

    def _few_queries(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Attend without projecting the keys: the products of the module's docstring."""
        heads, (batch, n_queries, width) = self.n_head, queries.shape
        blind = ~mask.any(-1, keepdim=True)
        query = self.query(queries).view(-1, heads, width // heads) * (width // heads) ** -0.5
        towards = torch.bmm(query.transpose(0, 1), self.key.weight.view(heads, -1, width))  # [head, batch * query, dim]
        towards = towards.view(heads, batch, n_queries, width).transpose(0, 1).reshape(batch, -1, width)
        constant = (query * self.key.bias.view(heads, -1)).sum(-1).view(batch, n_queries, heads, 1).transpose(1, 2)
        scores = torch.bmm(towards, keys.transpose(1, 2)).view(batch, heads, n_queries, -1) + constant
        weights = scores.masked_fill(~(mask | blind).unsqueeze(1), -torch.inf).softmax(-1)  # [batch, head, query, key]
        if self.training:
            weights = dropout(weights, self.dropout)
        mixed = torch.bmm(weights.flatten(1, 2), keys).view(batch, heads, n_queries, width)
        mixed = mixed.transpose(0, 1).reshape(heads, -1, width)  # [head, batch * query, dim]
        value = torch.bmm(mixed, self.value.weight.view(heads, -1, width).transpose(1, 2))  # [head, batch * query, ..]
        value = value.view(heads, batch, n_queries, -1).permute(1, 2, 0, 3)  # [batch, query, head, dim / head]
        # dropout makes the sum of the weights other than 1, so the bias is multiplied with it
        value = value + weights.sum(-1).transpose(1, 2).unsqueeze(-1) * self.value.bias.view(heads, -1)
        return self.output(value.flatten(2).masked_fill(blind, 0.0))


class FastEncoderLayer(EncoderLayer):
    """`EncoderLayer` that takes the projections of its input where they are at hand."""

    self_attention: FastAttention

    def forward(self, x: Tensor, mask: Tensor, projected: Tensor | None = None) -> Tensor:
        """Return [batch, token, dim].

        Parameters
        ----------
        x : Tensor [batch, token, dim]
        mask : Tensor, bool
        projected : Tensor [batch, token, 3 * dim], optional
            `FastAttention.project` of ``x``.
        """
        projected = self.self_attention.project(x) if projected is None else projected
        query, key, value = projected.chunk(3, -1)
        x = self.norm_attention(x + self.dropout(self.self_attention.attend(query, key, value, mask)))
        hidden: Tensor = self.norm_feedforward(x + self.dropout(self.feedforward(x)))
        return hidden


def _project(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Apply several linear layers to the same input as one product, results side by side."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))
