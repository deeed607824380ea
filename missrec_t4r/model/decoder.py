"""Interest-aware decoder: item embeddings attend to each other and to the session's interests (E8 to E10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from missrec_t4r.config.model import Attention, SequenceFusion
from missrec_t4r.model.attention import DecoderLayer
from missrec_t4r.model.interests import InterestTokens
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.tracing import sizes

Readout = Callable[[Tensor, Tensor, int], Tensor]
"""Outputs [batch, modality * seq, dim], their mask [batch, modality * seq], modalities -> [batch, seq, dim]."""


def mean_over_modalities(hidden: Tensor, mask: Tensor, n_modalities: int) -> Tensor:
    """Average the outputs of an item over the modalities that it has (ours): a `Readout`."""
    hidden = hidden.unflatten(1, (n_modalities, -1))  # [batch, modality, seq, dim]
    weights = mask.unflatten(1, (n_modalities, -1)).unsqueeze(-1)  # [batch, modality, seq, 1]
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


class InterestAwareDecoder(nn.Module):
    """Turn the items of a session and its interests into vectors that score candidates (arXiv:2308.11175).

    Parameters
    ----------
    layers : sequence of DecoderLayer
        In their order; at least one.
    d_model, dropout, eps
        Width, and what position embeddings and LayerNorms around the layers need.
    max_sequence_length : int
        Number of position embeddings.
    attention : {"bidirectional", "causal"}
        ``bidirectional`` is the published model: the session is all past. ``causal``: position t sees items up to t.
    sequence_fusion : {"add", "contextual"}
        ``add``: one token per item, the sum of its modalities. ``contextual``: one token per item and modality.
    readout : Readout
        Under ``contextual`` fusion, how an item's outputs become one.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        d_model: int,
        dropout: float,
        eps: float,
        max_sequence_length: int,
        attention: Attention = "bidirectional",
        sequence_fusion: SequenceFusion = "add",
        readout: Readout = mean_over_modalities,
    ) -> None:
        super().__init__()
        self.attention, self.sequence_fusion, self.readout = attention, sequence_fusion, readout
        self.positions = nn.Embedding(max_sequence_length, d_model)
        self.norm_input = nn.LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model, eps)

    def forward(
        self,
        items: ItemEmbeddings,
        item_mask: Tensor,
        memory: Tensor,
        interests: InterestTokens,
        *,
        last_only: bool = False,
        event_features: Tensor | None = None,
    ) -> Tensor:
        """Return one vector per position, or only the one that represents the session.

        Parameters
        ----------
        items : ItemEmbeddings of shape [batch, seq]
            Embeddings of the session's items.
        item_mask : Tensor [batch, seq], bool
            True for real items, which stand at the left.
        memory : Tensor [batch, interest, dim]
            Output of the contextual encoder; in models without interests one masked slot, which no layer reads.
        interests : InterestTokens
            Mask and positions of the memory.
        last_only : bool
            Compute the last layer for the last real item alone: the same result with a fraction of the work.
        event_features : Tensor [batch, seq, dim], optional
            Embedded event features, added to every token of the item.

        Returns
        -------
        Tensor [batch, seq, dim], or [batch, 1, dim] with ``last_only``
            Not normalised.
        """
        x, key_mask, time = self._embed(items, item_mask, event_features)
        mask = key_mask.unsqueeze(1)  # [batch, 1, token]
        memory_mask = interests.mask.unsqueeze(1)  # [batch, 1, interest]
        if self.attention == "causal":
            mask = mask & (time.unsqueeze(0) <= time.unsqueeze(1))
            memory_mask = memory_mask & (interests.position.unsqueeze(1) <= time.unsqueeze(-1))
        for layer in self.layers[:-1]:
            x = layer(x, x, mask, memory, memory_mask)
        queries, weights = x, key_mask
        if last_only:  # positions meet in keys and values only: the other outputs of the last layer are not needed
            at = self._last_tokens(item_mask, x.shape[1])
            queries, weights = _gather(x, at), key_mask.gather(1, at)
            if self.attention == "causal":  # else one mask for all queries
                mask, memory_mask = _gather(mask.expand(x.shape[0], -1, -1), at), _gather(memory_mask, at)
        hidden = self.norm(self.layers[-1](queries, x, mask, memory, memory_mask))
        return hidden if self.sequence_fusion == "add" else self.readout(hidden, weights, sizes(items.modality)[0])

    def _embed(
        self, items: ItemEmbeddings, item_mask: Tensor, event_features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [batch, token, dim], their mask [batch, token] and their positions in the session [token]."""
        steps = torch.arange(item_mask.shape[1], device=item_mask.device)
        common = self.positions(steps)
        if items.ids is not None and items.id_mask is not None:
            common = common + items.ids * items.id_mask.unsqueeze(-1)
        if event_features is not None:
            common = common + event_features
        if self.sequence_fusion == "add":
            tokens = (items.modality * items.mask.unsqueeze(-1)).sum(0) + common
            return self.dropout(self.norm_input(tokens)), item_mask, steps
        n_modalities = sizes(items.modality)[0]  # [modality, batch, seq, dim] -> [batch, modality * seq, dim]
        tokens = (items.modality * items.mask.unsqueeze(-1) + common).transpose(0, 1).flatten(1, 2)
        attended = (_with_id_only(items) & item_mask).transpose(0, 1).flatten(1)
        return self.dropout(self.norm_input(tokens)), attended, steps.repeat(n_modalities)

    def _last_tokens(self, item_mask: Tensor, n_tokens: int) -> Tensor:
        """Return the token positions [batch, 1 or modality] of the last real item."""
        last = (item_mask.sum(1, keepdim=True) - 1).clamp_min(0)
        return last + torch.arange(0, n_tokens, item_mask.shape[1], device=item_mask.device)


def _with_id_only(items: ItemEmbeddings) -> Tensor:
    """Return the keys [modality, batch, seq]; an item with an ID and no modality keeps one position for it."""
    if items.id_mask is None:
        return items.attended
    alone = items.id_mask & ~items.attended.any(0)
    return torch.cat([items.attended[:1] | alone, items.attended[1:]])


def _gather(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
