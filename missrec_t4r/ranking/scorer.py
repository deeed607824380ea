"""A MISSRec model as a `Scorer`: the catalogue's embeddings once, then one batch of sessions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import Scorer
from missrec_t4r.model.missrec import MISSRec


class ModelScorer:
    """Score the catalogue with a model's current weights, in evaluation mode and without gradients.

    The catalogue's embeddings are computed here, once: make a new scorer after every training step. The model keeps its
    mode (training or evaluation).

    Parameters
    ----------
    model : MISSRec
        On any device; scores are returned on it.
    fallback : Scorer
        Scores the sessions without a known item, as serving does with its popularity list.
    """

    def __init__(self, model: MISSRec, fallback: Scorer) -> None:
        self.model, self.fallback = model, fallback
        self.device = next(model.parameters()).device
        with _evaluating(model):
            self.candidates = model.candidates()

    @classmethod
    def with_popularity(cls, model: MISSRec, catalogue: Catalogue) -> ModelScorer:
        """Use the fallback of serving, the items by their training count."""
        from missrec_t4r.ranking.baselines import Popularity

        return cls(model, Popularity.fit(catalogue))

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row], -inf where the model cannot recommend the row."""
        everyone, length = range(len(histories)), self.model.config.max_sequence_length
        item_ids = torch.from_numpy(histories.padded(everyone, length)).to(self.device)
        event_features = {
            name: torch.from_numpy(values).to(self.device)
            for name, values in histories.padded_features(everyone, length).items()
        }
        with _evaluating(self.model):
            scores = self.model.score(self.model(item_ids, event_features), self.candidates, item_ids)
        empty = torch.from_numpy(histories.lengths == 0).to(self.device)
        if not empty.any():
            return scores
        popular = self.fallback(histories).to(scores)
        return torch.where(empty[:, None], popular.masked_fill(~self.model.recommendable, -torch.inf), scores)


@contextmanager
def _evaluating(model: MISSRec) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
