"""Pre-training objectives: sequence-item and sequence-sequence contrast (E16, E17; arXiv:2308.11175).

Only the items of a batch are embedded, so that a step's cost does not grow with the union of the domains. Under DDP
each rank scores its own sessions against the positives of all ranks: their rows are gathered and embedded locally,
since every rank has the same adapters; view vectors are gathered with their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config.model import FeatureScaling
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.item_encoder import CandidateEmbeddings, ItemEmbeddings, ItemEncoder


class Positives(NamedTuple):
    """Next items of this process's sessions, among those of all processes: rows that can be recommended."""

    own: Tensor
    """[batch], int64."""
    everyone: Tensor
    """[global batch], int64, in the order of ranks."""
    first: int = 0
    """Number of sessions on lower ranks: ``everyone[first + b] == own[b]``."""


def in_batch_loss(logits: Tensor, positives: Positives) -> Tensor:
    """Return the mean of ``-log softmax(logits[b])[first + b]``; equal items are not each other's negatives.

    The mean is over the global batch, of which this process has a part of the rows: losses and gradients of all
    processes are summed.

    Parameters
    ----------
    logits : Tensor [batch, global batch]
    positives : Positives
    """
    own, everyone, first = positives
    columns = first + torch.arange(len(own), device=own.device)
    equal = own.unsqueeze(1) == everyone
    equal[torch.arange(len(own), device=own.device), columns] = False
    return F.cross_entropy(logits.masked_fill(equal, -torch.inf), columns, reduction="sum") / max(len(everyone), 1)


def sequence_item_contrast(
    fusion: CandidateFusion,
    sessions: Tensor,
    positives: Positives,
    items: BatchEmbeddings,
    temperature: float,
    log_frequency: Tensor | None = None,
) -> Tensor:
    """Return the loss of this rank's sessions, each against every positive item of the batch by the fused score (E16).

    Parameters
    ----------
    fusion : CandidateFusion
        ``static`` or ``dynamic_shared``: a number per item would not transfer.
    sessions : Tensor [batch, dim]
        Unit length.
    positives : Positives
    items : BatchEmbeddings
        Embeddings of, at least, the positives of all ranks.
    temperature : float
    log_frequency : Tensor [row], optional
        Subtracted from the logits: an item that is often a positive is as often a negative of others, which would
        bias its score downwards (ours; logQ correction, Yi et al., RecSys 2019).
    """
    logits = fusion(sessions, items.candidates(positives.everyone)) / temperature
    if log_frequency is not None:
        logits = logits - log_frequency[positives.everyone]
    return in_batch_loss(logits, positives)


def sequence_sequence_contrast(sessions: Tensor, views: Tensor, positives: Positives, temperature: float) -> Tensor:
    """Return the loss of this rank's sessions, each against the augmented views of all sessions of the batch (E17).

    Parameters
    ----------
    sessions : Tensor [batch, dim]
        Unit length.
    views : Tensor [global batch, dim]
        Unit length, of all ranks; row ``first + b`` is a view of session ``b``.
    positives : Positives
        Sessions with the same next item are not each other's negatives.
    temperature : float
    """
    return in_batch_loss(sessions @ views.T / temperature, positives)


class BatchEmbeddings(NamedTuple):
    """Embeddings of the distinct items of one batch."""

    rows: Tensor
    """[item], int64, ascending."""
    tokens: ItemEmbeddings
    """Of shape [item]."""

    @classmethod
    def of(cls, item_encoder: ItemEncoder, *items: Tensor) -> BatchEmbeddings:
        """Embed all rows that occur, once each; in training mode with this step's modality dropout."""
        rows = torch.cat([part.flatten() for part in items]).unique()
        return cls(rows, item_encoder(rows, item_encoder.masks(dropout=item_encoder.training)))

    def take(self, item_ids: Tensor) -> ItemEmbeddings:
        """Return the embeddings of catalogue rows of any shape; all of them must be among ``rows``."""
        return self.tokens.take(torch.searchsorted(self.rows, item_ids.contiguous()))

    def candidates(self, items: Tensor) -> CandidateEmbeddings:
        """Return unit-length embeddings of ``items`` [candidate]."""
        taken = self.tokens.take(torch.searchsorted(self.rows, items.contiguous()), candidates=True)
        ids = taken.ids if taken.candidate_ids is None else taken.candidate_ids
        ids = None if ids is None else F.normalize(ids, dim=-1)
        return CandidateEmbeddings(F.normalize(taken.modality, dim=-1), taken.mask, ids, taken.id_mask)


class WordDrop(nn.Module):
    """Item embeddings of texts with words left out, in place of the catalogue's (an augmentation of the paper).

    Parameters
    ----------
    item_encoder : ItemEncoder
        Its adapters are applied to the other vectors too.
    variants : mapping of str to Tensor [row, width]
        Modality -> vectors of its items' texts with words left out; may be empty.
    feature_scaling : {"l2", "none"}
        As in the item encoder.
    """

    def __init__(
        self, item_encoder: ItemEncoder, variants: Mapping[str, Tensor], feature_scaling: FeatureScaling
    ) -> None:
        super().__init__()
        self.adapters, self.names = item_encoder.adapters, item_encoder.names
        self.tables = nn.Module()
        for name, table in variants.items():
            scaled = F.normalize(table, dim=-1) if feature_scaling == "l2" else table
            self.tables.register_buffer(name, scaled, persistent=False)
        self.varied = tuple(variants)

    def forward(self, items: ItemEmbeddings, item_ids: Tensor, drawn: Tensor) -> ItemEmbeddings:
        """Return the embeddings with the text of the drawn positions replaced.

        Parameters
        ----------
        items : ItemEmbeddings of shape [batch, seq]
        item_ids : Tensor [batch, seq], int64
            Catalogue rows.
        drawn : Tensor [batch, seq], bool
        """
        modality = items.modality.clone()
        for name in self.varied:
            index = self.names.index(name)
            there = drawn & items.mask[index]
            modality[index, there] = self.adapters[name](self.tables.get_buffer(name)[item_ids[there]])
        return items._replace(modality=modality)
