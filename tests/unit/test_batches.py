"""Training batches: every transition is trained once, in windows, prefixes and batches of similar length."""

import numpy as np
import pytest

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import collate, iterate, prefix_examples, training_batches, window_examples
from missrec_t4r.data.sessions import Sessions, target_counts
from missrec_t4r.errors import ConfigError

SESSIONS = Sessions.from_lists([[3, 4, 5, 6, 7], [8, 9], [10]])


def test_windows_cover_every_position_from_the_end_of_the_session() -> None:
    examples = window_examples(SESSIONS, 3, 0, np.random.default_rng(0))
    batch = collate(SESSIONS, examples, 1, all_positions=True, backwards=False)
    assert batch.item_ids.tolist() == [[4, 5, 6], [3, 0, 0], [8, 0, 0]]
    assert batch.targets[..., 0].tolist() == [[5, 6, 7], [4, 0, 0], [9, 0, 0]]


def test_prefixes_hold_the_items_before_the_target_up_to_the_limit() -> None:
    examples = prefix_examples(SESSIONS, 3, 0, np.random.default_rng(0))
    batch = collate(SESSIONS, examples, 2, all_positions=False, backwards=False)
    assert batch.item_ids.tolist() == [[3, 0, 0], [3, 4, 0], [3, 4, 5], [4, 5, 6], [8, 0, 0]]
    assert batch.targets.tolist() == [[4, 5], [5, 6], [6, 7], [7, 0], [9, 0]]


def test_reversed_prefixes_are_the_prefixes_of_the_reversed_session() -> None:
    examples = prefix_examples(SESSIONS, 3, 0, np.random.default_rng(0))
    batch = collate(SESSIONS, examples, 1, all_positions=False, backwards=True)
    assert batch.item_ids.tolist() == [[7, 0, 0], [7, 6, 0], [7, 6, 5], [6, 5, 4], [9, 0, 0]]
    assert batch.targets[:, 0].tolist() == [6, 5, 4, 3, 8]


def test_the_number_of_sampled_prefixes_is_the_setting() -> None:
    examples = prefix_examples(SESSIONS, 3, 2, np.random.default_rng(0))
    assert np.bincount(examples.start, minlength=6)[[0, 5]].tolist() == [2, 1]  # the second session has one prefix


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_an_epoch_trains_every_transition_once_with_little_padding(attention: str) -> None:
    rng = np.random.default_rng(0)
    sessions = Sessions.from_lists([rng.integers(3, 50, rng.integers(2, 30)) for _ in range(400)])
    model, settings = MISSRecConfig(attention=attention, max_sequence_length=10), TrainConfig.paper(batch_size=64)
    padding, cells, seen = 0, 0, []
    for batch in iterate(sessions, training_batches(sessions, model, settings, rng), model, settings):
        real = batch.item_ids > 0
        padding, cells = padding + int((~real).sum()), cells + real.numel()
        last = batch.item_ids if attention == "causal" else batch.item_ids.gather(1, real.sum(1, keepdim=True) - 1)
        targets = batch.targets[..., 0].reshape(last.shape)
        seen += list(zip(last[targets > 0].tolist(), targets[targets > 0].tolist(), strict=True))
    expected = [pair for session in sessions for pair in zip(session[:-1].tolist(), session[1:].tolist(), strict=True)]
    assert sorted(seen) == sorted(expected)
    assert padding / cells < 0.15


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_batches_hold_random_sessions_without_grouping_by_length(attention: str) -> None:
    rng = np.random.default_rng(0)
    sessions = Sessions.from_lists([rng.integers(3, 50, rng.integers(2, 30)) for _ in range(400)])
    model = MISSRecConfig(attention=attention, max_sequence_length=10)
    shortest, seen = {}, {}
    for grouped in (True, False):
        settings = TrainConfig.paper(batch_size=64, group_by_length=grouped)
        batches = list(iterate(sessions, training_batches(sessions, model, settings, rng), model, settings))
        shortest[grouped] = np.mean([float((batch.item_ids > 0).sum(1).min()) for batch in batches])
        seen[grouped] = sum(int((batch.targets[..., 0] > 0).sum()) for batch in batches)
    assert seen[True] == seen[False] == sum(len(session) - 1 for session in sessions)
    assert shortest[False] < 3 < shortest[True]


def test_every_item_but_the_first_of_a_session_is_a_target() -> None:
    assert np.flatnonzero(target_counts(SESSIONS, 11)).tolist() == [4, 5, 6, 7, 9]


def test_random_windows_begin_at_every_item_of_a_long_session() -> None:
    sessions = Sessions.from_lists([[3, 4, 5, 6, 7, 8, 9, 10], [3, 4]])
    examples = window_examples(sessions, 3, 200, np.random.default_rng(0))
    begins = np.bincount(examples.begin[examples.start == 0], minlength=8)
    assert (begins[:5] > 20).all(), "200 windows of three items and the target after them begin at five places"
    assert not begins[5:].any()
    assert (examples.end - examples.begin).tolist() == [3] * 200 + [1] * 200


def test_the_last_window_is_drawn_with_the_probability_of_the_setting() -> None:
    sessions = Sessions.from_lists([[3, 4, 5, 6, 7, 8, 9, 10]] * 400)
    for choose, length, by_chance in ((window_examples, 3, 1 / 5), (prefix_examples, 50, 1 / 7)):
        for probability in (0.0, 0.5, 1.0):
            examples = choose(sessions, length, 1, np.random.default_rng(0), probability)
            is_last = examples.end == examples.limit - 1  # whose last position has the last item as its target
            assert is_last.mean() == pytest.approx(probability + (1 - probability) * by_chance, abs=0.08)
    with pytest.raises(ConfigError, match="train.last_window_probability 0.5 needs train.windows_per_session"):
        TrainConfig(last_window_probability=0.5)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_share_of_reversed_batches_is_the_setting(attention: str) -> None:
    sessions = Sessions.from_lists([[row, row + 1, row + 2] for row in range(3, 103)])
    model, share = MISSRecConfig(attention=attention, max_sequence_length=10), {}
    for probability in (0.0, 0.3, 1.0):
        settings = TrainConfig.paper(batch_size=2, reverse_probability=probability)
        steps = []
        for batch in iterate(
            sessions, training_batches(sessions, model, settings, np.random.default_rng(0)), model, settings
        ):
            real = batch.item_ids > 0
            last = batch.item_ids if attention == "causal" else batch.item_ids.gather(1, real.sum(1, keepdim=True) - 1)
            targets = batch.targets[..., 0].reshape(last.shape)
            steps.append((targets - last)[targets > 0].unique().tolist())
        assert all(step in ([1], [-1]) for step in steps), "a batch is read in one direction"
        share[probability] = sum(step == [-1] for step in steps) / len(steps)
    assert share[0.0] == 0
    assert share[1.0] == 1
    assert share[0.3] == pytest.approx(0.3, abs=0.1)
