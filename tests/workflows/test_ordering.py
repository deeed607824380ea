"""Order of events: by user and time, ties as in the input, for integers, fractions, and values too large to pack."""

from __future__ import annotations

import numpy as np
import pytest

from missrec_t4r.etl.engine.ordering import count_out_of_order, duplicate_positions, sort_by_code_and_time

CODES = np.array([1, 0, 1, 1, 0, 1])
TIMES = np.array([7, 5, 2, 7, 5, 7])
ORDER = [1, 4, 2, 0, 3, 5]


@pytest.mark.parametrize(
    "times",
    [TIMES, TIMES + 0.0, TIMES / 10, TIMES - 1_000_000, TIMES * 2**59],
    ids=["integers", "floats", "fractions", "before 1970", "too large to pack"],
)
def test_events_are_sorted_by_user_and_time_and_ties_stay_as_they_were(times: np.ndarray) -> None:
    assert sort_by_code_and_time(CODES, times).tolist() == ORDER


def test_of_equal_events_the_first_in_the_input_is_no_duplicate() -> None:
    items = np.array([3, 4, 5, 3, 5, 3])
    assert duplicate_positions(CODES, TIMES, items, np.array(ORDER)).tolist() == [3, 5]


def test_an_event_earlier_than_the_users_last_one_is_out_of_order() -> None:
    assert count_out_of_order(CODES, TIMES) == 1
    assert count_out_of_order(np.array([0, 1, 0]), np.array([5, 1, 6])) == 0  # of two users
