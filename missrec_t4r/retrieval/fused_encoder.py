"""Fused encoder: the session encoder with everything precomputed that does not depend on the session.

It returns the vectors of `MISSRec.encode` up to rounding; `fuse_encoder` compares both on sessions of several shapes.
What it saves:

- An item's modalities and ID are summed once per catalogue version, and projected to the queries, keys and values of
  the first decoder layer where that is computed at all items.
- The first layer of the contextual encoder sees interests alone, whatever the session: in sessions of few interests
  the weights between two of them and what each adds to the output are looked up, for pairs that see each other alone;
  in others queries, keys and values.
- A session's distinct interests are found on the host.
- Padding is left out of all work on single items and interests.
- The last decoder layer is computed at the last item alone, the others at all items. In the last one keys and values
  are not projected: its key bias is dropped, since a number that is added to all scores of a query cancels in the
  softmax, and its value bias is added to that of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.arrays import AnyArray, Bools, Ints
from missrec_t4r.model.attention import DecoderLayer, EncoderLayer, MultiHeadAttention
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.traced_encoder import PROJECTIONS_IN_MEMORY, sample_sessions
from missrec_t4r.schema import PADDING_ROW

_CHECKED = ((1, 1), (1, 2), (1, 9), (3, 1), (5, 12), (2, 100))
"""Batch and length of the sessions on which the result is compared with the model's."""
_TOLERANCE = 1e-5
_NUMBERS_IN_MEMORY = 1 << 24
"""Attention weights between all interests, and projections of all items, are kept up to so many numbers (64 MiB)."""
_FEW_INTERESTS = 64
"""Interests per session up to which these weights are looked up; beyond some 100, computing them takes less time."""
_LEAST_SCORE = -60.0
"""Of an interest with itself, its best score being 0: a sum of weights is then at least e-60, and no weight that is too
small for 32 bits (e-87) counts in it."""
_POSITIONS_AT_ONCE = 1 << 12
"""Most positions, padding included, of a pass over several sessions: a larger batch is sorted by length and divided."""

_ALWAYS, _NEVER = np.float32(0.0), np.float32(-np.inf)
"""What is added to the score of a key that may be seen, and of one that may not."""


Norm = Callable[[Tensor], Tensor]


class _FeedForward(NamedTuple):
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    norm: Norm

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
    norm: Norm

    def __call__(self, x: Tensor, keys: Tensor, mask: Tensor | None, blind: Tensor | None) -> Tensor:
        """Return norm(x + attention) [batch, dim] for x [batch, dim] and keys [batch, key, dim].

        ``mask`` [batch, 1, 1, key] is added to the scores; ``blind`` [batch, 1] is True where no key may be seen.
        """
        heads, (batch, width) = len(self.key), x.shape
        query = torch.addmm(self.query_bias, x, self.query).view(batch, heads, -1).transpose(0, 1)
        towards = torch.bmm(query, self.key).transpose(0, 1)  # [batch, head, dim]
        scores = torch.bmm(towards, keys.transpose(1, 2))  # [batch, head, key]
        if mask is not None:
            scores += mask.squeeze(1)
        mixed = torch.bmm(scores.softmax(-1), keys).transpose(0, 1)  # [head, batch, dim]
        value = torch.bmm(mixed, self.value).transpose(0, 1).reshape(batch, width)
        attended = torch.addmm(self.output_bias, value, self.output)
        if blind is not None:
            attended = torch.where(blind, self.blind, attended)
        return self.norm(x + attended)


class _Layout(NamedTuple):
    """Where the real tokens of a batch stand among the padding, which is left out of all work on single tokens."""

    batch: int
    width: int
    real: Tensor | None
    """[token]: places of the real ones among [batch * width]; None where all are."""

    def take(self, padded: Tensor) -> Tensor:
        """Return the real ones, [token, ...], of [batch * width, ...]."""
        return padded if self.real is None else padded.index_select(0, self.real)

    def pad(self, tokens: Tensor) -> Tensor:
        """Return [batch, width, dim] with the tokens [token, dim] at their places and zeros between them."""
        if self.real is not None:
            padded = tokens.new_zeros(self.batch * self.width, tokens.shape[1])
            tokens = padded.index_copy_(0, self.real, tokens)
        return tokens.view(self.batch, self.width, -1)


class _Attention(NamedTuple):
    """Attention of all tokens; a ``mask`` [batch, 1, query or 1, key] is added to the scores."""

    project: Tensor
    """[dim, 3 * dim]: queries, keys and values side by side."""
    project_bias: Tensor
    output: Tensor
    output_bias: Tensor
    n_head: int
    norm: Norm

    def to_each_other(
        self, x: Tensor, at: _Layout, mask: Tensor | None, projected: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """Return norm(x + attention) [token, dim]; ``causal`` hides what stands behind a token.

        ``projected`` [batch, width, 3 * dim] are the projections of ``x`` where they are at hand.
        """
        if projected is None:
            projected = at.pad(torch.addmm(self.project_bias, x, self.project))
        query, key, value = self._heads(projected, 3)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self._added(x, at.take(_joined(attended)))

    def to_memory(
        self, x: Tensor, at: _Layout, memory: Tensor, slots: _Layout, mask: Tensor | None, blind: Tensor | None
    ) -> Tensor:
        """Return norm(x + attention) [token, dim] to the memory [interest, dim]; ``blind`` [token, 1] see nothing."""
        dim = x.shape[1]
        (query,) = self._heads(at.pad(torch.addmm(self.project_bias[:dim], x, self.project[:, :dim])), 1)
        pairs = slots.pad(torch.addmm(self.project_bias[dim:], memory, self.project[:, dim:]))
        key, value = self._heads(pairs, 2)
        values = at.take(_joined(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))
        return self._added(x, values if blind is None else values.masked_fill(blind, 0.0))

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return the parts of [batch, width, parts * dim], each as [batch, head, width, dim / head]."""
        return projected.unflatten(2, (parts, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _added(self, x: Tensor, values: Tensor) -> Tensor:
        return self.norm(x + torch.addmm(self.output_bias, values, self.output))


class _InputProjection(NamedTuple):
    """Queries, keys and values of the first decoder layer, from a row per item and one per position.

    LayerNorm is linear but for one number per token, so that its projection is

        W norm(e + p) + b = (W g e' + W g p') / deviation(e + p) + (W s + b)

    with weight g and bias s of the norm, and e' = e - mean(e), p' likewise.
    """

    items: Tensor
    """[row, 3 * dim]: W g e'."""
    positions: Tensor
    """[position, 3 * dim]: W g p'."""
    constant: Tensor
    norm: nn.LayerNorm

    @classmethod
    def of(cls, layer: _Attention, norm: nn.LayerNorm, items: Tensor, positions: Tensor) -> _InputProjection:
        """Look up what ``layer`` projects of ``items`` [row, dim] at ``positions`` [position, dim]."""
        scaled = norm.weight.detach().unsqueeze(1) * layer.project
        by_row, by_position = ((x - x.mean(-1, keepdim=True)) @ scaled for x in (items, positions))
        return cls(by_row, by_position, layer.project_bias + norm.bias.detach() @ layer.project, norm)

    def __call__(self, tokens: Tensor, session: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of ``tokens`` [batch, seq, dim], the sums of item and position, and their projections."""
        norm = self.norm
        normed, _, inverse = torch.native_layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        projected = F.embedding(session, self.items).add_(self.positions[: session.shape[1]])
        return normed, projected.mul_(inverse).add_(self.constant)


class _EncoderLayer(NamedTuple):
    attention: _Attention
    feedforward: _FeedForward


class _DecoderLayer(NamedTuple):
    """A layer that is computed at all positions, as every one before the last is."""

    self_attention: _Attention
    cross_attention: _Attention | None
    feedforward: _FeedForward


class _Memory(NamedTuple):
    """Output of the contextual encoder for the interests of a batch."""

    tokens: Tensor
    """[interest, dim]"""
    slots: _Layout
    position: Ints
    """[batch, slot]: index of the first item of each interest; of an empty slot, one later than every item."""
    counts: Ints
    """[batch]"""


class _InterestAttention(NamedTuple):
    """Attention of the first encoder layer: that of two interests is the same in every session."""

    weights: Tensor
    """[interest * interest + 1, head]: of a query and a key before they are divided by their sum; last, a row of zeros
    for a key that may not be seen."""
    outputs: Tensor
    """[interest * head, dim]: value times its rows of the output matrix."""
    parts: Ints
    """[interest, head]: where the outputs of an interest stand."""
    tokens: Tensor
    """[interest, dim]: centroid plus output bias."""
    norm: Norm

    @classmethod
    def of(cls, attention: _Attention, centroids: Tensor, projections: Tensor) -> _InterestAttention | None:
        """Look up what ``attention`` computes for ``centroids`` [interest, dim]; None where weights would underflow."""
        n, dim = centroids.shape
        query, key, value = projections.view(n, 3, attention.n_head, -1).unbind(1)  # [interest, head, dim / head]
        scores = torch.einsum("ihd,jhd->ijh", query, key) * query.shape[2] ** -0.5
        scores = scores - scores.amax(1, keepdim=True)
        if not bool((scores.diagonal() > _LEAST_SCORE).all()):  # every interest sees itself
            return None
        outputs = torch.einsum("ihd,hdo->iho", value, attention.output.view(attention.n_head, -1, dim))
        weights = F.pad(scores.exp().reshape(n * n, -1), (0, 0, 0, 1)).contiguous()  # else rows are read by columns
        parts = np.arange(n * attention.n_head).reshape(n, -1)
        return cls(weights, outputs.reshape(-1, dim), parts, centroids + attention.output_bias, attention.norm)

    def __call__(self, rows: Ints, visible: Bools, placed: Callable[[AnyArray], Tensor]) -> Tensor:
        """Return norm(x + attention) [token, dim] for interests ``rows`` [batch, slot].

        ``visible`` [batch, query, key] is True where a key may be seen, and nowhere for an empty slot.
        """
        n, heads = self.parts.shape
        pairs = np.where(visible, rows[:, :, None] * n + rows[:, None], n * n)
        weights = F.embedding(placed(pairs), self.weights)  # [batch, query, key, head]
        weights = (weights / weights.sum(2, keepdim=True)).view(-1, heads)
        weights = weights.index_select(0, placed(np.flatnonzero(visible))).view(-1)  # [visible pair * head]
        keys, counts = np.broadcast_to(rows[:, None], visible.shape)[visible], visible.sum(2)
        real = counts > 0
        values, starts = self.parts.take(keys, 0).reshape(-1), (counts[real].cumsum() - counts[real]) * heads
        attended = F.embedding_bag(placed(values), self.outputs, placed(starts), mode="sum", per_sample_weights=weights)
        return self.norm(F.embedding(placed(rows[real]), self.tokens).add_(attended))


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
        self._event_features = model.event_features
        self._positions = decoder.positions.weight.detach().clone()
        self._assignment = interests.assignment.T.cpu().numpy().copy()
        self._centroids = interests.centroids.detach().clone()
        self._encoder = [_encoder_layer(cast(EncoderLayer, layer)) for layer in model.encoder.layers]
        self._few: _InterestAttention | None = None
        if self._encoder:
            first = self._encoder[0].attention
            self._projections = torch.addmm(first.project_bias, self._centroids, first.project)
            if len(self._centroids) ** 2 * first.n_head <= _NUMBERS_IN_MEMORY:
                self._few = _InterestAttention.of(first, self._centroids, self._projections)
            self._encoder_norm = _norm(model.encoder.norm)
        self._norm_input, self._norm = _norm(decoder.norm_input), _norm(decoder.norm)
        *before, last = (cast(DecoderLayer, layer) for layer in decoder.layers)
        self._before = [_decoder_layer(layer) for layer in before]
        self._input: _InputProjection | None = None
        if before and self._event_features is None and 3 * self._items.numel() <= _NUMBERS_IN_MEMORY:
            first = self._before[0].self_attention
            self._input = _InputProjection.of(first, decoder.norm_input, self._items, self._positions)
        self._self = _last_query(last.self_attention, last.norm_self)
        self._cross = None
        if last.cross_attention is not None and last.norm_cross is not None:
            self._cross = _last_query(last.cross_attention, last.norm_cross)
        self._feedforward = _feedforward(last.feedforward, last.norm_feedforward)

    @torch.inference_mode()
    def __call__(self, known: Ints, event_features: Mapping[str, AnyArray] | None = None) -> Tensor:
        """Return [batch, dim] for rows [batch, seq] padded with 0 on the right; zero for a session without items.

        ``event_features`` [batch, seq] or [batch, seq, size] belong to the rows; what is missing counts as absent.
        """
        lengths, events = (known > PADDING_ROW).sum(1), event_features or {}
        if known.size <= _POSITIONS_AT_ONCE or len(known) == 1:
            return self._encoded(known, lengths, events)
        vectors = self._items.new_empty(len(known), self._items.shape[1])
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            widest = max(int(lengths[order[0]]), 1)
            block, order = np.split(order, [max(_POSITIONS_AT_ONCE // widest, 1)])
            own = {name: values[block, :widest] for name, values in events.items()}
            vectors[block] = self._encoded(known[block, :widest], lengths[block], own)
        return vectors

    def _encoded(self, known: Ints, lengths: Ints, events: Mapping[str, AnyArray]) -> Tensor:
        batch, n = known.shape
        if not batch:
            return self._items.new_zeros(0, self._items.shape[1])
        session = self._placed(known)
        tokens = F.embedding(session, self._items) + self._positions[:n]
        if self._event_features is not None:
            tokens += self._event_features({name: self._placed(values) for name, values in events.items()}, session)
        x, projected = (self._norm_input(tokens), None) if self._input is None else self._input(tokens, session)
        memory = None if self._cross is None else self._memory(known)
        at = self._layout(lengths, n)
        mask = self._padding_mask(lengths, at)
        if self._before:
            x = self._at_all_positions(x, at, mask, memory, projected)
        last = self._placed(np.arange(0, batch * n, n) + np.maximum(lengths - 1, 0))
        query = x[0, n - 1 : n] if batch == 1 and at.real is None else x.flatten(0, 1).index_select(0, last)
        query = self._self(query, x, mask, None)
        if self._cross is not None and memory is not None:
            slots, counts = memory.slots, memory.counts
            blind = self._placed(counts == 0).unsqueeze(1) if slots.real is not None and not counts.all() else None
            query = self._cross(query, slots.pad(memory.tokens), self._padding_mask(counts, slots), blind)
        vectors = F.normalize(self._norm(self._feedforward(query)), dim=-1)
        return vectors if lengths.all() else vectors * self._placed(lengths > 0).unsqueeze(1)

    def _memory(self, known: Ints) -> _Memory:
        chosen, position, counts = self._interests(known)
        n, slots = known.shape[1], self._layout(counts, chosen.shape[1])
        latest = position if self._causal else np.maximum(position, n - 1)  # of an empty slot n: it may see anything
        visible, first = position[:, None] <= latest[:, :, None], self._encoder[0]
        few = self._few if slots.width <= _FEW_INTERESTS else None
        mask = self._mask(~visible) if few is None or len(self._encoder) > 1 else None
        if few is not None:
            attended = few(chosen, visible & (position < n)[:, :, None], self._placed)
        else:
            rows = self._placed(chosen)
            projected, flat = F.embedding(rows, self._projections), slots.take(rows.view(-1))
            attended = first.attention.to_each_other(F.embedding(flat, self._centroids), slots, mask, projected)
        memory = first.feedforward(attended)
        for layer in self._encoder[1:]:
            memory = layer.feedforward(layer.attention.to_each_other(memory, slots, mask))
        return _Memory(self._encoder_norm(memory), slots, position, counts)

    def _at_all_positions(
        self, x: Tensor, at: _Layout, mask: Tensor | None, memory: _Memory | None, projected: Tensor | None
    ) -> Tensor:
        """Return the input [batch, seq, dim] of the last layer; ``x`` of the same shape is that of the first."""
        memory_mask, blind = (None, None) if memory is None else self._hidden_memory(memory, at)
        mask = None if self._causal else mask  # the padding stands behind all items
        tokens = at.take(x.flatten(0, 1))
        for layer in self._before:
            tokens = layer.self_attention.to_each_other(tokens, at, mask, projected, causal=self._causal)
            projected = None
            if layer.cross_attention is not None and memory is not None:
                tokens = layer.cross_attention.to_memory(tokens, at, memory.tokens, memory.slots, memory_mask, blind)
            tokens = layer.feedforward(tokens)
        return at.pad(tokens)

    def _hidden_memory(self, memory: _Memory, at: _Layout) -> tuple[Tensor | None, Tensor | None]:
        """Return the mask of the memory for all positions, and which tokens [token, 1] see none of it."""
        latest = np.arange(at.width)[None] if self._causal else np.array([[at.width - 1]])
        sees_none = latest < memory.position.min(1, keepdims=True)  # [batch, seq or 1]
        mask = self._mask(memory.position[:, None] > np.where(sees_none, at.width, latest)[:, :, None])
        if not sees_none.any():
            return mask, None
        return mask, at.take(self._placed(sees_none).expand(at.batch, at.width).reshape(-1, 1))

    def _layout(self, lengths: Ints, width: int) -> _Layout:
        whole = int(lengths.min()) == width
        real = None if whole else self._placed(np.flatnonzero(np.arange(width) < lengths[:, None]))
        return _Layout(len(lengths), width, real)

    def _padding_mask(self, lengths: Ints, at: _Layout) -> Tensor | None:
        """Return the mask [batch, 1, 1, width] that hides padding; in empty sessions it hides nothing, against NaN."""
        if at.real is None:
            return None
        return self._mask((np.arange(at.width) >= np.where(lengths == 0, at.width, lengths)[:, None])[:, None])

    def _mask(self, hidden: Bools) -> Tensor | None:
        """Return what is added to scores, [batch, 1, query, key]: -inf where ``hidden`` [batch, query, key] is True."""
        if not hidden.any():
            return None
        return torch.from_numpy(np.where(hidden, _NEVER, _ALWAYS)).to(self._items).unsqueeze(1)

    def _placed(self, array: AnyArray) -> Tensor:
        return torch.from_numpy(array).to(self._items.device)

    def _interests(self, known: Ints) -> tuple[Ints, Ints, Ints]:
        """Return distinct interests [batch, slot], the index of the first item of each, and their count [batch].

        An empty slot has interest 0, and as index the length of ``known``, which is later than every item.
        """
        shown = self._assignment[known].reshape(len(known), -1)[:, ::-1].tolist()
        ages = [place // self._assignment.shape[1] for place in reversed(range(len(shown[0])))]
        firsts = [dict(zip(line, ages, strict=True)) for line in shown]  # newest first, so that the oldest stays
        for first in firsts:
            first.pop(0, None)
        counts = np.array([len(first) for first in firsts])
        shape = len(known), max(int(counts.max()), 1)
        chosen, position = np.zeros(shape, np.int64), np.full(shape, known.shape[1])
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
        model.decoder.sequence_fusion == "add"
        and (len(model.encoder.layers) > 0 or not model.config.has_interests)
        and 3 * model.interests.centroids.numel() <= PROJECTIONS_IN_MEMORY
    )


@torch.inference_mode()
def _equal(model: MISSRec, tokens: ItemEmbeddings, encoder: FusedEncoder, batch: int, length: int) -> bool:
    session = sample_sessions(model, batch, length)
    expected = model.encode(session, items=tokens.take(session), last_only=True).vectors
    expected = expected * (session > PADDING_ROW).any(1, keepdim=True)
    return torch.allclose(encoder(session.cpu().numpy()), expected, atol=_TOLERANCE, rtol=0)


def _joined(attended: Tensor) -> Tensor:
    """Return [batch * query, dim] of [batch, head, query, dim / head]."""
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _linear(layer: nn.Module) -> tuple[Tensor, Tensor]:
    linear = cast(nn.Linear, layer)
    return linear.weight.detach().T.contiguous(), linear.bias.detach().clone()


def _norm(layer: nn.Module) -> Norm:
    norm = cast(nn.LayerNorm, layer)
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    return partial(F.layer_norm, normalized_shape=weight.shape, weight=weight, bias=bias, eps=norm.eps)


def _feedforward(block: nn.Module, norm: nn.Module) -> _FeedForward:
    layers = [layer for layer in block.children() if isinstance(layer, nn.Linear)]
    return _FeedForward(*_linear(layers[0]), *_linear(layers[1]), _norm(norm))


def _attention(attention: MultiHeadAttention, norm: nn.Module) -> _Attention:
    weights, biases = zip(*map(_linear, (attention.query, attention.key, attention.value)), strict=True)
    output, output_bias = _linear(attention.output)
    return _Attention(torch.cat(weights, 1), torch.cat(biases), output, output_bias, attention.n_head, _norm(norm))


def _encoder_layer(layer: EncoderLayer) -> _EncoderLayer:
    attention = _attention(layer.self_attention, layer.norm_attention)
    return _EncoderLayer(attention, _feedforward(layer.feedforward, layer.norm_feedforward))


def _decoder_layer(layer: DecoderLayer) -> _DecoderLayer:
    cross = layer.cross_attention
    return _DecoderLayer(
        _attention(layer.self_attention, layer.norm_self),
        None if cross is None or layer.norm_cross is None else _attention(cross, layer.norm_cross),
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
