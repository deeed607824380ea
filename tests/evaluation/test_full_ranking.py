"""Ranks by hand with seen items kept and excluded, ties, misses, and results that do not depend on chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, ModalityError
from missrec_t4r.evaluation import full_ranking
from missrec_t4r.evaluation.full_ranking import (
    CHUNK_BYTES,
    EXCLUDED,
    KEPT_STRICT,
    chunk_size,
    quick_metrics,
    rank_catalogue,
    recommendable_rows,
    targets_in_history,
)
from missrec_t4r.evaluation.metrics import MISSED

NO = -torch.inf
SCORES = [NO, NO, NO, 0.9, 0.5, 0.7, 0.5, 0.1]
"""Items 3 to 7, the same for every session; the order is 3, 5, 4, 6, 7 (4 and 6 tie)."""


class Fixed:
    """Scorer with given scores, which records the size of each batch."""

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.batches, self.done = scores, [], 0

    def __call__(self, histories: Sessions) -> Tensor:
        self.batches.append(len(histories))
        self.done += len(histories)
        return self.scores[self.done - len(histories) : self.done]


def ranked(histories: list[list[int]], targets: list[int], scores: list[float] = SCORES, **options: int):
    sessions = Sessions.from_lists(histories)
    return rank_catalogue(Fixed(torch.tensor([scores] * len(targets))), sessions, np.array(targets), 8, **options)


def test_ranks_by_hand_with_seen_items_kept_and_excluded() -> None:
    found = ranked([[3], [5, 3], [7]], [5, 4, 3])
    assert found.ranks[KEPT_STRICT].tolist() == [2, 3, 1]
    assert found.ranks[EXCLUDED].tolist() == [1, 1, 1]  # 3 gone; 5 and 3 gone; 7 was below


def test_ties_go_to_the_lower_row() -> None:
    assert ranked([[7], [7]], [4, 6]).ranks[KEPT_STRICT].tolist() == [3, 4]


def test_a_target_in_its_own_history_is_a_miss_when_seen_items_are_excluded() -> None:
    found = ranked([[5, 3, 5]], [5])
    assert found.ranks[KEPT_STRICT].tolist() == [2]
    assert found.ranks[EXCLUDED].tolist() == [MISSED]


def test_targets_in_history_are_counted() -> None:
    histories = Sessions.from_lists([[3, 5, 5], [], [3]])
    assert targets_in_history(histories, np.array([5, 5, 4])).tolist() == [True, False, False]


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_target_that_is_no_item_is_a_miss_and_counted(row: int) -> None:
    found = ranked([[3], [3]], [row, 4])
    assert found.ranks[KEPT_STRICT].tolist() == [MISSED, 3]
    assert found.n_unrecommendable == 1


def test_scores_of_rows_that_are_no_items_do_not_count() -> None:
    """A function of a user's own need not know them: the unknown item (2) is never found, and never recommended."""
    found = ranked([[3], [3]], [2, 5], [9.0, 9.0, 9.0, *SCORES[3:]], top_k=3)
    assert found.ranks[KEPT_STRICT].tolist() == [MISSED, 2]
    assert found.ranks[EXCLUDED].tolist() == [MISSED, 1]
    assert found.recommended[KEPT_STRICT].tolist() == [[3, 5, 4]] * 2
    assert found.n_unrecommendable == 1


def test_an_item_that_cannot_be_recommended_is_a_miss() -> None:
    found = ranked([[3]], [7], [NO, NO, NO, 0.9, 0.5, 0.7, 0.5, NO])
    assert found.ranks[KEPT_STRICT].tolist() == [MISSED]
    assert found.n_unrecommendable == 1


def test_unknown_rows_are_dropped_before_the_scorer_sees_them() -> None:
    class Remember:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def __call__(self, histories: Sessions) -> Tensor:
            self.seen += [session.tolist() for session in histories]
            return torch.tensor([SCORES] * len(histories))

    scorer = Remember()
    rank_catalogue(scorer, Sessions.from_lists([[2, 4, 1], [2]]), np.array([3, 3]), 8)
    assert scorer.seen == [[4], []]


def test_lists_are_in_ranking_order_and_padded() -> None:
    found = ranked([[5, 4]], [3], top_k=5)
    assert found.recommended[KEPT_STRICT].tolist() == [[3, 5, 4, 6, 7]]
    assert found.recommended[EXCLUDED].tolist() == [[3, 6, 7, -1, -1]]


def test_lists_are_as_long_as_the_catalogue_at_most() -> None:
    assert ranked([[5]], [3], top_k=50).recommended[KEPT_STRICT].shape == (1, 5)


def test_nan_is_an_error_that_names_the_session() -> None:
    scores = torch.tensor([SCORES, SCORES])
    scores[1, 4] = torch.nan
    with pytest.raises(ModalityError, match=r"session 1 hold NaN.*-inf"):
        rank_catalogue(Fixed(scores), Sessions.from_lists([[3], [3]]), np.array([4, 4]), 8)


def test_rows_outside_the_catalogue_are_an_error() -> None:
    with pytest.raises(DataError, match="target row 8; expected: rows from 0 to 7"):
        ranked([[3]], [8])
    with pytest.raises(DataError, match="history row -1"):
        ranked([[-1]], [3])


def test_scores_of_another_catalogue_are_an_error() -> None:
    with pytest.raises(DataError, match=r"shape \(1, 7\)"):
        ranked([[3]], [3], SCORES[:7])


def test_memory_depends_on_the_chunk_not_on_the_number_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_ranking, "MAX_SESSIONS", 512)
    for n_rows in (8, 4_388, 100_003, 5_000_003):
        assert chunk_size(n_rows) >= 1
        assert 4 * n_rows * chunk_size(n_rows) <= max(CHUNK_BYTES, 4 * n_rows)
    scorer = Fixed(torch.tensor([SCORES] * 1100))
    rank_catalogue(scorer, Sessions.from_lists([[3]] * 1100), np.full(1100, 4), 8)
    assert scorer.batches == [512, 512, 76]


def test_quick_metrics_take_the_last_item_as_target() -> None:
    found = quick_metrics(Fixed(torch.tensor([SCORES] * 2)), Sessions.from_lists([[3, 5], [3, 7]]), 8, ks=[1])
    assert found[KEPT_STRICT]["recall@1"] == 0  # 3 is first
    assert found[EXCLUDED]["recall@1"] == 0.5  # 5 is first without 3, 7 is last


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[list[int]], list[int], int]:
    n_rows, users = draw(st.integers(4, 12)), draw(st.integers(1, 9))
    few = st.sampled_from([-torch.inf, 0.0, 0.25, 0.5, 1.0])  # few values, so that ties are the rule
    scores = torch.tensor(
        draw(st.lists(st.lists(few, min_size=n_rows, max_size=n_rows), min_size=users, max_size=users))
    )
    scores[:, :3] = -torch.inf
    row = st.integers(0, n_rows - 1)
    histories = draw(st.lists(st.lists(row, max_size=5), min_size=users, max_size=users))
    return scores, histories, draw(st.lists(row, min_size=users, max_size=users)), draw(st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_chunks_give_the_ranks_and_lists_of_one_stable_argsort(problem: tuple[Tensor, list[list[int]], list[int], int]):
    scores, histories, targets, most = problem
    n_rows = scores.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_ranking, "CHUNK_BYTES", 4 * n_rows * most)
        found = rank_catalogue(Fixed(scores), Sessions.from_lists(histories), np.array(targets), n_rows, top_k=n_rows)
    for user, (history, target) in enumerate(zip(histories, targets, strict=True)):
        for protocol in (KEPT_STRICT, EXCLUDED):
            own = scores[user].numpy().astype(np.float64)
            if protocol == EXCLUDED:
                own[[row for row in history if row > 2]] = -np.inf
            order = [row for row in np.argsort(-own, kind="stable").tolist() if own[row] > -np.inf]
            rank = order.index(target) + 1 if target in order else MISSED
            assert found.ranks[protocol][user] == rank
            filled = order + [-1] * (n_rows - 3 - len(order))
            assert found.recommended[protocol][user].tolist() == filled


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 9))
def test_the_best_rows_are_those_of_a_stable_sort(problem: tuple[Tensor, list[list[int]], list[int], int], k: int):
    scores, k = problem[0], min(k, problem[0].shape[1])
    values, order = scores.sort(dim=1, descending=True, stable=True)
    expected = order.masked_fill(values == -torch.inf, -1)[:, :k]
    assert recommendable_rows(scores, k).tolist() == expected.tolist()
