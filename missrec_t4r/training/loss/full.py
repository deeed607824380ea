"""Candidates of a training step: the item embeddings it computes, and the softmax over them; here all of the catalogue.

A strategy has two methods, called before and after the sessions are encoded: ``embed`` computes the item embeddings of
the step, ``loss`` the cross-entropy of the session vectors over the candidates (E13). `chunked.py` gives the same loss
with less memory, `sampled.py` an estimate of it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from missrec_t4r.model.fast.cross_entropy import next_item_loss
from missrec_t4r.model.item_encoder import ItemEmbeddings, ItemMasks
from missrec_t4r.model.missrec import MISSRec


class TrainedPositions(NamedTuple):
    """The trained positions of a batch: session vectors and the items that followed."""

    vectors: Tensor
    """[position, dim]: unit-length session vectors."""
    history: Tensor
    """[position, seq], int64: rows that the vector depends on, 0 for none."""
    targets: Tensor
    """[position, target], int64: rows; 0 where there is none."""
    weights: Tensor
    """[target]: weight of each target column."""
    counts: Tensor | None
    """[target]: real targets of the whole batch, where the positions are a part of it."""


class StepEmbeddings(NamedTuple):
    """Embeddings that a step has computed before it encodes the sessions."""

    items: ItemEmbeddings
    """Of shape [batch, seq]: the sessions' items."""
    pool: ItemEmbeddings
    """Of shape [item]: those from which ``items`` were gathered."""
    rows: Tensor
    """[item], int64: the rows in the pool, ascending."""
    masks: ItemMasks | None = None
    """Of this step's dropout, where the pool is not the whole catalogue."""
    candidates: Tensor | None = None
    """[candidate], int64: indices into the pool, ascending, where not all rows are candidates."""


class Softmax(Protocol):
    """Candidate strategy of a training step."""

    def embed(self, model: MISSRec, item_ids: Tensor, targets: Tensor) -> StepEmbeddings:
        """Compute the embeddings of the sessions' items and of the candidates; draws this step's dropout."""

    def loss(self, model: MISSRec, embeddings: StepEmbeddings, positions: TrainedPositions) -> Tensor:
        """Return the next-item loss, as `next_item_loss` defines it."""


class FullSoftmax:
    """All candidates at once: the fastest way while a table [position, catalogue] fits into memory.

    Parameters
    ----------
    dtype : torch.dtype
        Of the product of vectors and candidates; scores and softmax are in fp32 in any case.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def embed(self, model: MISSRec, item_ids: Tensor, targets: Tensor) -> StepEmbeddings:
        """Compute the embeddings of the whole catalogue."""
        catalogue = model.item_encoder.catalogue()
        rows = torch.arange(model.item_encoder.n_rows, device=item_ids.device)
        return StepEmbeddings(catalogue.take(item_ids), catalogue, rows)

    def loss(self, model: MISSRec, embeddings: StepEmbeddings, positions: TrainedPositions) -> Tensor:
        """Return the loss; the softmax is stored in the memory of the scores."""
        vectors, history, targets, weights, counts = positions
        with torch.autocast(vectors.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            logits = model.score(vectors, model.item_encoder.candidates(embeddings.pool), history)
        logits = logits.div_(model.config.temperature)
        return next_item_loss(logits, targets, weights, counts=counts)


def row_embeddings(model: MISSRec, rows: Tensor, masks: ItemMasks, *, sparse: bool = True) -> ItemEmbeddings:
    """Return the embeddings of ``rows`` [item] under a step's masks; the gradients of the IDs are ``sparse``."""
    embeddings = model.item_encoder(rows, masks)
    ids = [F.embedding(rows, table, sparse=sparse) for table in model.item_encoder.id_tables]
    return embeddings._replace(**dict(zip(("ids", "candidate_ids"), ids)))


def candidate_rows(model: MISSRec) -> Tensor:
    """Return [row], bool: True where a row is a class of the training softmax."""
    return torch.ones(model.item_encoder.n_rows, dtype=torch.bool, device=model.untrained.device).index_fill_(
        0, model.untrained, value=False
    )


def score_rows(
    model: MISSRec,
    vectors: Tensor,
    embeddings: ItemEmbeddings,
    rows: Tensor,
    history: Tensor,
    phi: Tensor | None = None,
) -> Tensor:
    """Return the training scores of some candidates, -inf for those that are no class of the training softmax.

    Parameters
    ----------
    model : MISSRec
    vectors : Tensor [position, dim]
    embeddings : ItemEmbeddings of shape [item]
        The candidates' embeddings.
    rows : Tensor [item], int64
        The rows of the candidates, ascending.
    history : Tensor [position, seq], int64
        Items of the session, for the score terms of the training softmax.
    phi : Tensor, optional
        In place of the fusion's own, where that has one number per row: those of ``rows``.

    Returns
    -------
    Tensor [position, item]
        Before the temperature; the columns of `MISSRec.score` in training mode.
    """
    candidates = model.item_encoder.candidates(embeddings, rows)
    fusion = model.fusion
    if fusion.name == "dynamic_instance":
        assert fusion.phi is not None
        own = fusion.phi[rows] if phi is None else phi
        scores: Tensor = functional_call(fusion, {"phi": own}, (vectors, candidates))
    else:
        scores = fusion(vectors, candidates)
    scores = model.terms.add_to_rows(scores, rows, history)
    return scores.masked_fill_(~candidate_rows(model)[rows], -torch.inf)
