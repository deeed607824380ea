"""Training objectives (specification 7)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.config import Orthogonality


def next_item_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
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
    """
    if targets.ndim == 1:
        targets = targets.unsqueeze(1)
    normaliser, chosen = logits.logsumexp(1, keepdim=True), logits.gather(1, targets)
    real = (targets > 0) & ~chosen.isneginf()
    loss = (normaliser - chosen).masked_fill(~real, 0.0)
    per_column = loss.sum(0) / real.sum(0).clamp_min(1)
    return per_column.sum() if weights is None else (per_column * weights).sum()


def orthogonality_loss(memory: Tensor, mask: Tensor, kind: Orthogonality) -> Tensor:
    """Return the regulariser that asks a session's interests to differ.

    Parameters
    ----------
    memory : Tensor [batch, interest, dim]
        Output of the contextual encoder.
    mask : Tensor [batch, interest], bool
    kind : {"cosine", "faithful"}
        ``cosine`` (ours): mean squared cosine between different interests of a session, averaged over the sessions that
        have two. ``faithful``: the published ``sum(u * u) / dim`` with u the sum of a session's memory times the share
        of its places that are real; it depends on padding and on batch size, alone among our losses.
    """
    weight = mask.unsqueeze(-1).to(memory.dtype)
    if kind == "faithful":
        weighted_sum = (memory * weight).sum(1) * weight.mean(1)
        return weighted_sum.square().sum() / memory.shape[-1]
    unit = F.normalize(memory, dim=-1) * weight
    cosine = unit @ unit.transpose(1, 2)
    count = mask.sum(1).to(memory.dtype)
    pairs = count * (count - 1)
    off_diagonal = cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)
    has_pairs = pairs > 0
    per_session = torch.where(has_pairs, off_diagonal / pairs.clamp_min(1), 0.0)
    return per_session.sum() / has_pairs.sum().clamp_min(1)
