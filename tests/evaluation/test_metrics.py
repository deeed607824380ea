"""Metrics by hand, and deterministic intervals of the statistically expected width."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError
from missrec_t4r.evaluation.metrics import MISSED, bootstrap_intervals, coverage, metrics, paired_differences, users_of


def test_metrics_by_hand() -> None:
    measured = metrics(np.array([1, 3, 11, MISSED]), ks=[10, 20])
    assert measured["recall@10"] == pytest.approx(2 / 4)
    assert measured["recall@20"] == pytest.approx(3 / 4)
    assert measured["ndcg@10"] == pytest.approx((1 / math.log2(2) + 1 / math.log2(4)) / 4)  # (1 + 0.5) / 4
    assert measured["ndcg@20"] == pytest.approx((1 + 0.5 + 1 / math.log2(12)) / 4)
    assert measured["mrr@10"] == pytest.approx((1 + 1 / 3) / 4)
    assert measured["mrr@20"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)


def test_the_cut_off_belongs_to_the_list() -> None:
    assert metrics(np.array([10]), ks=[10])["recall@10"] == 1
    assert metrics(np.array([11]), ks=[10])["recall@10"] == 0


def test_no_session_gives_no_number() -> None:
    nobody = np.empty(0, np.int64)
    assert set(metrics(nobody).values()) == {None}
    assert set(bootstrap_intervals(nobody).values()) == {None}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_metrics_are_ordered(ranks: list[int]) -> None:
    measured = metrics(np.array(ranks), ks=[10, 50])
    assert 0 <= measured["mrr@10"] <= measured["ndcg@10"] <= measured["recall@10"] <= measured["recall@50"] <= 1


def test_the_bootstrap_is_deterministic_and_moves_with_its_seed() -> None:
    ranks = np.random.default_rng(1).integers(1, 40, 300)
    assert bootstrap_intervals(ranks, seed=5) == bootstrap_intervals(ranks, seed=5)
    assert bootstrap_intervals(ranks, seed=5) != bootstrap_intervals(ranks, seed=6)


def test_the_interval_of_recall_has_the_width_of_a_binomial() -> None:
    ranks = np.array([1] * 400 + [MISSED] * 600)
    low, high = bootstrap_intervals(ranks, ks=[10])["recall@10"]
    error = math.sqrt(0.4 * 0.6 / 1000)  # 0.0155
    assert low == pytest.approx(0.4 - 1.96 * error, abs=0.003)
    assert high == pytest.approx(0.4 + 1.96 * error, abs=0.003)


def test_the_shortcut_over_ranks_equals_drawing_users() -> None:
    ranks = np.random.default_rng(2).integers(1, 30, 200)
    users = np.random.default_rng(3).integers(0, 200, (4000, 200))
    drawn = [metrics(ranks[resample], ks=[10])["ndcg@10"] for resample in users]
    assert bootstrap_intervals(ranks, ks=[10], resamples=4000)["ndcg@10"] == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.005
    )


def test_the_sessions_of_a_user_are_drawn_together() -> None:
    """Four equal sessions per user say no more than one: counted as four users, the interval would be half as wide."""
    rng = np.random.default_rng(7)
    ranks, other = rng.integers(1, 30, (2, 300))
    users = np.repeat(np.arange(300), 4)[::-1].copy()
    once = bootstrap_intervals(ranks[::-1], ks=[10], resamples=4000)["ndcg@10"]
    together = bootstrap_intervals(ranks.repeat(4), ks=[10], users=users, resamples=4000)["ndcg@10"]
    assert together == pytest.approx(once, abs=0.005)
    alone = bootstrap_intervals(ranks.repeat(4), ks=[10], resamples=4000)["ndcg@10"]
    assert alone[1] - alone[0] == pytest.approx((once[1] - once[0]) / 2, abs=0.01)
    pair = paired_differences(ranks, other, ks=[10], resamples=4000)["ndcg@10"]
    found = paired_differences(ranks.repeat(4), other.repeat(4), ks=[10], users=users, resamples=4000)["ndcg@10"]
    assert found == pytest.approx(pair, abs=0.01)
    assert found.difference == pytest.approx(pair.difference, abs=1e-12)


def test_a_user_is_drawn_with_all_sessions() -> None:
    """Two users, one with a hit and one with three misses: half of the resamples have both, a quarter only the hit."""
    ranks, users = np.array([1, MISSED, MISSED, MISSED]), np.array([5, 2, 2, 2])
    found = paired_differences(ranks, np.full(4, MISSED), ks=[10], users=users)["recall@10"]
    assert found == pytest.approx((0.25, 0.0, 1.0, 3 / 4 + 1 / 8), abs=0.03)
    many = bootstrap_intervals(np.tile(ranks, 200), ks=[10], users=np.repeat(np.arange(400), np.tile([1, 3], 200)))
    low, high = many["recall@10"] or (1, 0)
    assert 0.2 < low < 0.25 < high < 0.3


def test_users_are_numbered_where_one_has_several_sessions() -> None:
    sessions = Sessions.from_lists([[3], [4], [5]])
    assert users_of(sessions) is None
    assert users_of(replace(sessions, users=pa.array(["a", "b", "c"]))) is None
    numbers = users_of(replace(sessions, users=pa.array(["a", "b", "a"])))
    assert numbers is not None
    assert numbers[0] == numbers[2] != numbers[1]


def test_a_paired_difference_is_significant_where_two_intervals_overlap() -> None:
    rng = np.random.default_rng(4)
    easy = rng.random(500) < 0.5
    worse = np.where(easy, 2, MISSED)
    better = np.where(easy & (rng.random(500) < 0.2), 1, worse)
    one, other = bootstrap_intervals(better, ks=[10])["mrr@10"], bootstrap_intervals(worse, ks=[10])["mrr@10"]
    assert one[0] < other[1]  # the two intervals overlap
    found = paired_differences(better, worse, ks=[10])["mrr@10"]
    assert found.difference == pytest.approx((1 - 1 / 2) * (better == 1).mean())
    assert 0 < found.low < found.difference < found.high
    assert found.share_better == 1


def test_equal_systems_tie() -> None:
    found = paired_differences(np.array([1, 20]), np.array([1, 30]), ks=[10])["recall@10"]
    assert found == (0.0, 0.0, 0.0, 0.5)


def test_only_the_same_sessions_can_be_compared() -> None:
    with pytest.raises(DataError, match="2 and 1 ranks"):
        paired_differences(np.array([1, 2]), np.array([1]))


def test_coverage_counts_each_item_once_and_no_padding() -> None:
    assert coverage(np.array([[3, 4], [4, -1]]), n_items=5) == pytest.approx(2 / 5)
