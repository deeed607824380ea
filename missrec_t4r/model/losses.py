"""Training objectives: next-item cross-entropy (E13) and the orthogonality of interests (E14, E15)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.config.model import Orthogonality
from missrec_t4r.model.release import faithful_orthogonality


def next_item_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    counts: Tensor | None = None,
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
    """
    targets, share = target_shares(logits, targets, weights, counts)
    wanted = logits.gather(1, targets)  # [position, target]
    lost = torch.logsumexp(logits, 1, keepdim=True) - wanted
    return (lost.masked_fill(share == 0, 0.0) * share).sum()


def target_shares(
    logits: Tensor, targets: Tensor, weights: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the targets [position, target] and what each contributes to the mean, 0 where there is none."""
    targets = targets.unsqueeze(1) if targets.ndim == 1 else targets
    real = (targets > 0) & ~logits.gather(1, targets).isneginf()
    share = real / (real.sum(0) if counts is None else counts).clamp_min(1).to(logits.dtype)
    return targets, share if weights is None else share * weights


def orthogonality_loss(
    memory: Tensor,
    mask: Tensor,
    kind: Orthogonality,
    *,
    sessions: Tensor | None = None,
    n_slots: int | Tensor | None = None,
    expected: bool = True,
) -> Tensor:
    """Return the regulariser that drives a session's interests apart.

    Parameters
    ----------
    memory : Tensor [batch, interest, dim]
        Output of the contextual encoder.
    mask : Tensor [batch, interest], bool
    kind : {"cosine", "faithful"}
        ``cosine`` (ours): mean squared cosine between different interests of a session, averaged over the sessions that
        have two. ``faithful``: as published, `missrec_t4r.model.release.faithful_orthogonality`.
    sessions : Tensor, optional
        Number of sessions with two interests to average over, where these are a part of a larger batch.
    n_slots : int or Tensor, optional
    expected : bool
        Both of ``faithful``.
    """
    if kind == "faithful":
        return faithful_orthogonality(memory, mask, n_slots, expected=expected)
    unit = F.normalize(memory, dim=-1) * mask.unsqueeze(-1).to(memory.dtype)
    cosine = unit @ unit.transpose(1, 2)  # [batch, interest, interest]
    count = mask.sum(1).to(memory.dtype)
    pairs = count * (count - 1)  # [batch]
    off_diagonal = cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)  # [batch]
    has_pairs = pairs > 0
    per_session = torch.where(has_pairs, off_diagonal / pairs.clamp_min(1), 0.0)
    return per_session.sum() / (has_pairs.sum() if sessions is None else sessions).clamp_min(1)
