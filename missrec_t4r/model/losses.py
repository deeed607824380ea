"""Training objectives (specification 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.config import Orthogonality


def next_item_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Return the full-softmax cross-entropy over the catalogue, averaged over positions.

    Parameters
    ----------
    logits : Tensor [position, catalogue]
        Scores divided by the temperature; -inf for rows that cannot be recommended.
    targets : Tensor [position] or [position, target], int64
        Catalogue rows; 0 where there is none. Several targets of a position share its softmax (ours). A target that
        cannot be recommended (an item without any vector in an inductive model) counts as none.
    weights : Tensor [target], optional
        Weight of each target column; 1 by default.
    counts : Tensor [target], optional
        What each column's sum is divided by, where the positions are a part of a larger batch; by default the number of
        its real targets.
    overwrite : bool
        Let the softmax take the place of ``logits``: a large catalogue's step is bound by memory, not by arithmetic.
    """
    if targets.ndim == 1:
        targets = targets.unsqueeze(1)
    real = (targets > 0) & ~logits.gather(1, targets).isneginf()
    share = real / (real.sum(0) if counts is None else counts).clamp_min(1).to(logits.dtype)
    if weights is not None:
        share = share * weights
    loss: Tensor = _SoftmaxCrossEntropy.apply(logits if overwrite else logits.clone(), targets, share)  # type: ignore[no-untyped-call]
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


def orthogonality_loss(
    memory: Tensor,
    mask: Tensor,
    kind: Orthogonality,
    *,
    sessions: Tensor | None = None,
    places: int | None = None,
) -> Tensor:
    """Return the regulariser that asks a session's interests to differ.

    Parameters
    ----------
    memory : Tensor [batch, interest, dim]
        Output of the contextual encoder.
    mask : Tensor [batch, interest], bool
    kind : {"cosine", "faithful"}
        ``cosine`` (ours): mean squared cosine between different interests of a session, averaged over the sessions that
        have two. ``faithful``: the published ``sum(u * u) / dim`` with u the sum of a session's memory, empty places
        included, times the share of its places that are real; it depends on padding and on batch size, alone among
        our losses.
    sessions : Tensor, optional
        Number of sessions with two interests to average over, where these are a part of a larger batch.
    places : int, optional
        ``faithful`` as if every set were padded to so many places; every set must have two empty ones or more. Empty
        places of a session differ by their dropout alone, so the sum over those that were not encoded is replaced by
        its expectation from those that were: without dropout the value is that of the padded sets, with dropout its
        mean is (ours: the padding would cost more than all else that is encoded).
    """
    weight = mask.unsqueeze(-1).to(memory.dtype)
    if kind == "faithful":
        square = memory.sum(1).square() if places is None else _expected_square(memory, weight, places)
        share = weight.sum(1) / (mask.shape[1] if places is None else places)
        return (share.square() * square).sum() / memory.shape[-1]
    unit = F.normalize(memory, dim=-1) * weight
    cosine = unit @ unit.transpose(1, 2)
    count = mask.sum(1).to(memory.dtype)
    pairs = count * (count - 1)
    off_diagonal = cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)
    has_pairs = pairs > 0
    per_session = torch.where(has_pairs, off_diagonal / pairs.clamp_min(1), 0.0)
    return per_session.sum() / (has_pairs.sum() if sessions is None else sessions).clamp_min(1)


def _expected_square(memory: Tensor, weight: Tensor, places: int) -> Tensor:
    """Return the mean square [batch, dim] of the sum over a set's real places and as many empty ones as are missing."""
    real = weight.sum(1)
    here, missing = memory.shape[1] - real, places - real
    inside, empty = (memory * weight).sum(1), memory * (1 - weight)
    total, squares = empty.sum(1), empty.square().sum(1)
    between = (total.square() - squares) / (here * (here - 1))
    square = inside.square() + 2 * missing * inside * total / here
    return square + missing * squares / here + missing * (missing - 1) * between
