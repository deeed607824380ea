"""Item encoder that computes no embedding twice and none of a missing modality.

* The sessions of a batch share items: in evaluation the adapters are applied to each distinct item once.
* Where a missing modality counts for nothing, its embedding is zero and is not computed.
* Unit length has its gradient written out, in half of autograd's passes over a large table.

The same values as `missrec_t4r.model.item_encoder`, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model.item_encoder import ItemEmbeddings, ItemEncoder, ItemMasks

MANY = 256
"""Session items from which on it is worth to look for those that occur more than once."""
_SMALLEST = 1e-12
"""A shorter vector is divided by this, as `torch.nn.functional.normalize` does: zero stays zero."""


class FastItemEncoder(ItemEncoder):
    """`ItemEncoder` with the shortcuts of the module."""

    def forward(self, rows: Tensor, masks: ItemMasks | None = None) -> ItemEmbeddings:
        """Return the embeddings of ``rows``, as `ItemEncoder.forward` does."""
        on_gpu = rows.device.type == "cuda"  # which would be waited for
        if not (torch.jit.is_tracing() or torch.is_grad_enabled() or on_gpu) and rows.ndim > 1 and rows.numel() >= MANY:
            distinct, place = rows.unique(return_inverse=True)
            return super().forward(distinct, masks).take(place)
        return super().forward(rows, masks)

    def embed_modality(self, index: int) -> Tensor:
        """Return the embeddings [row, dim] of one modality, computed for the rows that have it."""
        on_gpu = self.presence.device.type == "cuda"  # where the number of rows would have to be waited for
        if not self.missing.masks or on_gpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().embed_modality(index)
        name, rows = self.names[index], torch.nonzero(self.presence[index]).flatten()
        present = self.adapters[name](self.features(name, rows))  # [present, dim]
        return present.new_zeros(self.n_rows, present.shape[1]).index_copy_(0, rows, present)

    def unit(self, x: Tensor) -> Tensor:
        """Scale the last axis to unit length."""
        return unit(x)


def unit(x: Tensor) -> Tensor:
    """Divide by the Euclidean length of the last axis.

    Parameters
    ----------
    x : Tensor [..., dim]

    Returns
    -------
    Tensor [..., dim]
        ``torch.nn.functional.normalize(x, dim=-1)``, with the same gradient.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.normalize(x, dim=-1)
    scaled: Tensor = _Unit.apply(x)  # type: ignore[no-untyped-call]
    return scaled


class _Unit(torch.autograd.Function):
    """y = x / |x|, so that a gradient g becomes (g - y (y . g)) / |x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scaled = x / length.clamp_min(_SMALLEST)
        ctx.save_for_backward(scaled, length)
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scaled, length = ctx.saved_tensors
        along = torch.linalg.vecdot(scaled, gradients[0]).unsqueeze(-1)
        along = torch.where(length > _SMALLEST, along, 0.0)
        return torch.addcmul(gradients[0], scaled, along, value=-1).div_(length.clamp_min(_SMALLEST))
