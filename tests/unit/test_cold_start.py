"""The cold-start term is tuned on warm items that are treated as cold."""

from pathlib import Path

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import exclude_seen, rank_catalogue
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec, terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import fit_terms
from missrec_t4r.ranking.tune_cold_start import _bias, _exposure
from tests import shop
from tests.settings import EVERY_PART

N_KINDS, PER_KIND, N_COLD = 8, 30, 16
N_ITEMS = N_KINDS * PER_KIND


def kind_of(rows: np.ndarray) -> np.ndarray:
    return (rows - 3) % N_KINDS


def kinds_shop() -> tuple[Catalogue, Sessions, Sessions, Sessions]:
    """Users stay with one kind of item, which the vectors encode; the last rows are cold items, targets of the test."""
    rng = np.random.default_rng(0)
    rows = np.arange(N_ITEMS + 3)
    vectors = rng.normal(size=(N_KINDS, 16))[kind_of(rows)] + 0.3 * rng.normal(size=(len(rows), 16))
    lists = []
    for _ in range(900):
        own = rows[3:][kind_of(rows[3:]) == rng.integers(N_KINDS)]
        lists.append([int(row) for row in rng.choice(own[own < N_ITEMS + 3 - N_COLD], 6, replace=False)])
    train, valid = [session[:5] for session in lists], Sessions.from_lists(lists)
    cold = rows[-N_COLD:]
    test = [[*session[:5], rng.choice(cold[kind_of(cold) == kind_of(session[0])])] for session in lists[:400]]
    modalities = {"text": shop.modality(vectors, name="made")}
    catalogue = shop.make_catalogue([f"P{i}" for i in range(N_ITEMS)], modalities, shop.counts_of(train, N_ITEMS))
    return catalogue, Sessions.from_lists(train), valid, Sessions.from_lists(test)


def fitted(exposure: float, history: float | None = None) -> tuple[MISSRec, Catalogue, Sessions]:
    torch.manual_seed(0)
    catalogue, train, valid, test = kinds_shop()
    config = MISSRecConfig(**EVERY_PART, d_model=16, n_head=2, item_ids=False, cold_start_exposure=exposure)
    model = build_missrec(config, catalogue)
    model.discover_interests(0)
    if history is not None:
        terms_of(model).history_bias.bias.data.fill_(history)
    found = fit_terms(model.eval(), catalogue, train, valid)
    assert ("cold_start" in found) == (exposure > 0)
    return model, catalogue, test


@pytest.mark.parametrize("exposure", [0.0, 1.0])
def test_cold_items_are_recommended_where_similar_warm_items_are(exposure: float) -> None:
    model, catalogue, test = fitted(exposure)
    histories, targets = test.split_last()
    ranked = rank_catalogue(ModelScorer.with_popularity(model, catalogue), histories, targets, catalogue.n_rows)
    recall = float((ranked.ranks["excluded"] <= 10).mean())
    assert recall < 0.1 if exposure == 0 else recall > 0.25, recall


def test_cold_items_take_the_exposure_that_they_deserve() -> None:
    """Their share of the lists without seen items, which come first here, is their share of the catalogue."""
    model, catalogue, _ = fitted(1.0, history=10.0)
    histories, _ = kinds_shop()[2].split_last()
    scores = exclude_seen(ModelScorer.with_popularity(model, catalogue)(histories), histories)
    shown = scores.topk(10, dim=1).indices >= N_ITEMS + 3 - N_COLD
    assert float(shown.float().mean()) == pytest.approx(N_COLD / N_ITEMS, rel=0.3)


def test_the_bias_gives_the_target_exposure() -> None:
    torch.manual_seed(0)
    best, top = (
        torch.randn(500, 10).sort(1, descending=True).values,
        torch.randn(500, 10).sort(1, descending=True).values,
    )
    for share in (0.02, 0.1, 0.5):
        assert _exposure(best, top + _bias(best, top, share)) == pytest.approx(share, abs=2e-3)


def test_too_few_targets_switch_the_term_off(data: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    train, valid = Sessions.load(data / "train"), Sessions.load(data / "valid")
    model = build_missrec(MISSRecConfig(**EVERY_PART, d_model=16, n_head=2, cold_start_exposure=1.0), catalogue).eval()
    assert fit_terms(model, catalogue, train, valid)["cold_start"] == {}
    assert not terms_of(model).cold_start.settings.any()
