from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missrec_t4r.bundle.id_encoder import NULL_INTEGER, SessionTransform, TransformSettings, encode_ids
from missrec_t4r.errors import BundleError, DataError
from missrec_t4r.export.parity import check_workflow, hostile_variants
from tests.serving import shop

STRINGS = SessionTransform(TransformSettings("string", 3), ["lamp", "desk", "ünïcode"])
INTEGERS = SessionTransform(TransformSettings("int64", 3), [70, -5, 12])


@pytest.mark.parametrize(
    ("transform", "ids", "rows"),
    [
        (STRINGS, ["lamp", "desk"], [3, 4]),
        (STRINGS, ["ünïcode", "unicode", "", " lamp"], [2, 2, 2]),  # cut to three after the look-up
        (STRINGS, ["lamp", "lamp", "sofa", "sofa", "sofa"], [2, 2, 2]),  # unknown ids take part in the cut
        (STRINGS, [None, "desk"], [2, 4]),
        (STRINGS, [], []),
        (INTEGERS, [12, 70, -5], [5, 3, 4]),
        (INTEGERS, [0, None, 2**62], [2, 2, 2]),
        (INTEGERS, [-(2**63) + 1, 2**63 - 1, 71], [2, 2, 2]),
    ],
)
def test_ids_become_rows(transform: SessionTransform, ids: list[str | int | None], rows: list[int]) -> None:
    assert transform(ids)[0].tolist() == rows


@given(st.lists(st.lists(st.sampled_from(["lamp", "desk", "sofa", None]), max_size=7), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_padded_request_equals_ragged_sessions(sessions: list[list[str | None]]) -> None:
    width = max(1, *map(len, sessions))
    wire = np.full((len(sessions), width), b"lamp", object)  # padding looks like an item and must be ignored
    for line, session in zip(wire, sessions):
        line[: len(session)] = STRINGS.to_wire(session)
    rows, seen = STRINGS.padded(wire, np.array([[len(session)] for session in sessions], np.int32))
    for index, session in enumerate(sessions):
        expected = STRINGS(session)[0].tolist()
        assert rows[index, : len(expected)].tolist() == expected
        assert not rows[index, len(expected) :].any()
        assert seen[index, : len(session)].tolist() == STRINGS.look_up(STRINGS.to_wire(session)).tolist()
        assert not seen[index, len(session) :].any()


@pytest.mark.parametrize("length", [-1, 4])
def test_a_length_beyond_the_request_is_refused(length: int) -> None:
    with pytest.raises(DataError, match="0 to 3"):
        INTEGERS.padded(np.zeros((1, 3), np.int64), np.array([[length]]))


@pytest.mark.parametrize(
    ("ids", "id_type", "words"),
    [
        ([7], "string", "item id 7 is of type int; expected: strings"),
        (["7"], "int64", "item id '7' is of type str; expected: integers"),
        ([True], "int64", "type bool"),
        ([2**63], "int64", "does not fit"),
        ([NULL_INTEGER], "int64", "does not fit"),
        ([1.0], "int64", "type float"),
        (["\ud800"], "string", "not valid Unicode"),
    ],
)
def test_ids_of_another_type_are_refused_in_words(ids: list[object], id_type: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode_ids(ids, id_type)  # type: ignore[arg-type]  wrong types are the point


@pytest.mark.parametrize(
    ("vocabulary", "id_type"),
    [(["a", "a"], "string"), ([], "string"), (["a", ""], "string"), ([NULL_INTEGER], "int64")],
)
def test_a_vocabulary_that_requests_could_not_name_is_refused(vocabulary: list[str | int], id_type: str) -> None:
    with pytest.raises(BundleError):
        SessionTransform(TransformSettings.from_dict(content(id_type=id_type)), vocabulary)


@pytest.mark.parametrize(
    "changes",
    [{"format": 2}, {"unknown_row": 1}, {"id_type": "float"}, {"length": 0}, {"length": "50"}, {"length": True}],
)
def test_settings_of_another_format_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"session_transform\.json"):
        TransformSettings.from_dict(content(**changes))


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    file = tmp_path / "session_transform.json"
    file.write_text(json.dumps({"format": 1}))
    with pytest.raises(BundleError, match="'item_id'"):
        SessionTransform.load(file, ["a"])


@pytest.mark.parametrize("integers", [False, True])
def test_every_row_equals_the_fitted_nvtabular_workflow(tmp_path: Path, integers: bool) -> None:
    pytest.importorskip("nvtabular", reason="the proof needs NVTabular (extra merlin)")
    import pandas as pd

    from missrec_t4r.etl.nvt import workflows as sessions
    from missrec_t4r.etl.nvt.request_transform import compile_session_transform
    from missrec_t4r.etl.nvt.serialization import save_workflow

    catalogue = shop.catalogue(integers=integers)
    ids = catalogue.items["item_id"].combine_chunks()
    workflow = sessions.build_request_workflow(ids, tmp_path / "storage", max_sequence_length=shop.MAX_LENGTH)
    sessions.fit(workflow, pd.DataFrame({"item_id": [ids[:2].to_pylist(), ids[:1].to_pylist()]}))
    save_workflow(workflow, tmp_path / "request_workflow")
    (tmp_path / "session_transform.json").write_text(json.dumps(compile_session_transform(workflow)))
    assert check_workflow(tmp_path, catalogue, shop.raw_sessions(catalogue, 100)) == "equal on 301 sessions"


def test_the_proof_says_when_it_was_skipped(tmp_path: Path) -> None:
    assert "skipped" in check_workflow(tmp_path, shop.catalogue(), [])


def test_hostile_variants_hold_unknown_over_long_and_empty_sessions() -> None:
    variants = hostile_variants([["ware-1-ü"] * 3], "string")
    assert [len(session) for session in variants] == [3, 5, 160, 0]
    assert set(variants[1]) - {"ware-1-ü"}


def content(**changes: object) -> dict[str, object]:
    item = {"type": changes.get("id_type", "string"), "null_row": 1, "unknown_row": 2, "first_row": 3}
    item |= {key: value for key, value in changes.items() if key in item}
    return {"format": changes.get("format", 1), "item_id": item, "max_sequence_length": changes.get("length", 50)}
