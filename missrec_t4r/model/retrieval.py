"""Exact top-k with a fixed order: score descending, ties by ascending row.

`torch.topk` leaves the order of equal scores, and which of them make the cut, to chance; two servers with the same
bundle would answer differently.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best columns of every line.

    Parameters
    ----------
    scores : Tensor [batch, catalogue]
        No NaN; -inf marks what cannot be recommended and comes last.
    k : int
        At most ``catalogue`` columns are returned.

    Returns
    -------
    scores : Tensor [batch, k]
        Descending.
    rows : Tensor [batch, k], int64
        Their columns; equal scores in ascending order.

    Examples
    --------
    >>> top_items(torch.tensor([[0.5, 0.9, 0.5, 0.5]]), 3)[1].tolist()
    [[1, 0, 2]]
    """
    k = min(k, scores.shape[1])
    if k < 1:
        return scores[:, :0], torch.zeros(len(scores), 0, dtype=torch.int64, device=scores.device)
    rows = scores.topk(k, dim=1).indices.sort(dim=1).values  # ascending rows first, so that a stable sort keeps them
    best, order = scores.gather(1, rows).sort(dim=1, descending=True, stable=True)
    rows = rows.gather(1, order)
    crowded = (scores >= best[:, -1:]).sum(1) > k  # more items share the last place than fit: take the lowest rows
    if bool(crowded.any()):
        whole, columns = scores[crowded].sort(dim=1, descending=True, stable=True)
        best[crowded], rows[crowded] = whole[:, :k], columns[:, :k]
    return best, rows
