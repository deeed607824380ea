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
from typing import Any, Final, NamedTuple

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM, PROTOCOLS, Scored
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.score_terms import ScoreTerm, ScoreTerms
from missrec_t4r.ranking.hybrid import terms_of, with_terms
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.cold_start import ColdStartTerm
from missrec_t4r.ranking.terms.content_knn import ContentKNNTerm
from missrec_t4r.ranking.terms.history import HistoryBias
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.ranking.terms.rare_items import RareItemTerm
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


Blends = Mapping[str, Mapping[str, Blend]]
"""System to protocol to blend."""


class BlendScorer:
    """Scores of several systems of one model, from one pass through its network.

    Parameters
    ----------
    scorer : ModelScorer
    blends : mapping of str to mapping of str to Blend
        By system and protocol. Protocols with the same blend share a score.
    """

    def __init__(self, scorer: ModelScorer, blends: Blends) -> None:
        self.scorer, self.blends = scorer, blends

    def __call__(self, histories: Sessions) -> Iterator[Scored]:
        """Yield the scores of every system, one at a time."""
        parts = self.scorer.parts(histories)
        for system, of in self.blends.items():
            for blend in {id(blend): blend for blend in of.values()}.values():
                protocols = [protocol for protocol, one in of.items() if one is blend]
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
    nothing = Blend(ScoreTerms())
    exported, own = Blend(model.terms), terms_of(model)
    trained = own.history_bias
    biased = nothing if trained is None else Blend(ScoreTerms({"history_bias": _as_trained(model, trained)}))
    blends: dict[str, dict[str, Blend]] = {
        MODEL: {},
        NETWORK: {EXCLUDED: nothing, KEPT_STRICT: nothing, KEPT_WITH_HISTORY_TERM: biased},
    }
    settings: dict[str, Any] = {MODEL: {}}
    if model.config.n_neighbours or model.config.n_similar_items:
        blends[EXPORTED] = {EXCLUDED: exported, KEPT_WITH_HISTORY_TERM: exported}
        for protocol in PROTOCOLS:
            fresh = with_terms(model, _terms_for(model, model.config, protocol))
            settings[MODEL][protocol] = tune_terms(fresh, validation, (protocol,), history=True)
            blends[MODEL][protocol] = Blend(fresh.terms)
    else:
        blends[MODEL] = blends[NETWORK]
    if alone:
        blends[TERMS], settings[TERMS] = {}, {}
        for protocol in PROTOCOLS:
            fresh = with_terms(model, _terms_for(model, None, protocol))
            settings[TERMS][protocol] = tune_terms(fresh, validation, (protocol,), network=False, history=True)
            blends[TERMS][protocol] = Blend(fresh.terms, network=False)
    order = [name for name in (MODEL, EXPORTED, NETWORK, TERMS) if name in blends]
    return {name: {p: blends[name][p] for p in PROTOCOLS if p in blends[name]} for name in order}, settings


def _terms_for(model: MISSRec, config: MISSRecConfig | None, protocol: str) -> dict[str, ScoreTerm]:
    """Return unfitted terms for a protocol.

    Parameters
    ----------
    config : MISSRecConfig or None
        Which terms, and how long their lists are. None for terms without a network: all that need no training, with the
        model's list lengths, or the default ones if it has none.
    protocol : str
        Under ``kept_with_history_term`` the model has its history bias, if it was trained with one, and terms alone
        have one that starts from nothing.
    """
    n_rows, device = model.item_encoder.n_rows, model.item_encoder.presence.device
    is_strict, alone, default = protocol == KEPT_STRICT, config is None, MISSRecConfig()
    config = config or model.config
    neighbours = config.n_neighbours or (default.n_neighbours if alone else 0)
    similar = config.n_similar_items or (default.n_similar_items if alone else 0)
    terms: dict[str, ScoreTerm] = {}
    trained = terms_of(model).history_bias
    if protocol == KEPT_WITH_HISTORY_TERM and (alone or trained is not None):
        bias = HistoryBias(config.temperature)
        bias.bias.data.zero_()
        terms["history_bias"] = bias if alone or trained is None else _as_trained(model, trained)
    if neighbours:
        item_knn = terms["item_knn"] = ItemKNNTerm(n_rows, min(neighbours, n_rows), own_pairs=is_strict)
    if similar:
        terms["content_knn"] = ContentKNNTerm(n_rows, min(similar, n_rows), itself=is_strict)
    if neighbours and config.cold_start_exposure and not alone:
        terms["cold_start"] = ColdStartTerm(model.item_encoder, item_knn)
    if neighbours and config.rare_item_cost and not alone:
        cold = not config.cold_start_exposure
        terms["rare_items"] = RareItemTerm(model.item_encoder, item_knn, cold=cold, itself=is_strict)
    return {name: term.to(device) for name, term in terms.items()}


def _as_trained(model: MISSRec, trained: HistoryBias) -> HistoryBias:
    """Return the history bias without the offset that was chosen for the exported terms."""
    bias = HistoryBias(model.config.temperature)
    bias.bias.data.fill_(float(trained.bias.detach()))
    return bias.to(trained.bias.device)
