from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from missrec_t4r.errors import DataError
from missrec_t4r.evaluation.full_ranking import top_items
from missrec_t4r.retrieval.filters import Rules
from missrec_t4r.retrieval.ranker import Ranker, compact
from missrec_t4r.runs.run_folder import LoadedRun
from tests.serving import shop


@pytest.fixture(scope="module", params=[False, True], ids=["as on a CPU", "as on a GPU"])
def ranker(loaded: LoadedRun, request: pytest.FixtureRequest) -> Ranker:
    return Ranker(loaded.model, loaded.catalogue, together=request.param)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(2)
    return shop.padded([rng.integers(1, shop.N_ITEMS + 3, n) for n in rng.integers(1, shop.MAX_LENGTH + 1, 150)])


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(0, 8),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_top_items_equals_plain_sorting(lines: list[list[int]], k: int, some_hidden: bool) -> None:
    scores = torch.tensor(lines, dtype=torch.float32)  # few distinct values: ties everywhere
    if some_hidden:
        scores[scores == 0] = -torch.inf
    best, rows = top_items(scores, k)
    for line, values, columns in zip(scores.tolist(), best.tolist(), rows.tolist()):
        expected = sorted(range(6), key=lambda column: (-line[column], column))[:k]
        assert columns == expected
        assert values == [line[column] for column in expected]


def test_answers_equal_the_model_sorted_by_hand(ranker: Ranker, loaded: LoadedRun, rows: np.ndarray) -> None:
    ranking = ranker.rank(rows, top_k=7)
    for index, line in enumerate(rows):
        known = line[line > 2]
        if not len(known):
            assert ranking.fallback[index]
            continue
        session = torch.from_numpy(known)[None]
        with torch.inference_mode():
            scores = loaded.model.score(loaded.model(session), loaded.model.candidates(), session)[0].numpy()
        expected = np.argsort(-scores, kind="stable")[:7]
        assert ranking.rows[index].tolist() == expected.tolist()
        np.testing.assert_allclose(ranking.scores[index], scores[expected], atol=1e-6)
        assert ranking.n_unknown[index] == ((line == 1) | (line == 2)).sum()
        assert not ranking.fallback[index]


def test_answers_do_not_depend_on_the_batch(ranker: Ranker, loaded: LoadedRun, rows: np.ndarray) -> None:
    whole = ranker.rank(rows, top_k=5)
    for size in (1, 7):
        small = Ranker(loaded.model, loaded.catalogue, batch_size=size).rank(rows, top_k=5)
        assert small.rows.tolist() == whole.rows.tolist()
        np.testing.assert_allclose(small.scores, whole.scores, atol=1e-6)


def test_padding_and_unknown_rows_change_no_answer(ranker: Ranker) -> None:
    plain, strewn = np.array([[5, 9, 4, 0, 0]]), np.array([[2, 5, 1, 9, 0, 2, 4]])
    assert ranker.rank(plain).rows.tolist() == ranker.rank(strewn).rows.tolist()
    assert ranker.rank(strewn).n_unknown.tolist() == [3]


def test_a_session_without_known_items_gets_the_most_popular(ranker: Ranker) -> None:
    ranking = ranker.rank(np.array([[2, 1, 0], [0, 0, 0], [3, 0, 0]]), top_k=4)
    assert ranking.fallback.tolist() == [True, True, False]
    assert ranking.rows[0].tolist() == [3, 4, 5, 6]  # train_count 10, 9, 9, 9: ties by row
    np.testing.assert_allclose(ranking.scores[0], [1.0, 0.9, 0.9, 0.9], rtol=1e-6)
    assert ranking.n_unknown.tolist() == [2, 0, 0]


def test_seen_and_excluded_items_are_left_out_per_session(ranker: Ranker) -> None:
    rows, flags = np.array([[5, 9, 4], [5, 9, 4]]), np.array([True, False])
    kept, left_out = shop.N_ITEMS, shop.N_ITEMS - 3
    ranking = ranker.rank(rows, top_k=50, exclude_seen=flags)
    assert ranking.n_items.tolist() == [left_out, kept]
    assert not set(ranking.rows[0]) & {5, 9, 4}
    assert {5, 9, 4} <= set(ranking.rows[1].tolist())
    longer = ranker.rank(rows, top_k=50, exclude_seen=True, seen=np.array([[5, 9, 4, 7]] * 2))
    assert 7 not in longer.rows
    banned = ranker.rank(rows, top_k=50, exclude=np.array([[30, 0], [31, 32]]))
    assert banned.n_items.tolist() == [kept - 1, kept - 2]
    assert 30 not in banned.rows[0]
    assert not set(banned.rows[1]) & {31, 32}


def test_nothing_left_to_recommend_is_an_empty_answer(ranker: Ranker) -> None:
    everything = np.arange(3, shop.N_ITEMS + 3)[None]
    ranking = ranker.rank(np.array([[5]]), top_k=3, exclude=everything)
    assert ranking.n_items.tolist() == [0]
    assert ranking.rows.tolist() == [[0, 0, 0]]
    assert ranking.scores.tolist() == [[0.0, 0.0, 0.0]]


def test_top_k_is_each_sessions_own_and_limited_by_the_catalogue(ranker: Ranker) -> None:
    ranking = ranker.rank(np.array([[5], [5], [5]]), top_k=np.array([1, 4, 10**9]))
    assert ranking.n_items.tolist() == [1, 4, shop.N_ITEMS]
    assert ranking.rows[0, 1:].tolist() == [0] * (shop.N_ITEMS - 1)
    assert ranking.rows[1, :4].tolist() == ranking.rows[2, :4].tolist()


def test_reserved_rows_are_never_recommended(ranker: Ranker, rows: np.ndarray) -> None:
    assert ranker.rank(rows, top_k=10**6).rows.min() >= 3


def test_an_empty_batch_has_an_empty_answer(ranker: Ranker) -> None:
    assert ranker.rank(np.zeros((0, 4), np.int64)).rows.shape == (0, 1)


@pytest.mark.parametrize(("rows", "top_k"), [([[33]], 5), ([[-1]], 5), ([[3]], 0)])
def test_rows_and_top_k_out_of_range_are_refused(ranker: Ranker, rows: list[list[int]], top_k: int) -> None:
    with pytest.raises(DataError):
        ranker.rank(np.array(rows), top_k=top_k)


def test_the_last_known_items_of_a_long_session_count(ranker: Ranker) -> None:
    long = np.array([[*range(3, 20)]])
    assert compact(long, shop.MAX_LENGTH).tolist() == [[*range(12, 20)]]
    assert ranker.rank(long).rows.tolist() == ranker.rank(long[:, -shop.MAX_LENGTH :]).rows.tolist()


def test_a_step_is_smaller_for_a_large_catalogue(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("missrec_t4r.retrieval.ranker._SCORES_IN_MEMORY", 5 * loaded.catalogue.n_rows)
    assert Ranker(loaded.model, loaded.catalogue, batch_size=64).batch_size == 5


@pytest.mark.parametrize("together", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_the_tables_of_a_ranker_are_freed_with_it(loaded: LoadedRun, together: bool) -> None:
    """Not at some later garbage collection: a process that reloads its catalogue would hold two meanwhile."""
    ranker = Ranker(loaded.model, loaded.catalogue, together=together)
    ranker.rank(np.array([[5]]), rules=[Rules.of({"where": {"item_id": ["ware-3-ü"]}})])
    freed = weakref.ref(ranker)
    gc.disable()
    try:
        del ranker
        assert freed() is None
    finally:
        gc.enable()
