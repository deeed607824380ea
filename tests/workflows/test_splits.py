"""Who is in which split, and with how much."""

import numpy as np
import pyarrow as pa
import pytest

from missrec_t4r.data.session_files import take_prefixes
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.splits import default_boundaries, leave_one_out, time_split

OFFSETS = np.array([0, 1, 3, 6, 10])  # sessions of 1, 2, 3 and 4 events


def test_leave_one_out_leaves_short_sessions_to_training() -> None:
    lengths = leave_one_out(OFFSETS)
    assert lengths["train"].tolist() == [1, 2, 1, 2]
    assert lengths["valid"].tolist() == [0, 0, 2, 3]
    assert lengths["test"].tolist() == [0, 0, 3, 4]


def test_time_split_takes_the_last_event_of_each_window() -> None:
    #                 | one | two  | three    | four        |   valid: [4, 7), test: from 7
    times = np.array([5.0, 3, 4, 1, 6, 6.5, 2, 5, 7, 9])
    lengths = time_split(OFFSETS, times, 4, 7)
    assert lengths["train"].tolist() == [0, 1, 1, 1]
    assert lengths["valid"].tolist() == [0, 2, 3, 2]  # the first session has no history before its target
    assert lengths["test"].tolist() == [0, 0, 0, 4]


def test_an_event_on_the_boundary_belongs_to_the_later_split() -> None:
    lengths = time_split(np.array([0, 3]), np.array([1, 4, 7]), 4, 7)
    assert {name: value.tolist() for name, value in lengths.items()} == {"train": [1], "valid": [2], "test": [3]}


def test_a_target_of_the_time_split_has_a_history() -> None:
    lengths = time_split(np.array([0, 1, 2, 4]), np.array([5, 8, 8, 9]), 4, 7)
    assert {name: value.tolist() for name, value in lengths.items()} == {
        "train": [0, 0, 0],
        "valid": [0, 0, 0],
        "test": [0, 0, 2],
    }


def test_default_boundaries_are_at_80_and_90_percent_of_the_events() -> None:
    assert default_boundaries(np.array([9, 0, 1, 2, 3, 4, 5, 6, 7, 8])) == (8, 9)


@pytest.mark.parametrize("times", [[*range(7), 300, 300, 300], [1, 1, 1, 1, 1, 1, 1, 1, 1, 9], [4] * 10])
def test_default_boundaries_that_leave_a_split_empty_are_named(times: list[int]) -> None:
    words = rf"are {times[8]} and {times[9]}, and the earliest event is at {times[0]}; .*--valid-from and --test-from"
    with pytest.raises(ConfigError, match=words):
        default_boundaries(np.array(times))


def test_prefixes_cut_every_list_alike() -> None:
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3, 6], pa.int32()), pa.array(list("abcdef")))
    table = pa.table({"user_id": [7, 8, 9], "x-list": lists, "y-list": lists})
    cut = take_prefixes(table, np.array([0, 1, 3, 6]), np.array([1, 0, 2]))
    assert cut.to_pylist() == [
        {"user_id": 7, "x-list": ["a"], "y-list": ["a"]},
        {"user_id": 9, "x-list": ["d", "e"], "y-list": ["d", "e"]},
    ]
