"""The rare-item term is tuned on validation: rare items are found as by content-kNN, at a cost that is limited."""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, rank_catalogue
from missrec_t4r.evaluation.metrics import metrics
from missrec_t4r.evaluation.slices import slices
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.baselines import ContentKNN
from missrec_t4r.ranking.hybrid import build_missrec, terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import fit_terms
from tests import shop
from tests.settings import EVERY_PART

N_ITEMS, N_TWINNED, N_SESSIONS = 120, 10, 300
FIRST_RARE = 3 + N_ITEMS - 2 * N_TWINNED


def rare_shop() -> tuple[Catalogue, Sessions, Sessions, Sessions]:
    """Before the target comes a twinned item; in every third session the target is a rare item with the same content.

    Rare items have one event in training. All other sessions walk around a circle of items that have no twin.
    """
    rng = np.random.default_rng(0)
    known = rng.normal(size=(FIRST_RARE, 16))
    vectors = np.concatenate([known, np.repeat(known[3 : 3 + N_TWINNED], 2, axis=0)])
    vectors += 0.1 * rng.normal(size=vectors.shape)
    rest, lists = np.arange(3 + N_TWINNED, FIRST_RARE), []
    for user in range(N_SESSIONS):
        start = int(rng.integers(len(rest)))
        session = [int(row) for row in np.roll(rest, -start)[:7]]
        twinned = int(rng.integers(N_TWINNED))
        session[4] = 3 + twinned
        if user % 3 == 0:
            session[5:] = [FIRST_RARE + 2 * twinned, FIRST_RARE + 2 * twinned + 1]
        lists.append(session)
    train = [session[:5] for session in lists] + [[3, row] for row in range(FIRST_RARE, 3 + N_ITEMS)]
    modalities = {"text": shop.modality(vectors, name="made")}
    catalogue = shop.make_catalogue([f"P{i}" for i in range(N_ITEMS)], modalities, shop.counts_of(train, N_ITEMS))
    valid, test = [session[:6] for session in lists], [session[:5] + session[6:] for session in lists]
    return catalogue, Sessions.from_lists(train), Sessions.from_lists(valid), Sessions.from_lists(test)


class Fitted(NamedTuple):
    """A tuned model, and NDCG@10 on the test split under ``excluded``."""

    model: MISSRec
    chosen: dict[str, Any]
    all: float
    rare: float
    content_knn: float
    """Of rare targets."""


@functools.cache
def fitted(cost: float) -> Fitted:
    torch.manual_seed(0)
    catalogue, train, valid, test = rare_shop()
    config = MISSRecConfig(**EVERY_PART, d_model=16, n_head=2, item_ids=False, rare_item_cost=cost)
    model = build_missrec(config, catalogue).eval()
    model.discover_interests(0)
    chosen = fit_terms(model, catalogue, train, valid).get("rare_items", {})
    histories, targets = test.split_last()
    rare = slices(histories, targets, catalogue)["rare"]
    scorers = {"model": ModelScorer.with_popularity(model, catalogue), "content_knn": ContentKNN.fit(catalogue)}
    ranks = {
        name: rank_catalogue(scorer, histories, targets, catalogue.n_rows, protocols=(EXCLUDED,)).ranks[EXCLUDED]
        for name, scorer in scorers.items()
    }
    parts = ranks["model"], ranks["model"][rare], ranks["content_knn"][rare]
    return Fitted(model, chosen, *(metrics(part, (10,))["ndcg@10"] for part in parts))


def test_rare_items_are_found_as_by_content_knn_and_the_others_pay_no_more_than_the_cost() -> None:
    without, found = fitted(0.0), fitted(0.05)
    assert without.rare < 0.7 * without.content_knn, "content-kNN is ahead without the term"
    assert found.rare >= found.content_knn
    assert found.all >= 0.95 * without.all
    assert found.chosen["valid"]["overall"] >= 0.95 * found.chosen["valid_without"]["overall"]


def test_what_costs_too_much_is_not_done() -> None:
    chosen = fitted(0.001).chosen
    assert chosen["valid"]["overall"] >= 0.999 * chosen["valid_without"]["overall"]
    assert fitted(0.05).chosen["valid"]["overall"] < 0.999 * chosen["valid_without"]["overall"]
    assert chosen["valid_without"]["rare"] <= chosen["valid"]["rare"] < fitted(0.05).chosen["valid"]["rare"]


def test_the_search_measures_what_the_model_then_ranks() -> None:
    """NDCG@10 on validation as the evaluator finds it for the tuned model; no target is cold here."""
    model, chosen = fitted(0.05)[:2]
    catalogue, _, valid, _ = rare_shop()
    histories, targets = valid.split_last()
    rare = slices(histories, targets, catalogue)["rare"]
    scorer, protocols = ModelScorer.with_popularity(model, catalogue), (KEPT_WITH_HISTORY_TERM, EXCLUDED)
    ranks = rank_catalogue(scorer, histories, targets, catalogue.n_rows, protocols=protocols).ranks
    for name, part in (("overall", np.ones_like(rare)), ("rare", rare)):
        mean = np.mean([metrics(ranks[protocol][part], (10,))["ndcg@10"] for protocol in protocols])
        assert chosen["valid"][name] == pytest.approx(float(mean), abs=1e-6)


def test_without_rare_targets_the_term_stays_off() -> None:
    catalogue, train, valid, _ = rare_shop()
    model = build_missrec(MISSRecConfig(**EVERY_PART, d_model=16, n_head=2, item_ids=False), catalogue).eval()
    model.discover_interests(0)
    frequent = valid.take(np.flatnonzero(valid.split_last()[1] < FIRST_RARE))
    assert fit_terms(model, catalogue, train, frequent)["rare_items"] == {}
    assert not terms_of(model).rare_items.active
