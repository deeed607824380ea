"""No request harms another: hostile ones, drawn over all inputs, in one batch with good ones that answer as alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.reliability.generator import hostile_request
from missrec_t4r.errors import ServingError
from missrec_t4r.serving.event_features import MOST_CHARACTERS, EventFeatureReader
from missrec_t4r.serving.triton.backend import (
    LONGEST_SESSION,
    Backend,
    FailedError,
    RankerBackend,
    SessionsBackend,
    execute,
)
from tests.event_features.test_serving import COLUMNS, exported, run  # noqa: F401  # fixtures
from tests.event_features.triton_names import TRITON

Request = dict[str, Any]
Answer = tuple[dict[str, Any], str | None]
"""Output tensors by name, and the error of a response."""

_FOR_EVER = settings(
    max_examples=150,
    deadline=None,  # a shared machine's seconds say nothing
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def text(content: bytes) -> np.ndarray[Any, Any]:
    return np.array([[content]], object)


ROWS = np.array([[5, 9]])
GOOD = [
    {"rows": ROWS, "seen": ROWS, "side": text(b'{"dwell": [3, null], "event_type": ["buy", "view"]}')},
    {
        "rows": ROWS,
        "seen": ROWS,
        "rules": text(b'{"where": {"train_count": {"min": 1}}}'),
        "reasons": np.array([[True]]),
    },
    {"rows": np.tile(ROWS, (3, 1)), "seen": np.tile(ROWS, (3, 1)), "top_k": np.array([[1], [9], [4]], np.int32)},
    {"rows": ROWS, "seen": ROWS, "exclude": np.array([[b"i7", b""]], object), "exclude_seen": np.array([[True]])},
]
SESSIONS = [
    {"item_ids": np.array([[b"i2", b"i6"]], object), "length": np.array([[2]], np.int32)},
    {"item_ids": np.array([[b"i2", b""], [b"gone", b"i4"]], object), "length": np.array([[1], [2]], np.int32)},
]


@pytest.fixture(scope="module")
def ranker(exported: Path) -> RankerBackend:  # noqa: F811  # the fixture
    return RankerBackend(exported / "bundle")


@pytest.fixture(scope="module")
def sessions(exported: Path) -> SessionsBackend:  # noqa: F811  # the fixture
    return SessionsBackend(exported / "bundle")


def check_isolation(backend: Backend, good: Sequence[Request], chance: Any, observe: Any = None) -> None:
    alone = [execute(backend, [request], TRITON)[0] for request in good]
    hostile = [hostile_request(chance, good[0], tuple(backend.inputs), rich=False) for _ in range(chance.randint(1, 6))]
    batch = [*good, *hostile]
    order = chance.sample(range(len(batch)), len(batch))
    answers: list[Answer] = execute(backend, [batch[index] for index in order], TRITON, observe)
    assert len(answers) == len(batch)
    for index, (tensors, error) in zip(order, answers, strict=True):
        if index < len(good):
            same(tensors, alone[index][0])
            assert error is None
        elif error is None:  # an odd request may be answered: then with numbers, a line per session
            n_sessions = len(batch[index][backend.inputs[0]])
            assert {len(array) for array in tensors.values()} == {n_sessions}
            assert all(np.isfinite(array).all() for array in tensors.values() if array.dtype.kind == "f")
        else:
            assert 20 < len(error) <= 2000
            error.encode()


def same(tensors: Request, expected: Request) -> None:
    assert tensors.keys() == expected.keys()
    for name, array in tensors.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, expected[name], atol=1e-5)
        else:
            assert array.tolist() == expected[name].tolist(), name


@_FOR_EVER
@given(st.randoms(use_true_random=False))
def test_requests_of_the_ranker_answer_as_alone_beside_hostile_ones(ranker: RankerBackend, chance: Any) -> None:
    check_isolation(ranker, GOOD, chance)


@_FOR_EVER
@given(st.randoms(use_true_random=False))
def test_requests_of_the_transform_answer_as_alone_beside_hostile_ones(sessions: SessionsBackend, chance: Any) -> None:
    check_isolation(sessions, SESSIONS, chance)


def test_long_inputs_are_refused_before_they_cost_anything(ranker: RankerBackend, sessions: SessionsBackend) -> None:
    wide = np.zeros((1, LONGEST_SESSION + 1), np.int64)
    for changed in (
        {"rows": wide},
        {"seen": wide},
        {"exclude": np.full(wide.shape, b"i1", object)},
        {"allow": np.full(wide.shape, b"i1", object)},
    ):
        ((_, error),) = execute(ranker, [GOOD[0] | changed], TRITON)
        assert f"{LONGEST_SESSION + 1} ids per session; expected: at most {LONGEST_SESSION}" in error
    ((_, error),) = execute(sessions, [SESSIONS[0] | {"item_ids": np.full(wide.shape, b"i1", object)}], TRITON)
    assert "send the most recent ones" in error
    with pytest.raises(ServingError, match=f"at most {MOST_CHARACTERS} per session"):
        EventFeatureReader(COLUMNS).read(b" " * (MOST_CHARACTERS + 1), 2)


def test_a_session_with_more_rows_than_seen_ones_is_refused(ranker: RankerBackend) -> None:
    first, second = execute(ranker, [GOOD[0] | {"seen": np.array([[5]])}, GOOD[0]], TRITON)
    assert "more rows than seen ones" in first[1]
    assert first[1].status == "INVALID_ARG"
    assert second[1] is None


def test_neither_metrics_nor_a_response_that_triton_refuses_cost_other_answers(
    ranker: RankerBackend, caplog: pytest.LogCaptureFixture
) -> None:
    refused = iter([True])

    def tensor(name: str, array: Any) -> Any:
        if name == "score" and next(refused, False):
            raise ValueError("no shared memory")
        return name, array

    def miscounts(requests: Any, responses: Any) -> None:
        raise ZeroDivisionError

    triton = SimpleNamespace(**{**vars(TRITON), "Tensor": tensor})
    first, second = execute(ranker, [GOOD[0], GOOD[0]], triton, miscounts)
    assert "ValueError: no shared memory" in first[1]
    assert first[1].status == "INTERNAL"
    assert second[1] is None
    assert "the metrics of a batch were not counted" in caplog.text


def test_a_response_that_triton_refuses_counts_as_failed(ranker: RankerBackend) -> None:
    refused, told = iter([True]), list[Any]()

    def tensor(name: str, array: Any) -> Any:
        if name == "score" and next(refused, False):
            raise ValueError("no shared memory")
        return name, array

    triton = SimpleNamespace(**{**vars(TRITON), "Tensor": tensor})
    execute(ranker, [GOOD[0], GOOD[0]], triton, lambda _, responses: told.extend(responses))
    assert [isinstance(one, FailedError) for one in told] == [True, False]
    assert "score" in told[1]
