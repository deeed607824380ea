"""MISSRec's equations in float64 NumPy, written from the method's specification and from nothing else.

Nothing here is fast and nothing is shared with the package: a loop stands where the text says "for every". The
tests beside this file feed both with the same weights and data and compare. Masks are True where something is real.
Equation numbers are those of `docs/equations.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

FIRST_ITEM = 3
"""Rows 0 (padding), 1 (null) and 2 (unknown) are no items."""


class Linear(NamedTuple):
    """y = W x + b."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        return x @ self.weight.T + self.bias


class Norm(NamedTuple):
    """LayerNorm over the last axis with the biased variance."""

    weight: Array
    bias: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps) * self.weight + self.bias


class Attention(NamedTuple):
    """Multi-head attention with projections of queries, keys, values and of the output (E5)."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    n_head: int

    def __call__(self, x: Array, context: Array, visible: Mask) -> Array:
        """Attend from x [from, dim] to context [to, dim] where visible [from, to]; nothing visible adds nothing."""
        q, k, v = self.query(x), self.key(context), self.value(context)
        width = q.shape[-1] // self.n_head
        mixed = np.zeros_like(q)
        for head in range(self.n_head):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(x)):
                seen = visible[i]
                if seen.any():
                    weight = softmax(k[seen][:, part] @ q[i, part] / math.sqrt(width))
                    mixed[i, part] = weight @ v[seen][:, part]
        return self.output(mixed)


class FeedForward(NamedTuple):
    """W2 GELU(W1 x), GELU with the exact error function."""

    inner: Linear
    outer: Linear

    def __call__(self, x: Array) -> Array:
        return self.outer(gelu(self.inner(x)))


class EncoderLayer(NamedTuple):
    """Post-norm Transformer encoder layer (E6)."""

    attention: Attention
    attention_norm: Norm
    feed_forward: FeedForward
    feed_forward_norm: Norm

    def __call__(self, x: Array, visible: Mask) -> Array:
        x = self.attention_norm(x + self.attention(x, x, visible))
        return self.feed_forward_norm(x + self.feed_forward(x))


class DecoderLayer(NamedTuple):
    """Post-norm Transformer decoder layer: self-attention, cross-attention to the memory, feed-forward (E8)."""

    self_attention: Attention
    self_norm: Norm
    cross_attention: Attention | None  # None: of a model without interests (ours)
    cross_norm: Norm | None
    feed_forward: FeedForward
    feed_forward_norm: Norm

    def __call__(self, x: Array, visible: Mask, memory: Array, memory_visible: Mask) -> Array:
        x = self.self_norm(x + self.self_attention(x, x, visible))
        if self.cross_attention is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.cross_attention(x, memory, memory_visible))
        return self.feed_forward_norm(x + self.feed_forward(x))


def softmax(x: Array) -> Array:
    """Over the last axis; -inf gets no weight."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def gelu(x: Array) -> Array:
    """x times the normal distribution function at x."""
    return np.asarray(x * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0))))


def unit(x: Array) -> Array:
    """Divide by the L2 norm of the last axis; a zero vector stays zero (E10)."""
    norm = np.sqrt((x**2).sum(-1, keepdims=True))
    return np.asarray(x / np.where(norm == 0.0, 1.0, norm))


class Items(NamedTuple):
    """All items of the catalogue as the model sees them."""

    tokens: Array  # [modality, row, dim]
    counts: Mask  # [modality, row]; faithful: True for every real item, since a missing vector is a zero row
    present: Mask  # [modality, row]; the item really has the modality
    ids: Array | None  # [row, dim]
    id_trained: Mask  # [row]; False for items whose ID embedding means nothing (new ones): it is never used


def item_tokens(
    adapters: Sequence[Linear],
    vectors: Sequence[Array],
    present: Sequence[Mask],
    ids: Array | None,
    id_trained: Mask,
    *,
    zero_row: bool,
    scale_to_unit: bool,
) -> Items:
    """x[i, m] = A_m f[i, m]; absent ones are bias-only tokens (faithful) or nothing at all (masked)."""
    tokens, masks = [], []
    for adapter, f, here in zip(adapters, vectors, present, strict=True):
        f = np.where(here[:, None], f, 0.0)
        tokens.append(adapter(unit(f) if scale_to_unit else f))
        masks.append(np.arange(len(f)) >= FIRST_ITEM if zero_row else here)
    return Items(np.stack(tokens), np.stack(masks), np.stack(present), ids, id_trained)


def kmeans_step(points: Array, centroids: Array) -> tuple[Ints, Array]:
    """Return the nearest centroid of every point, and the mean of every cluster (an empty one keeps its place)."""
    nearest = np.array([int(np.argmin(((centroids - point) ** 2).sum(-1))) for point in points])
    means = [points[nearest == k].mean(0) if (nearest == k).any() else centroids[k] for k in range(len(centroids))]
    return nearest, np.stack(means)


class DensityPeaks(NamedTuple):
    """Everything that DPC-KNN computes on the way."""

    density: Array
    distance: Array
    centres: Ints
    assignment: Ints
    centroids: Array


def dpc_knn(points: Array, n_clusters: int, n_neighbours: int) -> DensityPeaks:
    """Find density peaks: points that are dense and far from anything denser; a point is its own first neighbour."""
    n, dim = points.shape
    between = np.array([[math.sqrt(((p - q) ** 2).sum()) for q in points] for p in points]) / math.sqrt(dim)
    density = np.array([math.exp(-(np.sort(between[i])[:n_neighbours] ** 2).mean()) for i in range(n)])
    distance = np.empty(n)
    for i in range(n):
        denser = density > density[i]
        distance[i] = between[i, denser].min() if denser.any() else between.max()
    centres = np.argsort(-density * distance, kind="stable")[:n_clusters]
    assignment = np.array([int(np.argmin(between[i, centres])) for i in range(n)])
    assignment[centres] = np.arange(n_clusters)
    centroids = np.stack([points[assignment == k].mean(0) for k in range(n_clusters)])
    return DensityPeaks(density, distance, centres, assignment, centroids)


def session_interests(session: Sequence[int], assignment: Ints) -> dict[int, int]:
    """Return the set of interests of a session, each with the position where it is first seen (E4).

    ``assignment`` is [modality, row]; 0 means that the item lacks the modality.
    """
    first_seen: dict[int, int] = {}
    for position, row in enumerate(session):
        for interest in assignment[:, row]:
            if interest > 0:
                first_seen.setdefault(int(interest), position)
    return first_seen


class Encoder(NamedTuple):
    """Contextual encoder: Transformer over interest tokens, no positions, final LayerNorm."""

    layers: Sequence[EncoderLayer]
    norm: Norm

    def __call__(self, tokens: Array, visible: Mask) -> Array:
        for layer in self.layers:
            tokens = layer(tokens, visible)
        return self.norm(tokens)


class Decoder(NamedTuple):
    """Interest-aware decoder: LayerNorm(token + position), Transformer decoder, final LayerNorm."""

    positions: Array  # [max_sequence_length, dim]
    input_norm: Norm
    layers: Sequence[DecoderLayer]
    norm: Norm

    def __call__(self, tokens: Array, visible: Mask, memory: Array, memory_visible: Mask) -> Array:
        """Decode tokens [token, dim] to which the position embedding is already added."""
        x = self.input_norm(tokens)
        for layer in self.layers:
            x = layer(x, visible, memory, memory_visible)
        return self.norm(x)


class Model(NamedTuple):
    """The parts, and the choices that the equations depend on."""

    items: Items
    centroids: Array  # [interest + 1, dim], row 0 unused
    assignment: Ints  # [modality, row]
    encoder: Encoder | None  # None: of a model without interests (ours)
    decoder: Decoder
    causal: bool
    contextual: bool
    first_modality: bool = False  # contextual: read the first modality's output (published) instead of the mean

    def padded_memory(self, session: Sequence[int], places: int) -> tuple[Array, float]:
        """Encode the interests and empty ones up to ``places``, and return the share that is real (E14, published).

        The empty interest is a vector of zeros; it sees the real ones and none of them sees it.
        """
        ids = list(session_interests(session, self.assignment))
        tokens = np.concatenate([self.centroids[ids], np.zeros((places - len(ids), self.centroids.shape[1]))])
        visible = np.broadcast_to(np.arange(places) < len(ids), (places, places))
        return tokens if self.encoder is None else self.encoder(tokens, visible), len(ids) / places

    def memory(self, session: Sequence[int]) -> tuple[Array, list[int], list[int]]:
        """Encode a session's interests: memory [interest, dim], their ids, and where each is first seen (E6, E7)."""
        first_seen = session_interests(session, self.assignment)
        ids, places = list(first_seen), list(first_seen.values())
        visible = np.array([[p <= q or not self.causal for p in places] for q in places], bool)
        tokens = self.centroids[ids]
        encode = self.encoder if ids else None
        return (tokens if encode is None else encode(tokens, visible.reshape(len(ids), len(ids)))), ids, places

    def positions(self, session: Sequence[int]) -> Array:
        """Return the decoder's output at every position, not normalised, [seq, dim] or [modality, seq, dim]."""
        memory, _, places = self.memory(session)
        at = np.arange(len(session))
        x, at, real = (
            self._contextual(session) if self.contextual else (self._added(session), at, np.ones(len(at), bool))
        )
        visible = np.array(
            [[real[j] and (at[j] <= at[i] or not self.causal) for j in range(len(at))] for i in range(len(at))]
        )
        reach = np.array([[p <= t or not self.causal for p in places] for t in at], bool).reshape(len(at), len(places))
        out = self.decoder(x, visible, memory, reach)
        return out.reshape(-1, len(session), out.shape[-1]) if self.contextual else out

    def session_vector(self, session: Sequence[int]) -> Array:
        """s: the output at the last real position at unit length (E10); contextual: mean over its tokens."""
        out = self.positions(session)
        if self.contextual and self.first_modality:
            return unit(out[0, -1])
        return unit(out[self._kept(session[-1]), -1].mean(0) if self.contextual else out[-1])

    def _added(self, session: Sequence[int]) -> Array:
        """Sum over modalities of x[s_t, m] + ID embedding + position (E9, `add`)."""
        x = self.decoder.positions[: len(session)].copy()
        for t, row in enumerate(session):
            x[t] += self.items.tokens[self.items.counts[:, row], row].sum(0) + self._id(row)
        return x

    def _contextual(self, session: Sequence[int]) -> tuple[Array, Ints, Mask]:
        """Keep all M tokens, position shared across modalities, ID embedding added to each (E9, `contextual`)."""
        x = self.items.tokens * self.items.counts[..., None]
        x = np.stack([x[:, row] + self._id(row) + self.decoder.positions[t] for t, row in enumerate(session)], 1)
        at = np.tile(np.arange(len(session)), len(x))
        real = np.stack([self._kept(row) for row in session], 1)
        return x.reshape(len(at), -1), at, real.reshape(-1)

    def _id(self, row: int) -> Array | float:
        return 0.0 if self.items.ids is None or not self.items.id_trained[row] else self.items.ids[row]

    def _kept(self, row: int) -> Mask:
        """Tokens of an item that are keys: its modalities, or one place for the ID of an item that has none."""
        kept = self.items.present[:, row].copy()
        if not kept.any() and self.items.ids is not None and self.items.id_trained[row]:
            kept[0] = True
        return kept


def fused_scores(session: Array, items: Items, phi: Array | float | None, *, padding: bool = False) -> Array:
    """Return s's score for every row, before the temperature; -inf where nothing can be scored.

    ``phi`` None is `static`, a scalar is `dynamic_shared`, [row] is `dynamic_instance`. ``padding``: row 0 is scored
    like an item, as the release does in training; its tokens are the adapters' biases.
    """
    scores = np.full(items.tokens.shape[1], -np.inf)
    for row in [*([0] if padding else []), *range(FIRST_ITEM, len(scores))]:
        here = items.counts[:, row] | (row == 0)
        votes = unit(items.tokens[here, row]) @ session
        sharpness = 0.0 if phi is None else float(np.broadcast_to(phi, scores.shape)[row])
        fused = float(softmax(sharpness * votes) @ votes) if here.any() else None
        known = items.ids is not None and (items.id_trained[row] or row == 0)
        l_id = float(unit(items.ids[row]) @ session) if items.ids is not None and known else None
        if fused is not None:
            scores[row] = fused if l_id is None else (l_id + 2.0 * fused) / 3.0
        elif l_id is not None:
            scores[row] = l_id
    return scores


def summed_scores(session: Array, items: Items) -> Array:
    """Score by the cosine with the sum of token and ID, as the release does with one modality."""
    assert items.ids is not None
    scores = np.full(items.tokens.shape[1], -np.inf)
    for row in range(FIRST_ITEM, len(scores)):
        scores[row] = float(unit(items.tokens[0, row] + items.ids[row]) @ session)
    return scores


def with_history_bias(scores: Array, history: Sequence[int], bias: float) -> Array:
    """Add one learned number to the score of every item already in the session (E12, ours)."""
    seen = np.isin(np.arange(len(scores)), list(history))
    return np.where(seen, scores + bias, scores)


def cross_entropy(scores: Array, targets: Sequence[int], temperature: float) -> float:
    """Mean of -log softmax(scores / tau)[target] over the batch; scores [batch, row]."""
    rows = [-math.log(softmax(s / temperature)[target]) for s, target in zip(scores, targets, strict=True)]
    return sum(rows) / len(rows)


def orthogonality_faithful(memories: Sequence[tuple[Array, float]]) -> float:
    """r = sum over batch and width of u * u / d, u = sum of a session's padded memory times its share of real places.

    Sets are padded to the largest of the batch, so this one depends on padding and batch size.
    """
    total = 0.0
    for memory, share in memories:
        u = memory.sum(0) * share
        total += float((u * u).sum()) / memory.shape[-1]
    return total


def released_places(counts: Sequence[int], lengths: Sequence[int], padded_to: int) -> int:
    """Return to how many places the release pads a batch's sets: a session below full length holds interest 0 too."""
    return max(count + (length < padded_to) for count, length in zip(counts, lengths, strict=True))


def orthogonality_cosine(memories: Sequence[Array]) -> float:
    """Mean squared cosine between different interest tokens of a session, averaged over the sessions that have two."""
    means = []
    for memory in memories:
        pairs = [(i, j) for i in range(len(memory)) for j in range(len(memory)) if i != j]
        if pairs:
            means.append(sum(float(unit(memory[i]) @ unit(memory[j])) ** 2 for i, j in pairs) / len(pairs))
    return sum(means) / len(means) if means else 0.0


def sequence_item_contrast(scores: Array, positives: Sequence[int], temperature: float) -> float:
    """In-batch softmax: scores [batch, row], each session against every positive; equal items are no negatives."""
    losses = []
    for b, positive in enumerate(positives):
        logits = [scores[b, other] / temperature for c, other in enumerate(positives) if c == b or other != positive]
        losses.append(math.log(sum(math.exp(x) for x in logits)) - scores[b, positive] / temperature)
    return sum(losses) / len(losses)


def sequence_sequence_contrast(views: Array, others: Array, positives: Sequence[int], temperature: float) -> float:
    """In-batch softmax of s [batch, dim] against s' of augmented views; equal targets are no negatives."""
    losses = []
    for b, positive in enumerate(positives):
        cosines = [
            float(unit(views[b]) @ unit(others[c])) / temperature
            for c, other in enumerate(positives)
            if c == b or other != positive
        ]
        losses.append(
            math.log(sum(math.exp(x) for x in cosines)) - float(unit(views[b]) @ unit(others[b])) / temperature
        )
    return sum(losses) / len(losses)
