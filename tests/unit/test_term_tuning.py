"""Tuning of the score terms, on shops whose right settings are known."""

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, quick_metrics
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking import tune
from missrec_t4r.ranking.hybrid import build_missrec, terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.ranking.tune import fit_terms
from missrec_t4r.schema import FIRST_ITEM_ROW
from tests import shop

N_ITEMS, LENGTH = 40, 4
SERVED = (KEPT_WITH_HISTORY_TERM, EXCLUDED)
FORWARDS = shop.circle(N_ITEMS, 80, LENGTH + 1)


def made(vectors: np.ndarray | None = None, **terms: int) -> tuple[MISSRec, Catalogue]:
    """Return an untrained model, whose own ranking says nothing, and its catalogue."""
    torch.manual_seed(0)
    names = [f"P{i}" for i in range(N_ITEMS)]
    modalities = shop.random_modalities(N_ITEMS, {"text": 8}, seed=0)
    if vectors is not None:
        modalities = {"text": shop.modality(np.concatenate([np.zeros((FIRST_ITEM_ROW, 8)), vectors]), name="made")}
    catalogue = shop.make_catalogue(names, modalities, np.full(N_ITEMS, 8))
    model = build_missrec(shop.default(**({"n_neighbours": 0, "n_similar_items": 0} | terms)), catalogue)
    model.discover_interests(0)
    return model.eval(), catalogue


def mean_ndcg(model: MISSRec, catalogue: Catalogue, valid: Sequence[Sequence[int]]) -> float:
    """Return the evaluator's NDCG@10, the mean over both ways of serving."""
    scorer = ModelScorer.with_popularity(model, catalogue)
    measured = quick_metrics(scorer, Sessions.from_lists(valid), catalogue.n_rows, protocols=SERVED)
    return float(np.mean([measured[protocol]["ndcg@10"] for protocol in SERVED]))


@pytest.mark.parametrize("directed", [True, False])
def test_the_better_way_of_counting_is_kept(directed: bool) -> None:
    """After b comes c, and a came before it: the order tells c from a where training has it, and hides c otherwise."""
    triples = [[row, row + 1, row + 2] for row in range(FIRST_ITEM_ROW, FIRST_ITEM_ROW + N_ITEMS - 2, 3)]
    train = [triple if directed else triple[::-1] for triple in triples * 3]
    model, catalogue = made(n_neighbours=8)
    found = fit_terms(model, catalogue, Sessions.from_lists(train), Sessions.from_lists([b_c for _, *b_c in triples]))
    assert found["item_knn"]["directed"] == directed
    assert found["item_knn"]["window"] == (5 if directed else shop.SMALL["max_sequence_length"])
    assert found["valid_ndcg@10"] > (0.85 if directed else 0.6) > 0.3 > found["valid_ndcg@10_without_terms"]
    term = terms_of(model).item_knn
    assert term is not None
    b = FIRST_ITEM_ROW + 1
    counted = dict(zip(term.neighbours[b].tolist(), term.counts[b].tolist(), strict=True))
    assert (counted.get(b + 1), counted.get(b - 1)) == ((3, None) if directed else (3, 3))


@functools.cache
def twins() -> np.ndarray:
    """Return content in which items 2 i and 2 i + 1 are nearly the same."""
    rng = np.random.default_rng(3)
    return np.repeat(rng.normal(size=(N_ITEMS // 2, 8)), 2, axis=0) + 0.05 * rng.normal(size=(N_ITEMS, 8))


def to_twin(row: int) -> int:
    return FIRST_ITEM_ROW + ((row - FIRST_ITEM_ROW) ^ 1)


def test_the_content_term_is_strong_where_content_tells_the_target_and_off_where_it_misleads() -> None:
    rows = np.arange(N_ITEMS) + FIRST_ITEM_ROW
    centred = twins() - twins().mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    alike = [[int(row), to_twin(int(row))] for row in rows]
    unlike = [[int(row), int(rows[other])] for row, other in zip(rows, (unit @ unit.T).argmin(1), strict=True)]
    train = Sessions.from_lists(alike)
    model, catalogue = made(twins(), n_similar_items=3)
    found = fit_terms(model, catalogue, train, Sessions.from_lists(alike))
    assert found["content_knn"]["weight"] > 0
    assert found["valid_ndcg@10"] > 0.85 > 0.4 > found["valid_ndcg@10_without_terms"]
    assert mean_ndcg(model, catalogue, alike) == pytest.approx(found["valid_ndcg@10"], abs=1e-6)
    model, catalogue = made(twins(), n_similar_items=3)
    found = fit_terms(model, catalogue, train, Sessions.from_lists(unlike))
    assert found["content_knn"]["weight"] == 0
    terms_of(model).history_bias.offset.zero_()  # type: ignore[union-attr]  # the model has the term
    assert mean_ndcg(model, catalogue, unlike) == pytest.approx(found["valid_ndcg@10_without_terms"], abs=1e-6)


def test_the_item_knn_term_is_off_where_it_misleads() -> None:
    model, catalogue = made(n_neighbours=8)
    far = [[*session[:-1], (session[0] - FIRST_ITEM_ROW + 20) % N_ITEMS + FIRST_ITEM_ROW] for session in FORWARDS]
    found = fit_terms(model, catalogue, Sessions.from_lists(FORWARDS), Sessions.from_lists(far))
    assert found["item_knn"]["weight"] == 0
    assert not terms_of(model).item_knn.active  # type: ignore[union-attr]  # the model has the term


def test_terms_are_weighed_by_the_mean_of_both_protocols() -> None:
    """Some targets repeat an item of the session, so that the protocols differ; the evaluator finds the same means."""
    rng = np.random.default_rng(0)
    valid = [[*s[:-1], s[0] if rng.random() < 0.4 else int(rng.integers(3, 43))] for s in FORWARDS]
    model, catalogue = made(n_neighbours=8, n_similar_items=3)
    found = fit_terms(model, catalogue, Sessions.from_lists(FORWARDS), Sessions.from_lists(valid))
    scorer = ModelScorer.with_popularity(model, catalogue)
    measured = quick_metrics(scorer, Sessions.from_lists(valid), catalogue.n_rows, protocols=SERVED)
    assert measured[EXCLUDED]["ndcg@10"] != pytest.approx(measured[KEPT_WITH_HISTORY_TERM]["ndcg@10"], abs=0.01)
    assert mean_ndcg(model, catalogue, valid) == pytest.approx(found["valid_ndcg@10"], abs=1e-6)
    terms = terms_of(model)
    assert terms.item_knn is not None
    assert terms.content_knn is not None
    assert terms.history_bias is not None
    terms.history_bias.offset.zero_()
    terms.item_knn.choose(ItemKNNSettings(0.0, 1.0, 0.0))
    terms.content_knn.choose(ContentKNNSettings(0.0, 1.0))
    assert mean_ndcg(model, catalogue, valid) == pytest.approx(found["valid_ndcg@10_without_terms"], abs=1e-6)


def test_what_a_session_held_before_the_items_that_the_model_reads_is_excluded_too() -> None:
    """As in evaluation and serving."""
    rng, twice = np.random.default_rng(0), 2 * shop.SMALL["max_sequence_length"]
    valid = [(FIRST_ITEM_ROW + rng.permutation(N_ITEMS)[: twice + 1]).tolist() for _ in range(60)]
    model, catalogue = made(n_neighbours=8)
    found = fit_terms(model, catalogue, Sessions.from_lists(FORWARDS), Sessions.from_lists(valid))
    assert found["valid_ndcg@10"] == pytest.approx(mean_ndcg(model, catalogue, valid), abs=1e-6)


def test_the_history_bias_is_chosen_together_with_the_other_terms() -> None:
    """Item-kNN lifts what was seen again; the offset takes it back, and training keeps the bias that it learned."""
    model, catalogue = made(n_neighbours=8)
    history = terms_of(model).history_bias
    assert history is not None
    history.bias.data.fill_(1.0)  # what was seen comes first, and no target repeats
    found = fit_terms(model, catalogue, Sessions.from_lists(FORWARDS), Sessions.from_lists(FORWARDS))
    assert float(history.offset) < 0
    assert found["history_bias"] == pytest.approx(1.0 + float(history.offset))
    assert found["valid_ndcg@10"] == pytest.approx(mean_ndcg(model, catalogue, FORWARDS), abs=1e-6)
    scores, session = torch.zeros(1, catalogue.n_rows), torch.tensor([[3]])
    assert float(history.eval().add_to(scores.clone(), session, {})[0, 3]) == pytest.approx(found["history_bias"])
    assert float(history.train().add_to(scores.clone(), session, {})[0, 3]) == 1.0


@pytest.mark.parametrize(("trained", "noise", "at_least"), [(-0.3, 0.6, 0.516), (-1.0, 0.9, 0.245)])
def test_terms_are_tuned_beside_the_trained_history_bias_and_beside_a_low_one(
    trained: float, noise: float, at_least: float
) -> None:
    """Coordinate by coordinate the first start ends at .513 and .249, the second at .518 and .240."""
    rng = np.random.default_rng(1)
    valid = [[*s[:-1], s[-1] if rng.random() > noise else int(rng.integers(3, 43))] for s in FORWARDS]
    model, catalogue = made(n_neighbours=8, n_similar_items=3)
    terms_of(model).history_bias.bias.data.fill_(trained)  # type: ignore[union-attr]  # the model has the term
    found = fit_terms(model, catalogue, Sessions.from_lists(FORWARDS), Sessions.from_lists(valid))
    assert found["valid_ndcg@10"] > at_least
    assert mean_ndcg(model, catalogue, valid) == pytest.approx(found["valid_ndcg@10"], abs=1e-6)


def test_a_history_bias_alone_is_tuned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a catalogue too large for content-kNN: where the bias starts changes nothing, and a pass may take minutes."""
    passes: list[object] = []
    chunks = tune.Validation.chunks
    monkeypatch.setattr(tune.Validation, "chunks", lambda self: [passes.append(self), chunks(self)][1])  # type: ignore[func-returns-value]  # counted
    model, catalogue = made(n_similar_items=3)
    monkeypatch.setattr(tune, "_MOST_ROWS", catalogue.n_rows - 1)
    found = fit_terms(model, catalogue, Sessions.from_lists(FORWARDS), Sessions.from_lists(FORWARDS))
    assert len(passes) == 1
    assert found.keys() == {"history_bias", "valid_ndcg@10"}
    assert mean_ndcg(model, catalogue, FORWARDS) == pytest.approx(found["valid_ndcg@10"], abs=1e-6)
