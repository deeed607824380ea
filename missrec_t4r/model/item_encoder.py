"""Item encoder: frozen modality vectors of the catalogue become embeddings of the model's width (E1, E2).

    x[i,m] = A_m f[i,m] + b_m          A_m, b_m: the adapter of modality m;  f[i,m]: frozen vector of item i
    e_i                                ID embedding, where the model is transductive
    c_i                                ID embedding that scores i as a candidate: e_i, or one of its own (ours)

The catalogue's embeddings are computed once per training step (or once per catalogue version in serving) and everything
else gathers from them: histories, candidates and interests get the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.tracing import sizes


class ItemEmbeddings(NamedTuple):
    """Embeddings of some items, or of the whole catalogue; ``...`` stands for the shape of the rows."""

    modality: Tensor
    """[modality, ..., dim]: adapter outputs, not normalised."""
    mask: Tensor
    """[modality, ...], bool: True where the embedding counts in sums, scores and clusters."""
    attended: Tensor
    """[modality, ...], bool: True where the embedding is a key of the decoder under ``contextual`` fusion."""
    ids: Tensor | None
    """[..., dim]: ID embeddings; None when inductive."""
    id_mask: Tensor | None
    """[...], bool: True where the ID embedding was trained."""
    candidate_ids: Tensor | None = None
    """[..., dim]: ID embeddings that score these items as candidates; None for those of ``ids``."""

    def take(self, rows: Tensor, *, candidates: bool = False) -> ItemEmbeddings:
        """Gather the embeddings of ``rows`` [batch, seq] out of those of the whole catalogue.

        Items of sessions need no ``candidate_ids``: they are gathered for ``candidates`` alone.
        """
        return ItemEmbeddings(
            torch.stack([F.embedding(rows, tokens) for tokens in self.modality]),
            self.mask[:, rows],
            self.attended[:, rows],
            None if self.ids is None else F.embedding(rows, self.ids),
            None if self.id_mask is None else self.id_mask[rows],
            F.embedding(rows, self.candidate_ids) if candidates and self.candidate_ids is not None else None,
        )


class ItemMasks(NamedTuple):
    """Which embeddings of the catalogue count; a training step draws them once, before any embedding is computed."""

    mask: Tensor
    """[modality, row], bool: as in `ItemEmbeddings`."""
    attended: Tensor
    """[modality, row], bool: as in `ItemEmbeddings`."""
    id_mask: Tensor | None
    """[row], bool: as in `ItemEmbeddings`."""


class CandidateEmbeddings(NamedTuple):
    """Unit-length embeddings of the whole catalogue, as candidates are scored."""

    modality: Tensor
    """[modality, catalogue, dim]."""
    mask: Tensor
    """[modality, catalogue], bool."""
    ids: Tensor | None
    """[catalogue, dim]."""
    id_mask: Tensor | None
    """[catalogue], bool."""


class MissingRule(Protocol):
    """What becomes of a modality that an item lacks."""

    masks: bool
    """Whether its embedding is zero."""

    def counted(self, present: Tensor, rows: Tensor) -> Tensor:
        """Return which embeddings of ``rows`` [...] count, [modality, ...], given which are present."""


class MaskedRows:
    """A missing modality is never clustered, attended to, summed or scored (ours)."""

    masks = True

    def counted(self, present: Tensor, rows: Tensor) -> Tensor:
        """Return the present ones."""
        return present


class CandidateRule(Protocol):
    """Changes the embeddings by which items are scored, before they are scaled to unit length."""

    def __call__(self, items: ItemEmbeddings, rows: Tensor, *, training: bool) -> ItemEmbeddings:
        """Return embeddings of the same ``rows`` [item]."""


class ItemDropout(NamedTuple):
    """Probabilities with which a training item loses one of several modalities, or its ID (ours)."""

    modality: float = 0.0
    ids: float = 0.0

    def __call__(self, masks: ItemMasks) -> ItemMasks:
        """Return the masks of one training step; an item keeps its last modality, or its ID where it has none."""
        mask, attended, id_mask = masks
        if self.modality:
            mask = _drop_one_modality(mask, self.modality)
        if self.ids and id_mask is not None:
            keep = torch.rand(id_mask.shape, device=id_mask.device) >= self.ids
            id_mask = id_mask & (keep | ~mask.any(0))
        return ItemMasks(mask, attended & mask, id_mask)


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
        Width of the embeddings.
    scaled_on_read : collection of str
        Modalities whose vectors are scaled to unit length when they are read: large tables, mapped from a file perhaps.
    missing : MissingRule, optional
        `MaskedRows` by default.
    candidate_rules : sequence of CandidateRule
        Applied in this order.
    dropout : ItemDropout
        Drawn once per call of `catalogue` in training mode, so that one step sees one catalogue.
    own_candidate_ids : bool
        Score candidates by a second table of ID embeddings.
    """

    presence: Tensor
    trained_ids: Tensor

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        presence: Tensor,
        trained_ids: Tensor | None,
        d_model: int,
        *,
        scaled_on_read: Collection[str] = (),
        missing: MissingRule | None = None,
        candidate_rules: Sequence[CandidateRule] = (),
        dropout: ItemDropout | None = None,
        own_candidate_ids: bool = False,
    ) -> None:
        super().__init__()
        self.names, self.scaled_on_read = list(vectors), frozenset(scaled_on_read)
        self.missing, self.candidate_rules = MaskedRows() if missing is None else missing, tuple(candidate_rules)
        self.dropout = ItemDropout() if dropout is None else dropout
        self.vectors = nn.Module()
        for name, table in vectors.items():
            self.vectors.register_buffer(name, table, persistent=False)
        self.adapters = nn.ModuleDict({name: nn.Linear(table.shape[1], d_model) for name, table in vectors.items()})
        self.register_buffer("presence", presence, persistent=False)
        self.register_buffer("trained_ids", torch.zeros(0) if trained_ids is None else trained_ids, persistent=False)
        self.id_embedding = None if trained_ids is None else nn.Embedding(presence.shape[1], d_model)
        has_own = own_candidate_ids and trained_ids is not None
        self.candidate_id_embedding = nn.Embedding(presence.shape[1], d_model) if has_own else None

    @property
    def n_rows(self) -> int:
        """Rows of the catalogue, the reserved ones included."""
        return sizes(self.presence)[1]

    @property
    def id_tables(self) -> list[Tensor]:
        """The ID embeddings [row, dim]: of sessions, then the candidates' own; those that the model has."""
        return [table.weight for table in (self.id_embedding, self.candidate_id_embedding) if table is not None]

    def forward(self, rows: Tensor, masks: ItemMasks | None = None) -> ItemEmbeddings:
        """Return the embeddings of ``rows`` (any shape) without computing the rest of the catalogue.

        ``masks`` are this training step's; without them nothing is dropped.
        """
        embedded = torch.stack([self.adapters[name](self.features(name, rows)) for name in self.names])
        present = self.presence[:, rows]  # [modality, ...]
        embedded = embedded * present.unsqueeze(-1) if self.missing.masks else embedded  # [modality, ..., dim]
        ids = None if self.id_embedding is None else self.id_embedding(rows)  # [..., dim]
        own = None if self.candidate_id_embedding is None else self.candidate_id_embedding(rows)  # [..., dim]
        if masks is not None:
            id_mask = None if masks.id_mask is None else masks.id_mask[rows]
            return ItemEmbeddings(embedded, masks.mask[:, rows], masks.attended[:, rows], ids, id_mask, own)
        id_mask = None if self.id_embedding is None else self.trained_ids[rows]
        return ItemEmbeddings(embedded, self.missing.counted(present, rows), present, ids, id_mask, own)

    @torch.no_grad()
    def copy_candidate_ids(self) -> None:
        """Set the candidates' own ID embeddings, if there are any, to those of the sessions."""
        if self.id_embedding is not None and self.candidate_id_embedding is not None:
            self.candidate_id_embedding.weight.copy_(self.id_embedding.weight)

    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return a modality's frozen vectors [row, width] as they enter the adapter, or those of ``rows``."""
        table = self.vectors.get_buffer(name)
        taken = table if rows is None else table[rows]
        return F.normalize(taken, dim=-1) if name in self.scaled_on_read else taken

    def unit_embeddings(self, index: int, rows: Tensor) -> Tensor:
        """Return the unit embeddings [item, dim] of the modality at ``index``; zero where it is missing."""
        name = self.names[index]
        return self.unit(self.adapters[name](self.features(name, rows))) * self.presence[index, rows].unsqueeze(1)

    def masks(self, *, dropout: bool) -> ItemMasks:
        """Return which embeddings of the catalogue count; with ``dropout`` some are dropped at random."""
        rows = torch.arange(self.n_rows, device=self.presence.device)
        mask = self.missing.counted(self.presence, rows)
        masks = ItemMasks(mask, self.presence & mask, None if self.id_embedding is None else self.trained_ids)
        return self.dropout(masks) if dropout else masks

    def catalogue(self) -> ItemEmbeddings:
        """Return the embeddings of all rows; in training mode with this step's modality and ID dropout."""
        embedded = torch.stack([self.embed_modality(index) for index in range(len(self.names))])
        mask, attended, id_mask = self.masks(dropout=self.training)
        tables = self.id_embedding, self.candidate_id_embedding
        ids, own = (None if table is None else table.weight for table in tables)
        return ItemEmbeddings(embedded, mask, attended, ids, id_mask, own)

    def embed_modality(self, index: int) -> Tensor:
        """Return the embeddings [row, dim] of one modality."""
        name = self.names[index]
        embedded = cast(Tensor, self.adapters[name](self.features(name)))
        return embedded * self.presence[index].unsqueeze(-1) if self.missing.masks else embedded

    def candidates(self, catalogue: ItemEmbeddings | None = None, rows: Tensor | None = None) -> CandidateEmbeddings:
        """Return unit-length embeddings of the whole catalogue (once per step, or once per catalogue version).

        ``rows`` [item] are those of ``catalogue`` where it is not the whole catalogue.
        """
        items = self.catalogue() if catalogue is None else catalogue
        if items.candidate_ids is not None:
            items = items._replace(ids=items.candidate_ids)
        if self.candidate_rules:
            rows = torch.arange(self.n_rows, device=items.mask.device) if rows is None else rows
            for rule in self.candidate_rules:
                items = rule(items, rows, training=self.training)
        ids = None if items.ids is None else self.unit(items.ids)
        return CandidateEmbeddings(self.unit(to_fp32(items.modality)), items.mask, ids, items.id_mask)

    def unit(self, x: Tensor) -> Tensor:
        """Scale the last axis to unit length."""
        return F.normalize(x, dim=-1)


def to_fp32(tensor: Tensor) -> Tensor:
    """Return a bf16 or fp16 tensor in fp32, any other unchanged (a float64 test stays in float64).

    In fp16 the smallest length by which unit vectors are divided would be 0.
    """
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _drop_one_modality(mask: Tensor, probability: float) -> Tensor:
    """Hide one present modality of some rows, never the last one; ``mask`` [modality, row]."""
    several = mask.sum(0) > 1
    hit = several & (torch.rand(mask.shape[1], device=mask.device) < probability)
    lottery = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    chosen = torch.arange(len(mask), device=mask.device).unsqueeze(1) == lottery.argmax(0)  # [modality, row]
    return mask & ~(chosen & hit)
