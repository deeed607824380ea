"""What the authors' release (gimpong/MM23-MISSRec) does differently: one part per deviation, chosen by the builder.

==========================  ==============================================  =======================================
setting                     part                                            instead of
==========================  ==============================================  =======================================
missing_modality            `ZeroRows`                                      `item_encoder.MaskedRows`
padding_candidate           `padding_candidate`                             padding is no class of the softmax
single_modality             `summed_candidates`                             modality and ID are scored apart
contextual_readout          `first_modality`                                `decoder.mean_over_modalities`
orthogonality               `PaddedInterests`, `faithful_orthogonality`     no slot for padding, squared cosines
initialisation              `release_initialisation`                        normal(0, 0.02), biases 0
==========================  ==============================================  =======================================

Two more need no part: vectors that enter the adapters as they come (``feature_scaling: none``) and IDs that were never
trained (``mask_untrained_ids: false``). docs/equations.md states the effect of each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from missrec_t4r.model.attention import MultiHeadAttention
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW

if TYPE_CHECKING:  # the parts below are handed to these modules
    from missrec_t4r.model.item_encoder import ItemEmbeddings
    from missrec_t4r.model.missrec import MISSRec


class ZeroRows:
    """A missing modality is a vector of zeros (E2): its embedding is the adapter's bias, and it counts."""

    masks = False

    def counted(self, present: Tensor, rows: Tensor) -> Tensor:
        """Return [modality, ...], True for every modality of every item ``rows`` [...]."""
        return (rows >= FIRST_ITEM_ROW).expand(present.shape)


def padding_candidate(items: ItemEmbeddings, rows: Tensor, *, training: bool) -> ItemEmbeddings:
    """In training let the padding row, its embeddings the adapters' biases, count as one more class (E13)."""
    if not training:
        return items
    padding = rows == PADDING_ROW
    id_mask = None if items.id_mask is None else items.id_mask | padding
    return items._replace(mask=items.mask | padding, id_mask=id_mask)


def summed_candidates(items: ItemEmbeddings, rows: Tensor, *, training: bool) -> ItemEmbeddings:
    """With one modality, return the sums of modality and ID embeddings in place of the modality, and no ID (E11)."""
    if items.ids is None or items.id_mask is None or len(items.modality) > 1:
        return items
    total = items.modality * items.mask.unsqueeze(-1) + items.ids * items.id_mask.unsqueeze(-1)
    return items._replace(modality=total, mask=items.mask | items.id_mask, ids=None, id_mask=None)


def first_modality(hidden: Tensor, mask: Tensor, n_modalities: int) -> Tensor:
    """Return the outputs [batch, seq, dim] of an item's first modality under ``contextual`` fusion (E10)."""
    return hidden[:, : hidden.shape[1] // n_modalities]


class PaddedInterests:
    """The padding of a session is one more, empty interest, never attended to; the regulariser counts it (E14).

    Parameters
    ----------
    max_sequence_length : int
        To which the release pads all sessions.
    """

    spare = 1
    """Slots beyond one per item and modality."""

    def __init__(self, max_sequence_length: int) -> None:
        self.max_sequence_length = max_sequence_length

    def __call__(self, count: Tensor, item_ids: Tensor) -> Tensor:
        """Return the slots that each session takes, [batch], for ``count`` [batch] distinct interests."""
        return count + ((item_ids > PADDING_ROW).sum(1) < self.max_sequence_length)


def faithful_orthogonality(
    memory: Tensor, mask: Tensor, n_slots: int | Tensor | None = None, *, expected: bool = True
) -> Tensor:
    """Return the published regulariser of the contextual encoder's output (E14).

        r = sum over batch and dim of u u / dim,    u = share of slots that are real * sum of the memory over all slots

    It is not zero for orthogonal interests, and depends on padding and on batch size, alone among our losses.

    Parameters
    ----------
    memory : Tensor [batch, interest, dim]
        Empty slots included.
    mask : Tensor [batch, interest], bool
    n_slots : int or 0-dim Tensor, optional
        As if every session had so many slots; by default those of ``memory``.
    expected : bool
        Slots that were not encoded: every session must have two empty ones or more. Empty slots of a session
        differ by their dropout alone, so the sum over those that were not encoded is replaced by its expectation from
        those that were: without dropout the value is that of the padded sets, with dropout its mean is (ours: the
        padding would cost more than all else that is encoded). False: at least ``n_slots`` were encoded, and those
        beyond do not count.
    """
    weight, n_encoded = mask.unsqueeze(-1).to(memory.dtype), mask.shape[1]
    if n_slots is None:
        square = memory.sum(1).square()  # [batch, dim]
    elif expected:
        square = _expected_square(memory, weight, n_slots)
    else:
        counts = torch.arange(n_encoded, device=mask.device) < n_slots  # [interest]
        square = (memory * counts.unsqueeze(1)).sum(1).square()
    share = weight.sum(1) / (n_encoded if n_slots is None else n_slots)  # [batch, 1]
    return (share.square() * square).sum() / memory.shape[-1]


@torch.no_grad()
def release_initialisation(model: MISSRec) -> None:
    """Draw anew what the authors' initialisation does not reach: query, key and value projections, and the adapters."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            bound = math.sqrt(6 / (4 * module.query.in_features))  # Xavier of the three projections as one matrix
            for projection in (module.query, module.key, module.value):
                nn.init.uniform_(projection.weight, -bound, bound)
    reset_adapters(model)


def reset_adapters(model: MISSRec) -> None:
    """Give the adapters torch's initialisation.

    `ZeroRows` needs it: the embedding of a missing modality is the adapter's bias, and a bias of zero has no direction
    (normalising it sends gradients of 1e12).
    """
    for name in model.item_encoder.names:
        cast(nn.Linear, model.item_encoder.adapters[name]).reset_parameters()


def _expected_square(memory: Tensor, weight: Tensor, n_slots: int | Tensor) -> Tensor:
    """Return the expected square [batch, dim] of a session's sum over its interests and all its empty slots."""
    real = weight.sum(1)  # [batch, 1]
    here, missing = memory.shape[1] - real, n_slots - real
    inside, empty = (memory * weight).sum(1), memory * (1 - weight)
    total, squares = empty.sum(1), empty.square().sum(1)
    between = (total.square() - squares) / (here * (here - 1))
    square = inside.square() + 2 * missing * inside * total / here
    return square + missing * squares / here + missing * (missing - 1) * between
