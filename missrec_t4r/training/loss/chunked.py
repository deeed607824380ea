"""Chunked softmax: the exact loss with the catalogue in pieces, no table of all scores or all embeddings.

The logarithm of the softmax's denominator is summed up piece by piece (Milakov and Gimelshein, arXiv:1805.02867), and
the backward pass computes every piece a second time instead of storing it: the item encoder runs twice, with one third
more products in all, for a memory of [batch, piece].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from missrec_t4r.model.item_encoder import ItemMasks
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.training.loss.full import StepEmbeddings, TrainedPositions, candidate_rows, row_embeddings, score_rows


class ChunkedSoftmax:
    """The loss and the gradients of `FullSoftmax`, up to rounding.

    Parameters
    ----------
    chunk_size : int
        Catalogue rows that are scored at once.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def embed(self, model: MISSRec, item_ids: Tensor, targets: Tensor) -> StepEmbeddings:
        """Compute the embeddings of the sessions' items only."""
        masks = model.item_encoder.masks(dropout=model.training)
        rows, place = torch.unique(item_ids, return_inverse=True)
        is_candidate = model.item_encoder.candidate_id_embedding is None  # then its gradient is dense in any case
        pool = row_embeddings(model, rows, masks, sparse=is_candidate)
        return StepEmbeddings(pool.take(place), pool, rows, masks)

    def loss(self, model: MISSRec, embeddings: StepEmbeddings, positions: TrainedPositions) -> Tensor:
        """Return the loss over all candidates."""
        assert embeddings.masks is not None
        targets = positions.targets
        real = (targets > 0) & candidate_rows(model)[targets]
        counts = real.sum(0) if positions.counts is None else positions.counts
        share = real / counts.clamp_min(1).to(positions.vectors.dtype) * positions.weights
        chunks = _Chunks(model, embeddings.masks, positions.history, targets, self.chunk_size)
        loss: Tensor = _ChunkedCrossEntropy.apply(chunks, share, positions.vectors, *chunks.weights)  # type: ignore[no-untyped-call]
        return loss


class _Chunk(NamedTuple):
    rows: Tensor
    """[chunk]: consecutive rows of the catalogue."""
    inside: Tensor
    """[position, target], bool: True where the target is in it."""
    column: Tensor
    """[position, target]: its column there; 0 outside."""


class _Chunks:
    """The chunks of a step, iterated once in the forward and once in the backward pass."""

    def __init__(self, model: MISSRec, masks: ItemMasks, history: Tensor, targets: Tensor, size: int) -> None:
        self.model, self.masks, self.history, self.targets, self.size = model, masks, history, targets, size
        by_row = model.item_encoder.id_tables[-1:]  # that of the candidates
        if model.fusion.name == "dynamic_instance" and model.fusion.phi is not None:
            by_row.append(model.fusion.phi)
        shared: list[Tensor] = list(model.item_encoder.adapters.parameters())
        if model.fusion.name == "dynamic_shared" and model.fusion.phi is not None:
            shared.append(model.fusion.phi)
        for term in model.terms.in_use(training=True):
            shared.extend(term.parameters())
        self.by_row = [weight for weight in by_row if weight.requires_grad]
        self.shared = [weight for weight in shared if weight.requires_grad]

    @property
    def weights(self) -> list[Tensor]:
        """Weights with a gradient from the candidates: shared ones, then tables with a row for each."""
        return [*self.shared, *self.by_row]

    def __iter__(self) -> Iterator[_Chunk]:
        n_rows = self.model.item_encoder.n_rows
        for begin in range(0, n_rows, self.size):
            rows = torch.arange(begin, min(begin + self.size, n_rows), device=self.targets.device)
            inside = (self.targets >= begin) & (self.targets < begin + len(rows))
            yield _Chunk(rows, inside, (self.targets - begin).masked_fill(~inside, 0))

    def logits(self, vectors: Tensor, rows: Tensor, slices: list[Tensor]) -> Tensor:
        """Return [position, chunk]; ``slices`` are the rows' parts of the trained tables."""
        rows_of = dict(zip([id(table) for table in self.by_row], slices))
        embeddings = row_embeddings(self.model, rows, self.masks)
        phi = self.model.fusion.phi
        for table in self.model.item_encoder.id_tables[-1:]:
            if id(table) in rows_of:
                embeddings = embeddings._replace(ids=rows_of[id(table)], candidate_ids=None)
        scores = score_rows(self.model, vectors, embeddings, rows, self.history, rows_of.get(id(phi)))
        return scores.div_(self.model.config.temperature)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over p, k of ``share[p,k] * (logsumexp(logits[p]) - logits[p, targets[p,k]])``, the logits in chunks."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, share: Tensor, vectors: Tensor, *_: Tensor) -> Tensor:
        total = vectors.new_full((len(vectors),), -torch.inf)
        of_targets = vectors.new_zeros(share.shape)
        for rows, inside, column in chunks:
            logits = chunks.logits(vectors, rows, [table[rows] for table in chunks.by_row])
            of_targets = torch.where(inside, logits.gather(1, column), of_targets)
            total = torch.logaddexp(total, logits.logsumexp(1))
        ctx.chunks = chunks
        ctx.save_for_backward(share, vectors, total)
        return ((total.unsqueeze(1) - of_targets).masked_fill(share == 0, 0.0) * share).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        share, vectors, total = ctx.saved_tensors
        chunks: _Chunks = ctx.chunks
        share = share * gradients[0]
        vectors = vectors.detach().requires_grad_()
        sums = [torch.zeros_like(weight) for weight in (vectors, *chunks.shared)]
        tables = [torch.zeros_like(table) for table in chunks.by_row]
        for rows, inside, column in chunks:
            slices = [table.detach()[rows].requires_grad_() for table in chunks.by_row]
            with torch.enable_grad():
                logits = chunks.logits(vectors, rows, slices)
            upstream = torch.exp(logits.detach() - total.unsqueeze(1)) * share.sum(1, keepdim=True)
            upstream.scatter_add_(1, column, -share * inside)
            inputs = [vectors, *chunks.shared, *slices]
            of_chunk = torch.autograd.grad(logits, inputs, upstream, allow_unused=True)
            for total_gradient, gradient in zip(sums, of_chunk):
                if gradient is not None:
                    total_gradient += gradient
            for table, gradient in zip(tables, of_chunk[len(sums) :]):
                if gradient is not None:
                    table[rows] = gradient
        return (None, None, *sums, *tables)
