"""What a run recommends under each protocol: which terms its score has there, and their weights, tuned on validation.

| | ``excluded`` | ``kept_strict`` | ``kept_with_history_term`` |
|---|---|---|---|
| history bias | without effect | left out | as trained, with an offset that is tuned |
| own pairs of the item-kNN term | without effect | stay | taken off |
| an item in its own list of the content-kNN term | no | yes | no |
| rare-item term for items of the session | without effect | yes | no |
| blend weights tuned for | it alone | it alone | it alone |

Under ``kept_strict`` nothing in a score depends on whether an item was seen: it is a sum over the session of what each
of its items says about the candidate, whichever that is. Counts of an item with itself are not defined (as in published
item-kNN, whose matrix has a zero diagonal), and therefore not part of it.

Four systems share one pass through the network: ``model`` (network and terms), ``exported`` (the same with the weights
that the bundle has, which are tuned for the mean of ``excluded`` and ``kept_with_history_term``), ``network`` (with its
history bias under ``kept_with_history_term``, where the bias is part of the trained softmax) and ``terms`` (no network,
no training; under ``kept_with_history_term`` with a history bias that is tuned).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM, PROTOCOLS, Scored
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.score_terms import ScoreTerm, ScoreTerms
from missrec_t4r.ranking.hybrid import build_terms, terms_of, with_terms
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.history import HistoryBias
from missrec_t4r.ranking.tune import Validation, tune_terms

MODEL: Final = "model"
EXPORTED: Final = "exported"
NETWORK: Final = "network"
TERMS: Final = "terms"


class Blend(NamedTuple):
    """The score of one system under one protocol."""

    terms: ScoreTerms
    network: bool = True
    """False for a score without the network."""


class BlendScorer:
    """Scores of several systems of one model, from one pass through its network.

    Parameters
    ----------
    scorer : ModelScorer
    blends : mapping of str to mapping of str to Blend
        By system and protocol. Protocols with the same blend share a score.
    """

    def __init__(self, scorer: ModelScorer, blends: Mapping[str, Mapping[str, Blend]]) -> None:
        self.scorer, self.blends = scorer, blends

    def __call__(self, histories: Sessions) -> Iterator[Scored]:
        """Yield the scores of every system, one at a time."""
        parts = self.scorer.parts(histories)
        for system, by_protocol in self.blends.items():
            for blend in {id(blend): blend for blend in by_protocol.values()}.values():
                protocols = [protocol for protocol, other in by_protocol.items() if other is blend]
                yield Scored(system, protocols, self.scorer.combined(parts, blend.terms, network=blend.network))


def blends_of(
    model: MISSRec, validation: Validation, *, alone: bool = True
) -> tuple[dict[str, dict[str, Blend]], dict[str, Any]]:
    """Return the systems of a trained model under every protocol, with weights that are tuned on validation.

    Parameters
    ----------
    model : MISSRec
        Trained, with its terms as exported.
    validation : Validation
        Made for this model.
    alone : bool
        Also tune ``terms``, the terms without the network.

    Returns
    -------
    blends : dict of str to dict of str to Blend
    settings : dict
        ``{system: {protocol: …}}``: the chosen settings and their validation NDCG@10.
    """
    network = with_bias = Blend(ScoreTerms())
    if (trained := terms_of(model).history_bias) is not None:
        with_bias = Blend(ScoreTerms({"history_bias": _bias(model, trained)}))
    of_network = {EXCLUDED: network, KEPT_STRICT: network, KEPT_WITH_HISTORY_TERM: with_bias}
    blends, settings = {MODEL: of_network}, {MODEL: dict[str, Any]()}
    if model.config.n_neighbours or model.config.n_similar_items:
        blends[MODEL], settings[MODEL] = _tuned(model, validation, alone=False)
        exported = Blend(model.terms)
        blends[EXPORTED] = {EXCLUDED: exported, KEPT_WITH_HISTORY_TERM: exported}
    blends[NETWORK] = of_network
    if alone:
        blends[TERMS], settings[TERMS] = _tuned(model, validation, alone=True)
    return blends, settings


def _tuned(model: MISSRec, validation: Validation, *, alone: bool) -> tuple[dict[str, Blend], dict[str, Any]]:
    """Return blends with terms that are tuned for each protocol, and their settings; ``alone`` without the network."""
    blends, settings = {}, {}
    for protocol in PROTOCOLS:
        fresh = with_terms(model, _terms_for(model, protocol, alone=alone))
        settings[protocol] = tune_terms(fresh, validation, (protocol,), network=not alone, history=True)
        blends[protocol] = Blend(fresh.terms, network=not alone)
    return blends, settings


def _terms_for(model: MISSRec, protocol: str, *, alone: bool = False) -> dict[str, ScoreTerm]:
    """Return unfitted terms for a protocol.

    Parameters
    ----------
    protocol : str
        Under ``kept_with_history_term`` the model has its history bias, if it was trained with one, and terms alone
        have one that starts from nothing.
    alone : bool
        Terms without a network: all that need no training, with the model's list lengths, or the default ones if it has
        none.
    """
    trained, config = terms_of(model).history_bias, model.config
    has_bias = protocol == KEPT_WITH_HISTORY_TERM and (alone or trained is not None)
    if alone:
        config = replace(
            config,
            n_neighbours=config.n_neighbours or MISSRecConfig.n_neighbours,
            n_similar_items=config.n_similar_items or MISSRecConfig.n_similar_items,
            cold_start_exposure=0.0,
            rare_item_cost=0.0,
        )
    terms = build_terms(replace(config, history_bias=has_bias), model.item_encoder, strict=protocol == KEPT_STRICT)
    if has_bias:
        terms["history_bias"] = _bias(model, None if alone else trained)
    return {name: term.to(model.item_encoder.presence.device) for name, term in terms.items()}


def _bias(model: MISSRec, trained: HistoryBias | None) -> HistoryBias:
    """Return a history bias without the offset that was chosen for the exported terms, or one of nothing."""
    bias = HistoryBias(model.config.temperature)
    bias.bias.data.fill_(0.0 if trained is None else float(trained.bias.detach()))
    return bias.to(model.item_encoder.presence.device)
