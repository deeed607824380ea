"""The fitted NVTabular workflows: saved, moved, reloaded, and transforming what they have never seen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from merlin.io import Dataset
from nvtabular import Workflow, ops

from missrec_t4r.bundle.id_encoder import SessionTransform
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.etl.event_settings import EventSettings
from missrec_t4r.etl.nvt import workflows as sessions
from missrec_t4r.etl.nvt.event_ops import SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.request_transform import compile_session_transform, request_rows, request_vocabulary
from missrec_t4r.etl.nvt.serialization import load_workflow
from missrec_t4r.etl.nvt.session_ops import SessionGroupby
from missrec_t4r.etl.pipeline import etl
from tests.workflows.tables import write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder that was moved after it had been written."""
    etl(*write(tmp_path), tmp_path / "first", max_sequence_length=3)
    return Path(shutil.move(tmp_path / "first", tmp_path / "moved"))


def test_session_workflow_transforms_an_unseen_file(data: Path, tmp_path: Path) -> None:
    unseen = pd.DataFrame(
        [
            ("zoe", "vase", 9, "cart", 1.0),
            ("yan", None, 5, "view", 2.0),
            ("zoe", "rug", 8, "swipe", 3.0),
            ("yan", "lamp", 4, "view", 4.0),
        ],
        columns=["user_id", "item_id", "timestamp", "event_type", "dwell"],
    )
    unseen.to_parquet(tmp_path / "unseen.parquet", index=False)
    workflow = load_workflow(data / "workflow")
    transformed = workflow.transform(Dataset(str(tmp_path / "unseen.parquet"))).to_ddf().compute()
    got = [
        {name: list(v) if isinstance(v, np.ndarray) else v for name, v in row.items()} for row in _lines(transformed)
    ]
    assert got == [
        {
            "user_id": "yan",
            "item_id-list": [3, 1],
            "timestamp-list": [4, 5],
            "event_type-list": [3, 3],
            "dwell-list": [4, 2],
        },
        {
            "user_id": "zoe",
            "item_id-list": [2, 6],
            "timestamp-list": [8, 9],
            "event_type-list": [2, 4],
            "dwell-list": [3, 1],
        },
    ]


def test_request_workflow_equals_catalogue_and_compiled_transform(data: Path) -> None:
    requests: list[list[str | None]] = [
        ["lamp"],
        ["vase", "rug", "sofa", "desk", "lamp"],  # longer than three: the last ones count
        ["rug", "rug"],
        ["desk", None, ""],
        [],
    ]
    rows = request_rows(data / "request_workflow", requests)
    assert rows == [[3], [5, 4, 3], [2, 2], [4, 2, 2], []]
    catalogue = Catalogue.load(data / "catalogue")
    transform = SessionTransform.load(data / "session_transform.json", catalogue.items["item_id"].combine_chunks())
    assert [got.tolist() for got in transform(*requests)] == rows
    assert catalogue.rows_of(requests[1])[-3:].tolist() == rows[1]


@pytest.mark.parametrize("ids", [["z", "b", "a", "ab", "10", "9"], [7, -3, 2**40, 0, 5, 4]])
def test_rows_follow_the_given_order_and_not_frequency(tmp_path: Path, ids: list[Any]) -> None:
    events = pd.DataFrame({"user_id": 1, "item_id": [*ids, *ids[3:], ids[4]], "timestamp": range(10)})
    workflow = sessions.build_session_workflow(ids, tmp_path / "s")
    table = sessions.transform_events(sessions.fit(workflow, events), events)
    assert table["item_id-list"].to_pylist() == [[3, 4, 5, 6, 7, 8, 6, 7, 8, 7]]
    request = sessions.build_request_workflow(pa.array(ids), tmp_path / "r", max_sequence_length=9)
    sessions.fit(request, pd.DataFrame({"item_id": [ids]}))
    assert request.transform(pd.DataFrame({"item_id": [ids[::-1], ids[:1]]}))["item_id"].map(list).tolist() == [
        [8, 7, 6, 5, 4, 3],
        [3],
    ]
    assert request_vocabulary(request).to_pylist() == ids


def test_without_a_shuffle_sessions_would_fall_apart(tmp_path: Path) -> None:
    events = pd.DataFrame({"user_id": list("abab"), "item_id": list("xyyx"), "timestamp": [1, 2, 3, 4]})
    workflow = sessions.fit(sessions.build_session_workflow(["x", "y"], tmp_path), events)
    torn = workflow.transform(Dataset(events, npartitions=2)).to_ddf().compute(scheduler="synchronous")
    assert len(torn) == 4  # two users in two partitions: NVTabular groups each partition by itself
    assert sessions.transform_events(workflow, events, 2)["item_id-list"].to_pylist() == [[3, 4], [4, 3]]


def test_a_step_of_a_workflow_runs_once_however_many_columns_are_read_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pd.DataFrame({"user_id": list("abab"), "item_id": list("xyyx"), "timestamp": [7200, 2, 3, 4]})
    settings = EventSettings(session_gap=3600, time_features=["gap", "hour"])
    workflow = sessions.fit(sessions.build_session_workflow(["x", "y"], tmp_path, derive=settings), events)
    runs: list[str] = []
    for kind in (SessionGap, TimeFeatures, SessionGroupby):
        stock = kind.transform

        def counted(self: Any, *arguments: Any, stock: Any = stock) -> Any:
            runs.append(type(self).__name__)
            return stock(self, *arguments)

        monkeypatch.setattr(kind, "transform", counted)
    table = sessions.transform_events(workflow, events)
    assert table["hour-list"].to_pylist() == [[3], [5], [3, 3]]
    assert sorted(runs) == ["SessionGap", "SessionGroupby", "TimeFeatures"]


def test_readers_of_a_step_do_not_change_it_for_each_other(tmp_path: Path) -> None:
    frame = pd.DataFrame({"user_id": [1, 2], "price": [1.0, np.nan]})
    priced = ["user_id", "price"] >> ops.FillMissing(1.0)
    logs = priced >> ops.LogOp() >> ops.Rename(postfix="_log")  # LogOp writes into its input
    workflow = sessions.fit(Workflow(logs["price_log"] + priced), frame)
    transformed = sessions.transform_dataset(workflow, frame, 1, "user_id")
    assert transformed["price"].tolist() == [1.0, 1.0]
    assert transformed["price_log"].tolist() == pytest.approx([np.log(2)] * 2)
    assert frame["price"].isna().sum() == 1


def test_only_the_known_form_is_compiled(tmp_path: Path) -> None:
    frame = pd.DataFrame({"item_id": [["a"], ["b"]]})
    workflow = Workflow(["item_id"] >> ops.Categorify(out_path=str(tmp_path)) >> ops.ListSlice(-5)).fit(Dataset(frame))
    with pytest.raises(DataError, match="one Categorify and one SessionSlice"):
        compile_session_transform(workflow)


def _lines(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")
