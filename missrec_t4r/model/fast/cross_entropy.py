"""Softmax cross-entropy with a gradient that is written out: autograd keeps several tensors [position, catalogue]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from missrec_t4r.model.losses import target_shares


def next_item_loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, *, counts: Tensor | None = None
) -> Tensor:
    """Return `missrec_t4r.model.losses.next_item_loss` with one large tensor instead of several.

    The softmax is stored in the memory of ``logits``, whose values are lost: a large catalogue's step is bound by
    memory, not by arithmetic.

    Parameters
    ----------
    logits : Tensor [position, catalogue]
    targets : Tensor [position] or [position, target], int64
    weights : Tensor [target], optional
    counts : Tensor [target], optional
        As there.
    """
    targets, share = target_shares(logits, targets, weights, counts)
    loss: Tensor = _SoftmaxCrossEntropy.apply(logits, targets, share)  # type: ignore[no-untyped-call]
    return loss


class _SoftmaxCrossEntropy(torch.autograd.Function):
    """Sum over p, k of ``share[p,k] * (logsumexp(logits[p]) - logits[p, targets[p,k]])``, with one large tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        largest = logits.amax(1, keepdim=True)
        wanted = logits.gather(1, targets) - largest
        softmax = logits.detach().sub_(largest).exp_()
        total = softmax.sum(1, keepdim=True)
        ctx.save_for_backward(targets, share, total)
        ctx.softmax = softmax  # not yet divided by its total; the storage of the logits
        return ((total.log() - wanted).masked_fill(share == 0, 0.0) * share).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        targets, share, total = ctx.saved_tensors
        scaled = share * gradients[0]
        gradient = ctx.softmax.mul_(scaled.sum(1, keepdim=True) / total)
        ctx.softmax = None  # a second backward would need the logits again
        return gradient.scatter_add_(1, targets, -scaled), None, None
