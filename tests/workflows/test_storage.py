"""Stored workflows: the same transform and schema after loading; strangers and changed files are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from merlin.io import Dataset
from nvtabular import Workflow, ops

from missrec_t4r.errors import DataError
from missrec_t4r.etl.event_settings import EventSettings
from missrec_t4r.etl.nvt.event_ops import KCore
from missrec_t4r.etl.nvt.serialization import load_workflow, save_workflow
from missrec_t4r.etl.nvt.workflows import build_session_workflow, fit, transform_dataset
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.io.hashing import json_digest
from tests.workflows.tables import EVENTS, write

SOME = settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)


def _lines(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


@SOME
@given(st.integers(0, 10_000), st.booleans(), st.none() | st.integers(1, 4))
def test_a_session_workflow_transforms_as_before(
    tmp_path_factory: pytest.TempPathFactory, seed: int, derived: bool, longest: int | None
) -> None:
    folder, chance = tmp_path_factory.mktemp("stored"), np.random.default_rng(seed)
    events = pd.DataFrame(
        {
            "user_id": chance.choice(list("abc"), 30),
            "item_id": chance.choice(["x", "y", "z", "new", None], 30),
            "timestamp": chance.integers(0, 90, 30),
            "event_type": chance.choice(["view", "buy"], 30),
            "dwell": chance.random(30).astype("float32"),
        }
    )
    derive = EventSettings({"buy": 2.0}, session_gap=20, time_features=["gap", "hour", "recency"]) if derived else None

    def fitted(storage: Path) -> Workflow:
        categories = {"event_type": pd.Series(["view", "buy"])}
        options: dict[str, Any] = {"numbers": ["dwell"], "max_events": longest, "derive": derive}
        return fit(build_session_workflow(["x", "y", "z"], storage, categories=categories, **options), events)

    save_workflow(fitted(folder / "build"), folder / "stored")
    shutil.rmtree(folder / "build")
    loaded = load_workflow(shutil.move(folder / "stored", folder / "moved"))
    assert not list((folder / "moved").rglob("*.pkl"))
    save_workflow(load_workflow(folder / "moved"), folder / "again")
    kept = [json.loads((folder / name / "workflow.json").read_text()) for name in ("moved", "again")]
    assert kept[0] == kept[1]
    fresh = fitted(folder / "fresh")
    expected, got = (transform_dataset(workflow, events, 1, "user_id") for workflow in (fresh, loaded))
    assert _lines(got) == _lines(expected)
    assert [(column.name, column.dtype, column.tags) for column in loaded.output_schema] == [
        (column.name, column.dtype, column.tags) for column in fresh.output_schema
    ]


def test_what_operators_learned_is_kept(tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": list("aabc"), "item": [1, 2, 1, 3], "price": [1.0, 2.0, 3.0, 6.0]})
    learned = ["user", "item"] >> KCore(["user", "item"], 1)
    scaled = ["price"] >> ops.Normalize() >> ops.Rename(postfix="_scaled")
    learned_ids = ["item"] >> ops.Categorify(out_path=str(tmp_path / "build")) >> ops.Rename(postfix="_row")
    workflow = Workflow(learned + scaled + learned_ids).fit(Dataset(frame))
    save_workflow(workflow, tmp_path / "stored")
    loaded = load_workflow(tmp_path / "stored")
    unseen = frame.assign(item=[3, 9, 1, 2], price=[0.0, 1.0, 2.0, 3.0])
    left, right = (made.transform(unseen[:1]) for made in (workflow, loaded))
    assert left.to_dict() == right.to_dict()


def test_functions_are_no_data(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0]})
    workflow = Workflow(["x"] >> ops.LambdaOp(lambda column: column + 1)).fit(Dataset(frame))
    with pytest.raises(DataError, match=r"operator LambdaOp; expected: one of .*--save-nvtabular-workflow"):
        save_workflow(workflow, tmp_path / "stored")
    renamed = Workflow(["x"] >> ops.Rename(f=lambda name: name * 2)).fit(Dataset(frame))
    with pytest.raises(DataError, match="Rename holds a function, which is not plain data"):
        save_workflow(renamed, tmp_path / "stored")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    etl(*write(tmp_path), tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.pkl"))
    return tmp_path / "data" / "workflow"


def test_changed_files_are_refused(stored: Path) -> None:
    file = stored / "workflow.json"
    whole = file.read_text()
    file.write_text(whole.replace('"lamp"', '"lamb"').replace('"start"', '"end"').replace("timestamp", "timestomp", 1))
    with pytest.raises(DataError, match="workflow.json in .* was changed or lost"):
        load_workflow(stored)
    file.write_text(whole[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        load_workflow(stored)
    file.write_text(whole)
    vocabulary = stored / "categories" / "unique.item_id.parquet"
    content = vocabulary.read_bytes()
    vocabulary.write_bytes(content[:40] + b"!" + content[41:])
    with pytest.raises(DataError, match="categories/unique.item_id.parquet in .* was changed or lost"):
        load_workflow(stored)
    vocabulary.unlink()
    with pytest.raises(DataError, match="was changed or lost"):
        load_workflow(stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda node: node.update(operator="LambdaOp"), "names the operator 'LambdaOp'"),
        (lambda node: node.update(operator="os.system"), "names the operator 'os.system'"),
        (lambda node: node["state"].update(transform="x"), "sets 'transform'; expected: settings only"),
        (lambda node: node["state"].update(__class__="x"), "sets '__class__'"),
    ],
)
def test_strange_operators_are_refused_even_with_a_right_checksum(stored: Path, change: Any, words: str) -> None:
    graph = json.loads((stored / "workflow.json").read_text())
    del graph["sha256"]
    change(graph["nodes"][0])
    (stored / "workflow.json").write_text(json.dumps(graph | {"sha256": json_digest(graph)}))
    with pytest.raises(DataError, match=words):
        load_workflow(stored)


def test_nvtabulars_own_format_is_there_on_request(tmp_path: Path) -> None:
    etl(*write(tmp_path), tmp_path / "data", save_nvtabular_workflow=True)
    theirs, ours = (
        Workflow.load(str(tmp_path / "data" / "nvtabular_workflow")),
        load_workflow(tmp_path / "data" / "workflow"),
    )
    events = EVENTS.drop(columns="split")
    assert _lines(theirs.transform(events)) == _lines(ours.transform(events))
