"""What serving compiles gives what NVTabular's fitted request workflow gives, on every row of any request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from merlin.io.worker import clean_worker_cache

from missrec_t4r.bundle.id_encoder import RawId, SessionTransform
from missrec_t4r.etl.nvt import workflows as sessions
from missrec_t4r.etl.nvt.request_transform import compile_session_transform, request_rows
from missrec_t4r.etl.nvt.serialization import save_workflow
from missrec_t4r.schema import FIRST_ITEM_ROW, UNKNOWN_ROW

ODD_TEXTS = [
    "0",
    "00",
    "1",
    "1.0",
    "-1",
    "nan",
    "None",
    "null",
    "True",
    " ",
    "a ",
    "A",
    "a",
    "ä",
    "a\u0308",
    "日本",
    "😀",
    "a,b",
]
ODD_NUMBERS = [0, 1, -1, 2, 3, 2**31, -(2**31), 2**53, 2**53 + 1, 2**63 - 1, -(2**63) + 1]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
NUMBERS = st.sampled_from(ODD_NUMBERS) | st.integers(-(2**63) + 1, 2**63 - 1)


@st.composite
def shops(draw: st.DrawFn, ids: st.SearchStrategy[Any], missing: bool) -> tuple[list[RawId], int, list[list[RawId]]]:
    """A vocabulary, the length that the model sees, and sessions: known ids, strangers, missing ids, any length."""
    vocabulary = draw(st.lists(ids, min_size=1, max_size=12, unique=True))
    length = draw(st.integers(1, 7))
    one = st.one_of([st.sampled_from(vocabulary), st.sampled_from(vocabulary), ids, *([st.none()] if missing else [])])
    return vocabulary, length, draw(st.lists(st.lists(one, max_size=2 * length + 3), min_size=1, max_size=8))


def _same(folder: Path, vocabulary: list[Any], length: int, requests: list[list[Any]]) -> None:
    kind = pa.int64() if isinstance(vocabulary[0], int) else pa.string()
    ids = pa.array(vocabulary, kind)
    workflow = sessions.build_request_workflow(ids, folder / "storage", max_sequence_length=length)
    sessions.fit(workflow, pd.DataFrame({"item_id": [vocabulary, vocabulary[:1]]}))
    save_workflow(workflow, folder / "request_workflow")
    (folder / "transform.json").write_text(json.dumps(compile_session_transform(workflow)))
    theirs = request_rows(folder / "request_workflow", requests)
    clean_worker_cache()
    ours = SessionTransform.load(folder / "transform.json", ids)
    assert [rows.tolist() for rows in ours(*requests)] == theirs
    assert [len(rows) for rows in theirs] == [min(len(request), length) for request in requests]
    # The same as a padded tensor, which is what Triton hands over; behind a session stands whatever was there.
    width = max(map(len, requests))
    lengths = np.array([len(request) for request in requests])
    wire = np.stack([ours.to_wire([*request, *vocabulary[:1] * (width - len(request))]) for request in requests])
    rows, seen = ours.padded(wire.reshape(len(requests), width), lengths)
    for row, whole, expected, request in zip(rows, seen, theirs, requests, strict=True):
        assert row[: len(expected)].tolist() == expected
        assert not row[len(expected) :].any()
        known = {raw: FIRST_ITEM_ROW + place for place, raw in enumerate(vocabulary)}
        assert whole[: len(request)].tolist() == [known.get(raw, UNKNOWN_ROW) for raw in request]
        assert not whole[len(request) :].any()


MANY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


@MANY
@given(shops(TEXTS, missing=True))
def test_text_ids(tmp_path_factory: pytest.TempPathFactory, shop: tuple[list[Any], int, list[list[Any]]]) -> None:
    _same(tmp_path_factory.mktemp("shop"), *shop)


@MANY
@given(shops(NUMBERS, missing=False))  # NVTabular takes no missing ids in lists of integers
def test_integer_ids(tmp_path_factory: pytest.TempPathFactory, shop: tuple[list[Any], int, list[list[Any]]]) -> None:
    _same(tmp_path_factory.mktemp("shop"), *shop)
