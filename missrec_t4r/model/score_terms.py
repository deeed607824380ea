"""Score terms: what is added to the network's score, by parts that the model receives and calls by this interface.

    score(s, j) = network(s, j) + sum of the active terms(s, j)

The published model has no term. Those of this package (history bias, item-kNN, content-kNN, cold start,
rare items) and the function that builds them are in `missrec_t4r.ranking`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn


class ScoreTerm(nn.Module):
    """One summand of the score.

    A subclass has ``fit`` (statistics of the training split), ``settings`` (what validation chooses) and either
    ``forward`` or ``add_to``.
    """

    in_training = False
    """Whether the training softmax has the term as well; such a term needs `add_to_rows`."""

    def __init__(self) -> None:
        super().__init__()
        self._is_on = True  # not read from tensors: a trace would warn of it, and a GPU would wait
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]  # torch has no types here

    @property
    def active(self) -> bool:
        """Whether the term can change a score."""
        return self._is_on

    def forward(self, item_ids: Tensor) -> Tensor:
        """Return what sessions ``item_ids`` [batch, seq] add to every score, [batch, catalogue]."""
        raise NotImplementedError

    def add_to(self, scores: Tensor, item_ids: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Return scores plus term.

        Parameters
        ----------
        scores : Tensor [batch, catalogue]
            May be overwritten.
        item_ids : Tensor [batch, seq], int64
            Items of the sessions, 0 for none.
        earlier : dict of str to Tensor [batch, catalogue]
            What the terms before this one added, by name; the term writes its own result there if others need it.
        """
        del earlier
        return scores + self(item_ids)

    def add_to_rows(self, scores: Tensor, rows: Tensor, item_ids: Tensor) -> Tensor:
        """Return the scores [batch, item] of the catalogue rows ``rows`` [item], ascending, plus term."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Recompute what is derived from weights; called when weights have been loaded."""


class ScoreTerms(nn.ModuleDict):
    """Terms by name, added in this order."""

    def in_use(self, *, training: bool) -> Iterator[ScoreTerm]:
        """Yield the active terms; in training those of the training softmax alone."""
        for term in cast("Iterator[ScoreTerm]", self.values()):
            if (term.in_training or not training) and term.active:
                yield term

    def forward(self, scores: Tensor, item_ids: Tensor) -> Tensor:
        """Return scores [batch, catalogue] plus all terms in use."""
        earlier: dict[str, Tensor] = {}
        for term in self.in_use(training=self.training):
            scores = term.add_to(scores, item_ids, earlier)
        return scores

    def add_to_rows(self, scores: Tensor, rows: Tensor, item_ids: Tensor) -> Tensor:
        """Return the scores [batch, item] of some catalogue rows plus the terms of the training softmax."""
        for term in self.in_use(training=True):
            scores = term.add_to_rows(scores, rows, item_ids)
        return scores

    def refresh(self) -> None:
        """Let every term recompute what is derived from weights."""
        for term in cast("Iterator[ScoreTerm]", self.values()):
            term.refresh()


def _refresh(term: Any, _: Any) -> None:
    """Hook after `torch.nn.Module.load_state_dict`."""
    term.refresh()
