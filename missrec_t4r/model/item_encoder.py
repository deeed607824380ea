"""Item towers: frozen modality vectors of the whole catalogue become tokens of the model's width (specification 1).

The catalogue's tokens are computed once per training step (or once per catalogue version in serving) and everything
else gathers from them: histories, candidates and interests see the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config import FeatureScaling, MissingModality, SingleModality
from missrec_t4r.model.ops.normalize import unit
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW

_LARGE = 1 << 27
"""Numbers in a table (512 MiB) from which it keeps its place, mapped from a file perhaps, and is scaled row by row."""


_MANY = 256
"""Session items from which on it is worth to compute those that occur more than once only once."""


class ItemEmbeddings(NamedTuple):
    """Tokens of some items, or of the whole catalogue; ``...`` stands for the shape of the rows."""

    modality: Tensor
    """[modality, ..., dim]: adapter outputs, not normalised."""
    mask: Tensor
    """[modality, ...], bool: True where the token counts in sums, votes and clusters."""
    attended: Tensor
    """[modality, ...], bool: True where the token is a key of the decoder under ``contextual`` fusion."""
    ids: Tensor | None
    """[..., dim]: ID embeddings; None when inductive."""
    id_mask: Tensor | None
    """[...], bool: True where the ID embedding was trained."""

    def take(self, rows: Tensor) -> ItemEmbeddings:
        """Gather the tokens of ``rows`` [batch, seq] out of whole-catalogue tokens."""
        return ItemEmbeddings(
            torch.stack([F.embedding(rows, tokens) for tokens in self.modality]),
            self.mask[:, rows],
            self.attended[:, rows],
            None if self.ids is None else F.embedding(rows, self.ids),
            None if self.id_mask is None else self.id_mask[rows],
        )


class ItemMasks(NamedTuple):
    """Which tokens of the whole catalogue count; a training step draws them once, before any token is computed."""

    mask: Tensor
    """[modality, row], bool: as in `ItemEmbeddings`."""
    attended: Tensor
    """[modality, row], bool: as in `ItemEmbeddings`."""
    id_mask: Tensor | None
    """[row], bool: as in `ItemEmbeddings`."""


class CandidateEmbeddings(NamedTuple):
    """Unit-length tokens of the whole catalogue, as candidates are scored."""

    modality: Tensor
    """[modality, catalogue, dim]."""
    mask: Tensor
    """[modality, catalogue], bool."""
    ids: Tensor | None
    """[catalogue, dim]."""
    id_mask: Tensor | None
    """[catalogue], bool."""


class ItemEncoder(nn.Module):
    """One linear adapter per modality over frozen vectors, and ID embeddings when transductive.

    Parameters
    ----------
    vectors : mapping of str to Tensor [row, width]
        Frozen vectors; zero where the modality is missing. Not part of the state dict: the catalogue owns them.
    presence : Tensor [modality, row], bool
        True where the item has the modality.
    trained_ids : Tensor [row], bool, or None
        Items whose ID embedding is used; None builds no ID embeddings (inductive).
    d_model : int
        Width of the tokens.
    missing_modality : {"masked", "zero_row"}
        ``zero_row`` is the published behaviour: a missing modality's token is the adapter's bias and counts.
    feature_scaling : {"l2", "none"}
        ``l2`` scales vectors to unit length first.
    single_modality : {"fused", "summed"}
        ``summed`` (published): with one modality, a candidate is the sum of its modality token and its ID.
    padding_candidate : bool
        In training the padding row is a candidate too (published).
    modality_dropout, id_dropout : float
        Training only; drawn once per call of `catalogue`, so that one step sees one catalogue.
    """

    presence: Tensor
    trained_ids: Tensor

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        presence: Tensor,
        trained_ids: Tensor | None,
        d_model: int,
        missing_modality: MissingModality = "masked",
        feature_scaling: FeatureScaling = "l2",
        single_modality: SingleModality = "fused",
        padding_candidate: bool = False,
        modality_dropout: float = 0.0,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.names = list(vectors)
        self.missing_modality, self.padding_candidate = missing_modality, padding_candidate
        self.summed = single_modality == "summed" and len(self.names) == 1
        self.modality_dropout, self.id_dropout = modality_dropout, id_dropout
        self.vectors = nn.Module()
        for name, table in vectors.items():
            at_once = feature_scaling == "l2" and table.numel() < _LARGE
            self.vectors.register_buffer(name, F.normalize(table, dim=-1) if at_once else table, persistent=False)
        self.unscaled = {name for name in vectors if feature_scaling == "l2" and vectors[name].numel() >= _LARGE}
        self.adapters = nn.ModuleDict({name: nn.Linear(table.shape[1], d_model) for name, table in vectors.items()})
        self.register_buffer("presence", presence, persistent=False)
        self.register_buffer("trained_ids", torch.zeros(0) if trained_ids is None else trained_ids, persistent=False)
        self.id_embedding = None if trained_ids is None else nn.Embedding(presence.shape[1], d_model)

    @property
    def n_rows(self) -> int:
        """Rows of the catalogue, the reserved ones included."""
        return int(self.presence.shape[1])

    def forward(self, rows: Tensor, masks: ItemMasks | None = None) -> ItemEmbeddings:
        """Return the tokens of ``rows`` (any shape) without computing the rest of the catalogue.

        ``masks`` are this training step's; without them nothing is dropped.
        """
        if rows.ndim > 1 and rows.numel() >= _MANY and not torch.is_grad_enabled() and not torch.jit.is_tracing():
            different, place = rows.unique(return_inverse=True)  # sessions of a batch share items
            return self(different, masks).take(place)
        stacked = torch.stack([self.adapters[name](self.features(name, rows)) for name in self.names])
        present = self.presence[:, rows]
        if self.missing_modality == "masked":
            stacked = stacked * present.unsqueeze(-1)
        ids = None if self.id_embedding is None else self.id_embedding(rows)
        if masks is not None:
            id_mask = None if masks.id_mask is None else masks.id_mask[rows]
            return ItemEmbeddings(stacked, masks.mask[:, rows], masks.attended[:, rows], ids, id_mask)
        id_mask = None if self.id_embedding is None else self.trained_ids[rows]
        return ItemEmbeddings(stacked, self._counted(present, rows), present, ids, id_mask)

    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return a modality's frozen vectors [row, width] as they enter the adapter, or those of ``rows``."""
        table = self.vectors.get_buffer(name)
        taken = table if rows is None else table[rows]
        return F.normalize(taken, dim=-1) if name in self.unscaled else taken

    def unit_embeddings(self, index: int, rows: Tensor) -> Tensor:
        """Return the unit tokens [item, dim] of the modality at ``index``; zero where it is missing."""
        name = self.names[index]
        return unit(self.adapters[name](self.features(name, rows))) * self.presence[index, rows].unsqueeze(1)

    def masks(self, *, dropout: bool) -> ItemMasks:
        """Return which tokens of the catalogue count; with ``dropout`` modalities and IDs are dropped at random."""
        rows = torch.arange(self.n_rows, device=self.presence.device)
        id_mask = None if self.id_embedding is None else self.trained_ids
        mask = self._counted(self.presence, rows)
        if dropout and self.modality_dropout:
            mask = _drop_one_modality(mask, self.modality_dropout)
        if dropout and self.id_dropout and id_mask is not None:
            keep = torch.rand(id_mask.shape, device=id_mask.device) >= self.id_dropout
            id_mask = id_mask & (keep | ~mask.any(0))
        return ItemMasks(mask, self.presence & mask, id_mask)

    def catalogue(self) -> ItemEmbeddings:
        """Return the tokens of all rows; in training mode with this step's modality and ID dropout."""
        stacked = [self._adapted(index, name) for index, name in enumerate(self.names)]
        ids = None if self.id_embedding is None else self.id_embedding.weight
        mask, attended, id_mask = self.masks(dropout=self.training)
        return ItemEmbeddings(torch.stack(stacked), mask, attended, ids, id_mask)

    def candidates(self, catalogue: ItemEmbeddings | None = None, rows: Tensor | None = None) -> CandidateEmbeddings:
        """Return unit-length tokens of the whole catalogue (once per step, or once per catalogue version).

        ``rows`` [item] says whose tokens are given where they are not the whole catalogue's.
        """
        tokens = self.catalogue() if catalogue is None else catalogue
        mask, id_mask = tokens.mask, tokens.id_mask
        if self.training and self.padding_candidate:
            rows = torch.arange(self.n_rows, device=mask.device) if rows is None else rows
            padding = rows == PADDING_ROW
            mask, id_mask = mask | padding, None if id_mask is None else id_mask | padding
        if self.summed and tokens.ids is not None and id_mask is not None:
            total = tokens.modality * mask.unsqueeze(-1) + tokens.ids * id_mask.unsqueeze(-1)
            return CandidateEmbeddings(unit(total), mask | id_mask, None, None)
        ids = None if tokens.ids is None else unit(tokens.ids)
        return CandidateEmbeddings(unit(tokens.modality), mask, ids, id_mask)

    def _adapted(self, index: int, name: str) -> Tensor:
        """Return the tokens [row, dim] of one modality; where missing ones count for nothing, they cost nothing."""
        adapter = self.adapters[name]
        if self.missing_modality != "masked" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            tokens: Tensor = adapter(self.features(name))
            return tokens if self.missing_modality != "masked" else tokens * self.presence[index].unsqueeze(-1)
        rows = torch.nonzero(self.presence[index]).flatten()
        present = adapter(self.features(name, rows))
        return present.new_zeros(self.n_rows, present.shape[1]).index_copy_(0, rows, present)

    def _counted(self, present: Tensor, rows: Tensor) -> Tensor:
        if self.missing_modality == "masked":
            return present
        return (rows >= FIRST_ITEM_ROW).expand(present.shape)  # published: the bias of a missing modality counts


def _drop_one_modality(mask: Tensor, probability: float) -> Tensor:
    """Hide one present modality of some rows, never the last one; ``mask`` [modality, row]."""
    several = mask.sum(0) > 1
    hit = several & (torch.rand(mask.shape[1], device=mask.device) < probability)
    lottery = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    chosen = F.one_hot(lottery.argmax(0), mask.shape[0]).T.bool()
    return mask & ~(chosen & hit)
