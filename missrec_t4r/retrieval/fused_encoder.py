"""Fused encoder: the session encoder with everything precomputed that does not depend on the session.

The same vectors as `MISSRec.encode` up to rounding, compared on sessions of several shapes before it is used. An item's
modalities and ID are summed once per catalogue version; the first attention layer sees interests alone, so that its
scores and outputs are looked up, or with many interests their projections; a session's distinct interests are found on
the host; the key bias is dropped, since a number added to all keys cancels in the softmax, and the value bias is added
to that of the output.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.model.attention import DecoderLayer, EncoderLayer, MultiHeadAttention
from missrec_t4r.model.fast import use_shortcuts
from missrec_t4r.model.fast.contextual_encoder import FastContextualEncoder
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.traced_encoder import sample_sessions
from missrec_t4r.schema import PADDING_ROW

_CHECKED = ((1, 1), (1, 2), (1, 9), (3, 1), (5, 12))
"""Batch and length of the sessions on which the result is compared with the model's."""
_TOLERANCE = 1e-5
_PROJECTIONS_IN_MEMORY = 1 << 26
"""Projections of interests of at most this many numbers (256 MiB) are kept."""

_SCORES_IN_MEMORY = 1 << 24
"""Attention scores between all interests are kept if they are at most this many numbers (64 MiB)."""


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _FeedForward(NamedTuple):
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    norm: _Norm

    def __call__(self, x: Tensor) -> Tensor:
        """Return norm(x + feedforward(x)) of tokens [token, dim]."""
        return self.norm(x + torch.addmm(self.down_bias, F.gelu(torch.addmm(self.up_bias, x, self.up)), self.down))


class _LastQuery(NamedTuple):
    """Attention of one query per session: it is projected, keys and values are not (as in `MultiHeadAttention`)."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor
    blind: Tensor
    norm: _Norm

    def __call__(self, x: Tensor, keys: Tensor, hidden: Tensor | None, blind: Tensor | None) -> Tensor:
        """Return norm(x + attention) [batch, dim] for x [batch, dim] and keys [batch, key, dim].

        ``hidden`` [batch, 1, key] is True where a key may not be seen; ``blind`` [batch] where none may.
        """
        heads, (batch, width) = len(self.key), x.shape
        query = torch.addmm(self.query_bias, x, self.query).view(batch, heads, -1).transpose(0, 1)
        towards = torch.bmm(query, self.key).transpose(0, 1)  # [batch, head, dim]
        scores = torch.bmm(towards, keys.transpose(1, 2))  # [batch, head, key]
        if hidden is not None:
            scores = scores.masked_fill_(hidden, -torch.inf)
        mixed = torch.bmm(scores.softmax(-1), keys).transpose(0, 1)  # [head, batch, dim]
        value = torch.bmm(mixed, self.value).transpose(0, 1).reshape(batch, width)
        attended = torch.addmm(self.output_bias, value, self.output)
        if blind is not None:
            attended = torch.where(blind.unsqueeze(1), self.blind, attended)
        return self.norm(x + attended)


class _EncoderLayer(NamedTuple):
    project: Tensor
    project_bias: Tensor
    output: Tensor
    output_bias: Tensor
    n_head: int
    norm: _Norm
    feedforward: _FeedForward

    def attend(self, x: Tensor, projected: Tensor, visible: Tensor | None, real: Tensor | None) -> Tensor:
        """Return x + attention [token, dim] for the real tokens x.

        ``projected`` [batch, token, 3 * dim] holds all, the filling too; ``visible`` [batch, query, key] is True where
        a key may be seen; ``real`` [token] is where the real ones stand among all, None where all are.
        """
        batch, n_tokens, _ = projected.shape
        parts = projected.view(batch, n_tokens, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        mask = None if visible is None else visible.unsqueeze(1)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
        attended = _taken(attended.transpose(1, 2).reshape(-1, x.shape[1]), real)
        return x + torch.addmm(self.output_bias, attended, self.output)

    def transform(self, attended: Tensor) -> Tensor:
        """Return the new tokens [token, dim] from x + attention."""
        return self.feedforward(self.norm(attended))


class _InterestAttention(NamedTuple):
    """Attention of the first encoder layer: that of two interests is the same in every session."""

    scores: Tensor
    """[interest * interest, head]: of a query and a key, scaled."""
    outputs: Tensor
    """[interest, head * dim]: value times its rows of the output matrix."""
    tokens: Tensor
    """[interest, dim]: centroid plus output bias."""

    @classmethod
    def of(cls, layer: _EncoderLayer, centroids: Tensor, projections: Tensor) -> _InterestAttention:
        """Look up what ``layer`` computes for ``centroids`` [interest, dim]."""
        n, dim = centroids.shape
        query, key, value = projections.view(n, 3, layer.n_head, -1).unbind(1)  # [interest, head, dim / head]
        scores = torch.einsum("ihd,jhd->ijh", query, key) * query.shape[2] ** -0.5
        outputs = torch.einsum("ihd,hdo->iho", value, layer.output.view(layer.n_head, -1, dim))
        return cls(scores.reshape(n * n, -1), outputs.reshape(n, -1), centroids + layer.output_bias)

    def __call__(self, rows: Tensor, flat: Tensor, visible: Tensor | None, real: Tensor | None) -> Tensor:
        """Return x + attention [token, dim] for interests ``rows`` [batch, interest], of which ``flat`` are real."""
        batch, width = rows.shape
        pairs = (rows * len(self.tokens)).unsqueeze(2) + rows.unsqueeze(1)
        scores = F.embedding(pairs, self.scores)  # [batch, query, key, head]
        if visible is not None:
            scores = scores.masked_fill_(~visible.unsqueeze(3), -torch.inf)
        outputs = F.embedding(rows, self.outputs).view(batch, -1, self.tokens.shape[1])  # [batch, key * head, dim]
        attended = torch.bmm(scores.softmax(2).view(batch, width, -1), outputs)
        return F.embedding(flat, self.tokens).add_(_taken(attended.flatten(0, 1), real))


class FusedEncoder:
    """Compacted rows to unit session vectors.

    Parameters
    ----------
    model : MISSRec
        One for which `can_be_fused` holds.
    tokens : ItemEmbeddings of shape [row]
        The catalogue's embeddings in evaluation mode.
    """

    def __init__(self, model: MISSRec, tokens: ItemEmbeddings) -> None:
        decoder, interests = model.decoder, model.interests
        self._causal = model.encoder.attention == "causal"
        common: Tensor | float = 0.0
        if tokens.ids is not None and tokens.id_mask is not None:
            common = tokens.ids * tokens.id_mask.unsqueeze(-1)
        self._items = (tokens.modality * tokens.mask.unsqueeze(-1)).sum(0) + common
        self._positions = decoder.positions.weight.detach().clone()
        self._assignment = interests.assignment.T.cpu().numpy().copy()
        self._centroids = interests.centroids.detach().clone()
        self._projections = (
            cast(FastContextualEncoder, use_shortcuts(model.encoder)).project(interests.centroids).detach()
        )
        self._encoder = [_encoder_layer(cast(EncoderLayer, layer)) for layer in model.encoder.layers]
        self._first: _InterestAttention | None = None
        if len(self._centroids) ** 2 * self._encoder[0].n_head <= _SCORES_IN_MEMORY:
            self._first = _InterestAttention.of(self._encoder[0], self._centroids, self._projections)
        self._encoder_norm, self._norm_input, self._norm = map(
            _norm, (model.encoder.norm, decoder.norm_input, decoder.norm)
        )
        last = cast(DecoderLayer, decoder.layers[0])
        self._self = _last_query(last.self_attention, last.norm_self)
        self._cross = _last_query(last.cross_attention, last.norm_cross)
        self._feedforward = _feedforward(last.feedforward, last.norm_feedforward)

    @torch.inference_mode()
    def __call__(self, known: Ints) -> Tensor:
        """Return [batch, dim] for rows [batch, seq] padded with 0 on the right; zero for a session without items."""
        batch, n = known.shape
        if not batch:
            return self._items.new_zeros(0, self._items.shape[1])
        lengths = (known > PADDING_ROW).sum(1)
        device = self._items.device
        session = torch.from_numpy(known).to(device)
        x = self._norm_input(F.embedding(session, self._items) + self._positions[:n])
        at = torch.from_numpy(np.maximum(lengths - 1, 0)).to(device)
        query = x[0, n - 1 : n] if batch == 1 and lengths[0] == n else x[torch.arange(batch, device=device), at]
        ragged, empty = int(lengths.min()) < n, lengths == 0
        hidden = torch.from_numpy(_hidden(lengths, n)).to(device) if ragged else None
        query = self._self(query, x, hidden, None)
        memory, unseen, blind = self._memory(known)
        query = self._feedforward(self._cross(query, memory, unseen, blind))
        vectors = F.normalize(self._norm(query), dim=-1)
        return vectors * torch.from_numpy(~empty).to(device).unsqueeze(1) if empty.any() else vectors

    def _memory(self, known: Ints) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the memory [batch, interest, dim], the mask of its empty slots, and the sessions without interest."""
        chosen, position, counts = self._interests(known)
        batch, width = chosen.shape
        mask = np.arange(width) < counts[:, None]
        visible: Bools | None = None
        if self._causal:
            visible = position[:, None, :] <= position[:, :, None]
            visible = (visible & mask[:, None, :]) | ~mask[:, :, None]  # what is no token may see anything: no NaN
        elif int(counts.min()) < width:
            visible = mask[:, None, :] | ~mask[:, :, None]
        device = self._centroids.device
        rows, full = torch.from_numpy(chosen).to(device), int(counts.min()) == width
        seen = None if visible is None else torch.from_numpy(visible).to(device)
        real = None if full else torch.from_numpy(np.flatnonzero(mask)).to(device)
        flat = _taken(rows.view(-1), real)
        if self._first is not None:
            memory = self._first(rows, flat, seen, real)
        else:
            projected = F.embedding(rows, self._projections)
            memory = self._encoder[0].attend(F.embedding(flat, self._centroids), projected, seen, real)
        memory = self._encoder[0].transform(memory)
        for layer in self._encoder[1:]:
            projected = torch.addmm(layer.project_bias, memory, layer.project)
            projected = _spread(projected, real, batch * width).view(batch, width, -1)
            memory = layer.transform(layer.attend(memory, projected, seen, real))
        memory = _spread(self._encoder_norm(memory), real, batch * width).view(batch, width, -1)
        if full:
            return memory, None, None
        blind = counts == 0
        hidden = torch.from_numpy(_hidden(counts, width)).to(device)
        return memory, hidden, torch.from_numpy(blind).to(device) if blind.any() else None

    def _interests(self, known: Ints) -> tuple[Ints, Ints, Ints]:
        """Return distinct interests [batch, interest], the index of the first item of each, and their count [batch]."""
        shown = self._assignment[known].reshape(len(known), -1)[:, ::-1].tolist()
        ages = [place // self._assignment.shape[1] for place in reversed(range(len(shown[0])))]
        firsts = [dict(zip(line, ages, strict=True)) for line in shown]  # newest first, so that the oldest stays
        for first in firsts:
            first.pop(0, None)
        counts = np.array([len(first) for first in firsts])
        width = max(int(counts.max()), 1)
        chosen, position = np.zeros((len(known), width), np.int64), np.zeros((len(known), width), np.int64)
        for line, first in enumerate(firsts):
            chosen[line, : len(first)], position[line, : len(first)] = list(first), list(first.values())
        return chosen, position, counts


def fuse_encoder(model: MISSRec, tokens: ItemEmbeddings | None) -> FusedEncoder | None:
    """Return a fused encoder, or None where the model has parts that cannot be fused or the vectors would differ."""
    if tokens is None or not can_be_fused(model):
        return None
    encoder = FusedEncoder(model, tokens)
    return encoder if all(_equal(model, tokens, encoder, *shape) for shape in _CHECKED) else None


def can_be_fused(model: MISSRec) -> bool:
    """Return whether the model has only parts that `FusedEncoder` implements, as that of the default recipe has."""
    return (
        model.event_features is None
        and model.decoder.sequence_fusion == "add"
        and len(model.decoder.layers) == 1
        and len(model.encoder.layers) > 0
        and 3 * model.interests.centroids.numel() <= _PROJECTIONS_IN_MEMORY
    )


@torch.inference_mode()
def _equal(model: MISSRec, tokens: ItemEmbeddings, encoder: FusedEncoder, batch: int, length: int) -> bool:
    session = sample_sessions(model, batch, length)
    expected = model.encode(session, items=tokens.take(session), last_only=True).vectors
    expected = expected * (session > PADDING_ROW).any(1, keepdim=True)
    return torch.allclose(encoder(session.cpu().numpy()), expected, atol=_TOLERANCE, rtol=0)


def _hidden(lengths: Ints, width: int) -> Bools:
    """Return [batch, 1, width], True behind the end of a session; for an empty one nowhere, which avoids NaN."""
    return (np.arange(width) >= np.where(lengths == 0, width, lengths)[:, None])[:, None]


def _taken(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Return the real ones of all tokens [total, ...]."""
    return tokens if real is None else tokens.index_select(0, real)


def _spread(tokens: Tensor, real: Tensor | None, total: int) -> Tensor:
    """Return [total, dim] with the tokens at their indices and zeros between them."""
    return tokens if real is None else tokens.new_zeros(total, tokens.shape[1]).index_copy_(0, real, tokens)


def _linear(layer: nn.Module) -> tuple[Tensor, Tensor]:
    linear = cast(nn.Linear, layer)
    return linear.weight.detach().T.contiguous(), linear.bias.detach().clone()


def _norm(layer: nn.Module) -> _Norm:
    norm = cast(nn.LayerNorm, layer)
    return _Norm(norm.weight.detach().clone(), norm.bias.detach().clone(), norm.eps)


def _feedforward(block: nn.Module, norm: nn.Module) -> _FeedForward:
    layers = [layer for layer in block.children() if isinstance(layer, nn.Linear)]
    return _FeedForward(*_linear(layers[0]), *_linear(layers[1]), _norm(norm))


def _encoder_layer(layer: EncoderLayer) -> _EncoderLayer:
    attention = layer.self_attention
    parts = [_linear(part) for part in (attention.query, attention.key, attention.value)]
    return _EncoderLayer(
        torch.cat([weight for weight, _ in parts], 1),
        torch.cat([bias for _, bias in parts]),
        *_linear(attention.output),
        attention.n_head,
        _norm(layer.norm_attention),
        _feedforward(layer.feedforward, layer.norm_feedforward),
    )


def _last_query(attention: MultiHeadAttention, norm: nn.Module) -> _LastQuery:
    heads = attention.n_head
    query, query_bias = _linear(attention.query)
    width = len(query)
    scale = (width // heads) ** -0.5
    output, output_bias = _linear(attention.output)
    value_bias = attention.value.bias.detach()
    return _LastQuery(
        query * scale,
        query_bias * scale,
        attention.key.weight.detach().view(heads, -1, width).clone(),
        attention.value.weight.detach().view(heads, -1, width).transpose(1, 2).contiguous(),
        output,
        torch.addmv(output_bias, output.T, value_bias),
        output_bias,
        _norm(norm),
    )
