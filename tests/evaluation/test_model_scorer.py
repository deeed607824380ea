"""A real model, with random weights, as a scorer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import KEPT_STRICT, quick_metrics, rank_catalogue
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.ranking.scorer import ModelScorer


@pytest.fixture
def model(catalogue: Catalogue) -> MISSRec:
    torch.manual_seed(3)
    built = build_missrec(MISSRecConfig(d_model=8, n_head=2, max_sequence_length=3, history_bias=False), catalogue)
    built.discover_interests(seed=3)
    return built


def test_scores_are_the_models(model: MISSRec, catalogue: Catalogue) -> None:
    scores = ModelScorer.with_popularity(model, catalogue)(Sessions.from_lists([[3, 5], [4]]))
    item_ids = torch.tensor([[3, 5], [4, 0]])
    model.eval()
    with torch.no_grad():
        expected = model.score(model(item_ids), model.candidates(), item_ids)
    torch.testing.assert_close(scores, expected)
    assert torch.isneginf(scores[:, :3]).all()


def test_the_model_reads_the_most_recent_items_only(model: MISSRec, catalogue: Catalogue) -> None:
    scorer = ModelScorer.with_popularity(model, catalogue)
    whole, recent = scorer(Sessions.from_lists([[7, 6, 3, 4, 5]])), scorer(Sessions.from_lists([[3, 4, 5]]))
    torch.testing.assert_close(whole, recent)


def test_dropout_is_off_and_the_mode_comes_back(model: MISSRec, catalogue: Catalogue) -> None:
    model.train()
    scorer, sessions = ModelScorer.with_popularity(model, catalogue), Sessions.from_lists([[3, 4]])
    torch.testing.assert_close(scorer(sessions), scorer(sessions), rtol=0, atol=0)
    assert model.training
    assert not scorer(sessions).requires_grad


def test_a_session_without_known_item_gets_the_popular_items(model: MISSRec, catalogue: Catalogue) -> None:
    ranking = rank_catalogue(
        ModelScorer.with_popularity(model, catalogue),
        Sessions.from_lists([[], [3], [2]]),
        np.array([4, 4, 4]),
        9,
        top_k=6,
    )
    for session in (0, 2):
        assert ranking.recommended[KEPT_STRICT][session].tolist() == [3, 4, 5, 6, 7, 8]  # counts 3, 3, 3, 1, 1, 0
    assert ranking.ranks[KEPT_STRICT][[0, 2]].tolist() == [2, 2]


def test_batches_do_not_change_the_ranks(model: MISSRec, catalogue: Catalogue) -> None:
    rng = np.random.default_rng(0)
    sessions = Sessions.from_lists([rng.integers(3, 9, rng.integers(2, 6)) for _ in range(20)])
    scorer = ModelScorer.with_popularity(model, catalogue)
    together = quick_metrics(scorer, sessions, 9, ks=[3])
    alone = [quick_metrics(scorer, sessions.take([index]), 9, ks=[3])[KEPT_STRICT]["recall@3"] for index in range(20)]
    assert together[KEPT_STRICT]["recall@3"] == pytest.approx(np.mean(alone))
