"""The ranker that is trained and served: MISSRec and the score terms of this package, built from one configuration.

    score(s, j) = MISSRec(s, j) + history bias + item-kNN + content-kNN + cold start + rare items

A term that the configuration does not have is not built; the published configuration has none. The history bias is
trained with the network, the others are counted from the training split afterwards and weighed on validation
(`missrec_t4r.ranking.tune`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.model.build import build_network
from missrec_t4r.model.item_encoder import ItemEncoder
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.score_terms import ScoreTerm, ScoreTerms
from missrec_t4r.ranking.terms.cold_start import ColdStartTerm
from missrec_t4r.ranking.terms.content_knn import ContentKNNTerm
from missrec_t4r.ranking.terms.history import HistoryBias
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.ranking.terms.rare_items import RareItemTerm


class Terms(NamedTuple):
    """The score terms of a model; None for those that it was built without."""

    history_bias: HistoryBias | None = None
    item_knn: ItemKNNTerm | None = None
    content_knn: ContentKNNTerm | None = None
    cold_start: ColdStartTerm | None = None
    rare_items: RareItemTerm | None = None


def terms_of(model: MISSRec) -> Terms:
    """Return the score terms that a model was built with."""
    known = {name: term for name, term in model.terms.items() if name in Terms._fields}
    return Terms(**cast("dict[str, None]", known))


def with_terms(model: MISSRec, terms: Mapping[str, ScoreTerm]) -> MISSRec:
    """Return a model with the same network, which is not copied, and other terms."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.terms = ScoreTerms(dict(terms))
    return other


def build_missrec(config: MISSRecConfig, catalogue: Catalogue, event_features: Sequence[EventColumn] = ()) -> MISSRec:
    """Build network and score terms for a catalogue.

    Parameters
    ----------
    config : MISSRecConfig
    catalogue : Catalogue
    event_features : sequence of EventColumn
        The fitted event features (`missrec_t4r.data.event_features.fit_event_columns`); none by default.

    Raises
    ------
    DataError
        The catalogue has no modality.
    """
    model = build_network(config, catalogue, event_features)
    model.terms.update(build_terms(config, model.item_encoder))
    return model


def build_terms(config: MISSRecConfig, item_encoder: ItemEncoder, *, strict: bool = False) -> dict[str, ScoreTerm]:
    """Return the configuration's terms by name, in the order in which they are added.

    ``strict``: in the form that does not know which items were seen, for the protocol ``kept_strict``.
    """
    n_rows, terms = item_encoder.n_rows, dict[str, ScoreTerm]()
    if config.history_bias:
        terms["history_bias"] = HistoryBias(config.temperature)
    if config.n_neighbours:
        item_knn = terms["item_knn"] = ItemKNNTerm(n_rows, min(config.n_neighbours, n_rows), own_pairs=strict)
    if config.n_similar_items:
        terms["content_knn"] = ContentKNNTerm(n_rows, min(config.n_similar_items, n_rows), itself=strict)
    if config.n_neighbours and config.cold_start_exposure:
        terms["cold_start"] = ColdStartTerm(item_encoder, item_knn)
    if config.n_neighbours and config.rare_item_cost:
        cold = not config.cold_start_exposure
        terms["rare_items"] = RareItemTerm(item_encoder, item_knn, cold=cold, itself=strict)
    return terms
