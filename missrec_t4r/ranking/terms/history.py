"""History bias: one learned number that is added to the score of the items that are already in the session (ours).

Only about 1 % of the targets repeat an item of the session, which neither the published softmax nor its cosine scores
can express. The only term that is trained with the network. Its effect: docs/experiments.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.model.score_terms import ScoreTerm
from missrec_t4r.schema import UNKNOWN_ROW

_INITIAL_LOGIT = -3.0
"""Items of the history start as unlikely as that: the optimum is near -4, and from -2 learning is slow."""


class HistoryBias(ScoreTerm):
    """``history(s, j) = bias + offset`` for the items j of session s, 0 for all others.

    Training learns the bias for the network without the other terms, which lift what was seen again; the offset is
    chosen on validation with them (`missrec_t4r.ranking.tune`) and is no part of training.

    Parameters
    ----------
    temperature : float
        Of the softmax: the bias is in score units and starts at -3 logits.
    """

    in_training = True
    offset: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(_INITIAL_LOGIT * temperature))
        self.register_buffer("offset", torch.zeros(()))

    def add_to(self, scores: Tensor, item_ids: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Add the bias in place: it changes a few scores of [batch, catalogue]."""
        bias = self.bias if self.training else self.bias + self.offset
        return scores.scatter_add_(1, item_ids, bias * first_occurrences(item_ids).to(scores.dtype))

    def add_to_rows(self, scores: Tensor, rows: Tensor, item_ids: Tensor) -> Tensor:
        """Add the bias in place where an item of the history is among ``rows``."""
        column = torch.searchsorted(rows, item_ids).clamp_max(len(rows) - 1)
        inside = first_occurrences(item_ids) & (rows[column] == item_ids)
        return scores.scatter_add_(1, column, self.bias * inside.to(scores.dtype))


def recency(item_ids: Tensor, decay: Tensor | float) -> Tensor:
    """Return ``decay ** age`` [batch, seq] of the known items, the last of which has age 0, and 0 for all others."""
    known = item_ids > UNKNOWN_ROW
    return decay ** (known.sum(1, keepdim=True) - known.cumsum(1)) * known


def first_occurrences(item_ids: Tensor) -> Tensor:
    """Return [batch, seq], True where an item stands in its row for the first time; an item counts once in a session.

    Examples
    --------
    >>> first_occurrences(torch.tensor([[5, 7, 5, 0, 0]])).tolist()
    [[True, True, False, True, False]]
    """
    ordered, order = item_ids.sort(dim=1, stable=True)
    first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    return torch.empty_like(first).scatter_(1, order, first)
