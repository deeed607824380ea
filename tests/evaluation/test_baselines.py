"""Baselines against plain loops, by hand where short, and tuning that finds the better setting per protocol."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, quick_metrics
from missrec_t4r.ranking import baselines
from missrec_t4r.ranking import tune_baselines as tuning
from missrec_t4r.ranking.baselines import ContentKNN, CoOccurrence, ItemKNN, Popularity
from missrec_t4r.ranking.tune_baselines import sample_sessions, tune, tuned_content_knn, tuned_item_knn

HISTORIES = [[3, 4], [5, 3, 5], [6], [], [8, 7, 4, 3]]


def test_popularity_is_the_train_count_for_every_session(catalogue: Catalogue) -> None:
    scores = Popularity.fit(catalogue)(Sessions.from_lists([[3], []]))
    assert scores[:, 3:].tolist() == [[3.0, 3.0, 3.0, 1.0, 1.0, 0.0]] * 2
    assert torch.isneginf(scores[:, :3]).all()


def test_sharing_counts_sessions_and_not_events(train: Sessions) -> None:
    pairs = CoOccurrence.count(train, 9).pairs.to_dense()
    expected = {(3, 4): 2, (3, 5): 1, (4, 5): 2, (3, 6): 1}  # [4, 5, 5] counts once for (4, 5)
    for (first, second), count in expected.items():
        assert pairs[first, second] == pairs[second, first] == count
    assert pairs.sum() == 2 * sum(expected.values())  # nothing else, and no diagonal


def test_following_counts_events_in_one_direction(train: Sessions) -> None:
    near = CoOccurrence.count(train, 9, follow_within=1).pairs.to_dense()
    assert near[4, 3] == 2  # [3, 4, 5] and [3, 4]
    assert near[3, 4] == 0
    assert near[5, 4] == 2  # [3, 4, 5] and the first 5 of [4, 5, 5]
    assert near[5, 3] == 0  # two events apart
    far = CoOccurrence.count(train, 9, follow_within=2).pairs.to_dense()
    assert far[5, 3] == 1
    assert far[5, 4] == 3  # and the second 5 of [4, 5, 5]
    assert far.diagonal().sum() == 0


def test_unknown_rows_are_not_counted() -> None:
    counted = CoOccurrence.count(Sessions.from_lists([[2, 3, 1, 4]]), 5, follow_within=1)
    assert counted.counts.tolist() == [0, 0, 0, 1, 1]
    assert counted.pairs.to_dense()[4, 3] == 1  # neighbours once the unknown event is dropped


def looped_item_knn(
    train: Sessions, histories: list[list[int]], within: int, decay: float, power: float, diagonal: bool
) -> Tensor:
    pairs, counts = np.zeros((9, 9)), np.zeros(9)
    for session in train:
        for item in set(session.tolist()):
            counts[item] += 1
        if not within:
            for first, second in itertools.product(set(session.tolist()), repeat=2):
                pairs[second, first] += first != second or diagonal
        for place, item in enumerate(session if within else []):
            for later in session[place + 1 : place + 1 + within]:
                pairs[later, item] += later != item or diagonal
    scores = np.full((len(histories), 9), -np.inf)
    scores[:, 3:] = 0
    for user, history in enumerate(histories):
        for age, item in enumerate(reversed(history)):
            for candidate in range(3, 9):
                damping = ((counts[item] + 5) * (counts[candidate] + 5)) ** power
                scores[user, candidate] += decay**age * pairs[candidate, item] / damping
    return torch.from_numpy(scores).float()


@pytest.mark.parametrize("within", [0, 2])
@pytest.mark.parametrize(("decay", "power"), [(0.5, 0.5), (0.9, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("dense_share", [0.0, 1.0])
@pytest.mark.parametrize("diagonal", [False, True])
def test_item_knn_equals_a_loop(
    train: Sessions,
    within: int,
    decay: float,
    power: float,
    dense_share: float,
    diagonal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "DENSE_SHARE", dense_share)
    seen = CoOccurrence.count(train, 9, within)
    assert seen.pairs.is_sparse == (dense_share == 1.0)
    scores = ItemKNN(seen, decay, power, diagonal)(Sessions.from_lists(HISTORIES))
    torch.testing.assert_close(scores, looped_item_knn(train, HISTORIES, within, decay, power, diagonal))


def test_item_knn_by_hand(train: Sessions) -> None:
    scores = ItemKNN(CoOccurrence.count(train, 9), decay=0.5, power=0.5)(Sessions.from_lists([[3, 4]]))
    # item 5: 4 is the last (C 2), 3 the one before (C 1); n is 3 for 4 and 3, and 2 sessions for 5
    assert scores[0, 5].item() == pytest.approx((1 * 2 + 0.5 * 1) / (8 * 7) ** 0.5)


def looped_content_knn(catalogue: Catalogue, history: list[int], decay: float) -> list[float]:
    vectors = {}
    for name, modality in catalogue.modalities.items():
        centred = modality.vectors.astype(np.float64) - modality.vectors[modality.present].mean(0)
        vectors[name] = centred / np.linalg.norm(centred, axis=1, keepdims=True) * modality.present[:, None]
    scores = []
    for candidate in range(3, 9):
        votes = []
        for name, modality in catalogue.modalities.items():
            known = [(age, item) for age, item in enumerate(reversed(history)) if modality.present[item]]
            if known and modality.present[candidate]:
                query = sum(decay**age * vectors[name][item] for age, item in known)
                votes.append(query @ vectors[name][candidate] / np.linalg.norm(query))
        scores.append(float(np.mean(votes)) if votes else -1.0)
    return scores


def test_content_knn_equals_a_loop(catalogue: Catalogue) -> None:
    histories = [[3, 4], [5], [8], [5, 3, 5], [8, 7, 4, 3]]
    scores = ContentKNN.fit(catalogue, decay=0.5)(Sessions.from_lists(histories))
    assert torch.isneginf(scores[:, :3]).all()
    for row, history in zip(scores[:, 3:].tolist(), histories, strict=True):
        assert row == pytest.approx(looped_content_knn(catalogue, history, 0.5), abs=1e-6)


def test_content_knn_without_a_common_modality_scores_minus_one(catalogue: Catalogue) -> None:
    scores = ContentKNN.fit(catalogue)(Sessions.from_lists([[5], []]))  # 5 has text alone, 8 image alone
    assert scores[0, 8] == -1
    assert scores[1, 3:].tolist() == [-1.0] * 6


def test_content_knn_can_use_one_modality(catalogue: Catalogue) -> None:
    fitted = ContentKNN.fit(catalogue, 0.7)
    alone = Catalogue(catalogue.items, {"image": catalogue.modalities["image"]})
    sessions = Sessions.from_lists([[3, 4], [6]])
    torch.testing.assert_close(fitted.using(["image"], 0.5)(sessions), ContentKNN.fit(alone, 0.5)(sessions))


def test_content_ranks_a_cold_item_that_item_knn_cannot(catalogue: Catalogue, train: Sessions) -> None:
    sessions = Sessions.from_lists([[3, 8]])  # 8 was never sold; its picture is that of 3
    content = quick_metrics(ContentKNN.fit(catalogue).using(["image"], 0.7), sessions, 9, ks=[1])
    behaviour = quick_metrics(ItemKNN(CoOccurrence.count(train, 9), 0.7, 0.3), sessions, 9, ks=[1])
    assert content[EXCLUDED]["recall@1"] == 1
    assert behaviour[EXCLUDED]["recall@1"] == 0


def test_tuning_chooses_per_protocol_and_the_first_of_equals() -> None:
    def constant(*order: int):
        scores = torch.full((9,), -torch.inf)
        scores[list(order)] = torch.arange(len(order), 0, -1.0)
        return lambda histories: scores.expand(len(histories), -1)

    valid = Sessions.from_lists([[3, 4]])
    keeps = constant(5, 4, 3)  # target second, also when 3 is excluded
    shadowed = constant(3, 6, 4)  # third, second without the seen item
    bold = constant(3, 4, 5)  # second; first when 3 is excluded
    best = tune([({"n": 0}, shadowed), ({"n": 1}, keeps), ({"n": 2}, bold)], valid, 9)
    assert best[KEPT_STRICT].settings == {"n": 1}
    assert best[EXCLUDED].settings == {"n": 2}
    assert best[EXCLUDED].describe() == {"n": 2, "valid_ndcg@10": 1.0}


def test_tuned_item_knn_is_the_best_of_its_grid(catalogue: Catalogue, train: Sessions) -> None:
    valid = Sessions.from_lists([[3, 4, 5], [5, 4, 3], [4, 6, 3], [5, 5, 4]])
    best = tuned_item_knn(train, valid, catalogue)
    for protocol, winner in best.items():
        diagonals = [False] if protocol == EXCLUDED else [False, True]
        for within, decay, power, diagonal in itertools.product(
            tuning.FOLLOW_WITHIN, tuning.DECAYS, tuning.POWERS, diagonals
        ):
            other = ItemKNN(CoOccurrence.count(train, 9, within), decay, power, diagonal)
            assert quick_metrics(other, valid, 9)[protocol]["ndcg@10"] <= winner.criterion + 1e-12


def test_where_users_repeat_items_item_knn_lets_an_item_speak_for_itself(catalogue: Catalogue) -> None:
    sessions = Sessions.from_lists([[3, 3, 3], [4, 4, 4], [3, 4, 4, 4], [5, 5, 5], [6, 6]])
    best = tuned_item_knn(sessions, sessions, catalogue)
    assert best[KEPT_STRICT].settings["diagonal"] is True
    assert best[EXCLUDED].settings["diagonal"] is False, "an excluded item needs no evidence"
    others = tuned_item_knn(sessions, Sessions.from_lists([[3, 4], [4, 3]]), catalogue)
    assert others[KEPT_STRICT].settings["diagonal"] is False, "switched off where nobody repeats"


def test_tuned_content_knn_needs_content(catalogue: Catalogue) -> None:
    valid = Sessions.from_lists([[3, 4], [5, 6]])
    assert tuned_content_knn(valid, Catalogue(catalogue.items, {})) is None
    best = tuned_content_knn(valid, catalogue)
    assert best is not None
    assert best[KEPT_STRICT].settings["modalities"] in (["text", "image"], ["text"], ["image"])


def test_the_sample_is_seeded_and_keeps_the_order() -> None:
    sessions = Sessions.from_lists([[item] for item in range(3, 103)])
    sample = sample_sessions(sessions, 10, seed=1)
    assert sample.values.tolist() == sorted(set(sample.values.tolist()))
    assert len(sample) == 10
    assert sample.values.tolist() == sample_sessions(sessions, 10, seed=1).values.tolist()
    assert sample.values.tolist() != sample_sessions(sessions, 10, seed=2).values.tolist()
    assert sample_sessions(sessions, 100, seed=1) is sessions
