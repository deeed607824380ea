"""A MISSRec model as a `Scorer`: the catalogue's embeddings once, then one batch of sessions at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, PROTOCOLS, Scorer
from missrec_t4r.model.missrec import MISSRec, evaluating
from missrec_t4r.model.score_terms import ScoreTerms
from missrec_t4r.ranking.baselines import Popularity


class Parts(NamedTuple):
    """The network's scores of a batch of sessions, and what `ModelScorer.combined` adds the score terms with."""

    item_ids: Tensor
    """[batch, seq]: the most recent items, padded with 0 on the right."""
    network: Tensor
    """[batch, row]: scores of the network, before any term."""
    popular: Tensor | None
    """[batch, row]: scores for the sessions without a known item; None where every session has one."""
    empty: Tensor
    """[batch], bool: True for sessions without a known item."""


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
        with evaluating(model):
            self.candidates = model.candidates()

    @classmethod
    def with_popularity(cls, model: MISSRec, catalogue: Catalogue) -> ModelScorer:
        """Use the fallback of serving, the items by their training count."""
        return cls(model, Popularity.fit(catalogue))

    @property
    def protocols(self) -> Sequence[str]:
        """The protocols under which the model can be ranked as it is."""
        return protocols_as_it_is(self.model)

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row], -inf where the model cannot recommend the row."""
        return self.combined(self.parts(histories), self.model.terms)

    def parts(self, histories: Sessions) -> Parts:
        """Return the network's scores and what else the scores of these sessions need; the costly half of a score."""
        everyone, length = range(len(histories)), self.model.config.max_sequence_length
        item_ids = torch.from_numpy(histories.padded(everyone, length)).to(self.device)
        event_features = {
            name: torch.from_numpy(values).to(self.device)
            for name, values in histories.padded_features(everyone, length).items()
        }
        with evaluating(self.model):
            network = self.model.fusion(self.model(item_ids, event_features), self.candidates)
        empty = torch.from_numpy(histories.lengths == 0).to(self.device)
        return Parts(item_ids, network, self.fallback(histories).to(network) if empty.any() else None, empty)

    def combined(self, parts: Parts, terms: ScoreTerms, *, network: bool = True) -> Tensor:
        """Return the network's scores plus those of the terms, [batch, row].

        Parameters
        ----------
        parts : Parts
            Not changed, so that several sets of terms can be added to them.
        terms : ScoreTerms
            Those of the model, or others.
        network : bool
            False returns the terms alone.
        """
        own = parts.network.clone() if network else torch.zeros_like(parts.network)  # terms may write in place
        excluded = self.model.excluded
        with evaluating(terms):
            scores = terms(own, parts.item_ids).index_fill_(1, excluded, -torch.inf)
        if parts.popular is None:
            return scores
        return torch.where(parts.empty[:, None], parts.popular.index_fill(1, excluded, -torch.inf), scores)


def protocols_as_it_is(model: MISSRec) -> Sequence[str]:
    """Return the protocols under which a model can be ranked as it is.

    Not ``kept_strict`` with score terms: they depend on whether an item is in the session.
    """
    has_terms = next(model.terms.in_use(training=False), None) is not None
    return (EXCLUDED, KEPT_WITH_HISTORY_TERM) if has_terms else PROTOCOLS
