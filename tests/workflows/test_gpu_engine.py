"""The engine for the GPU makes the CPU's folder: the same code on frames of pandas, and on a stand-in for cuDF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from merlin.core.dispatch import HAS_GPU

from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl import pipeline
from missrec_t4r.etl.gpu import device as gpu
from missrec_t4r.etl.pipeline import etl
from tests.workflows.frame_kinds import PandasFiles, needs_cudf
from tests.workflows.tables import EVENTS, ITEMS, write
from tests.workflows.test_scale import OPTIONS, same_folder, shop, table


@pytest.fixture
def on_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--engine gpu`` computes with pandas."""
    monkeypatch.setattr(gpu, "open_device", PandasFiles)


def assert_same(tmp_path: Path, files: tuple[Path, Path], **options: Any) -> dict[str, Any]:
    """Run both engines and compare all they write; return the report."""
    cpu = etl(*files, tmp_path / "cpu", engine="memory", **options)
    found = etl(*files, tmp_path / "gpu", engine="gpu", **options)
    compare(tmp_path, cpu, found)
    return found


def compare(tmp_path: Path, cpu: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare the folders ``cpu`` and ``gpu`` of two runs, and what the runs returned."""
    same_folder(tmp_path / "cpu", tmp_path / "gpu")
    for split in ("train", "valid", "test"):
        assert table(tmp_path / "cpu", split).to_pylist() == table(tmp_path / "gpu", split).to_pylist()
    written = [json.loads((tmp_path / name / "etl.json").read_text()) for name in ("cpu", "gpu")]
    for report in (*written, cpu, found):
        del report["seconds"]
    assert written[0] == written[1]
    assert cpu | {"data": ""} == found | {"data": ""}
    for name in ("workflow/workflow.json", "request_workflow/workflow.json"):
        assert (tmp_path / "cpu" / name).read_text() == (tmp_path / "gpu" / name).read_text()


MORE: list[dict[str, Any]] = [
    {"k_core": 2, "min_item_count": 3, "unknown_items": "drop", "drop_columns": ["note"]},
    {"split": "time", "session_gap": "10s", "valid_from": 100, "test_from": 200},
]


@pytest.mark.gpu
@needs_cudf
@pytest.mark.parametrize("number", range(len(OPTIONS + MORE)))
def test_the_folder_is_the_cpus_on_a_gpu(tmp_path: Path, number: int) -> None:
    assert_same(tmp_path, write(tmp_path / "raw", shop(number)), **(OPTIONS + MORE)[number])


@pytest.mark.usefixtures("on_pandas")
def test_integer_ids_many_files_other_names_and_a_row_index(tmp_path: Path) -> None:
    events = shop(1).drop(columns="item_id").assign(sku=np.arange(400) % 9, user=np.arange(400) % 23, item_id="other")
    events = events.rename(columns={"timestamp": "at"}).assign(**{"Unnamed: 0": 1, "paid": events.aisle > 2})
    raw = tmp_path / "raw"
    raw.mkdir()
    for part in range(3):
        events.iloc[part::3].to_parquet(raw / f"part{part}.parquet", index=False)
    pd.DataFrame({"sku": range(7)}).to_parquet(tmp_path / "items.parquet")
    names = {"user_column": "user", "item_column": "sku", "time_column": "at"}
    found = assert_same(tmp_path, (raw, tmp_path / "items.parquet"), **names)
    assert {"row_index", "column_name_taken", "orphan_items"} <= {finding["check"] for finding in found["findings"]}


ODD: dict[str, tuple[pd.DataFrame, str]] = {
    "numbers as text": (EVENTS.assign(dwell=["1,5", "n/a", "2", "3", "4", "5", "6", "7", "8"]), "numbers"),
    "categories of pandas": (EVENTS.astype({"event_type": "category"}), "decoded"),
    "dates as text": (EVENTS.assign(timestamp=[f"2024-01-{day:02}" for day in range(1, 10)]), "converted"),
    "a zone": (EVENTS.assign(timestamp=pd.to_datetime(EVENTS.timestamp, unit="s", utc=True)), "converted"),
    "integer users with nulls": (EVENTS.assign(user_id=[1, 2, 1, 2, 1, None, 1, 2, 1]), "converted"),
    "a large integer": (EVENTS.assign(dwell=EVENTS.dwell.astype("uint64")), "value by value"),
}


@pytest.mark.usefixtures("on_pandas")
@pytest.mark.parametrize("kind", ODD)
def test_what_only_the_cpu_reads_is_read_there_and_said(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    events, reason = ODD[kind]
    with caplog.at_level("INFO"):
        assert_same(tmp_path, write(tmp_path / "raw", events))
    assert reason in caplog.text
    assert "the CPU reads the events" in caplog.text


@pytest.mark.usefixtures("on_pandas")
def test_csv_is_read_by_the_cpu(tmp_path: Path) -> None:
    EVENTS.to_csv(tmp_path / "events.csv", index=False)
    ITEMS.to_csv(tmp_path / "items.csv", index=False)
    assert_same(tmp_path, (tmp_path / "events.csv", tmp_path / "items.csv"))


@pytest.mark.usefixtures("on_pandas")
def test_bad_input_is_refused_in_the_same_words(tmp_path: Path) -> None:
    for events, kind in (
        (EVENTS.assign(user_id=None).astype({"user_id": str}), DataError),
        (EVENTS.drop(columns="user_id"), SchemaError),
    ):
        events = events.assign(user_id="") if "user_id" in events else events
        files = write(tmp_path / "raw", events)
        words = []
        for engine in ("memory", "gpu"):
            with pytest.raises(kind) as refused:
                etl(*files, tmp_path / "data", engine=engine)  # type: ignore[arg-type]  # from the tuple
            words.append(str(refused.value))
        assert words[0] == words[1]
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("on_pandas")
def test_a_workflow_file_runs_there_too(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "workflows" / "session_features.py"
    assert_same(tmp_path, write(tmp_path / "raw", shop(1)), workflow=example)


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_GPU:
        pytest.skip("a GPU is at hand")
    monkeypatch.setattr(gpu, "has_cudf", lambda: False)
    with pytest.raises(
        ConfigError, match="cuDF is not installed; expected: cuDF 24.12 and a GPU.*requirements/gpu.txt"
    ):
        etl(*write(tmp_path), tmp_path / "data", engine="gpu")
    monkeypatch.setattr(gpu, "has_cudf", lambda: True)
    with pytest.raises(ConfigError, match="no CUDA device.*nvidia-smi"):
        etl(*write(tmp_path), tmp_path / "data", engine="gpu")
    assert not (tmp_path / "data").exists()


def test_a_card_that_is_too_small_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Small(PandasFiles):
        def write_parquet(self, frame: pd.DataFrame, file: Path, compression: str | None = "snappy") -> None:
            raise MemoryError("std::bad_alloc: out_of_memory")

    monkeypatch.setattr(gpu, "open_device", Small)
    files = write(tmp_path / "raw")
    with pytest.raises(DataError, match="memory of the GPU does not suffice .*out_of_memory.*--engine disk"):
        etl(*files, tmp_path / "data", engine="gpu")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(gpu, "obstacle", lambda: None)
    monkeypatch.setattr(pipeline, "has_cudf", lambda: True)
    monkeypatch.setattr(pipeline, "GPU_EVENTS", len(EVENTS))
    with caplog.at_level("WARNING"):
        etl(*files, tmp_path / "data", workers=1)  # by itself it chose the GPU, so it goes on without it
    assert "the CPU begins again, out of core" in caplog.text
    assert (tmp_path / "data" / "state").is_dir()
    etl(*files, tmp_path / "memory", engine="memory")
    same_folder(tmp_path / "data", tmp_path / "memory")


def test_auto_takes_the_gpu_for_many_events_and_says_when_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "has_cudf", lambda: True)
    monkeypatch.setattr(gpu, "open_device", PandasFiles)
    files = write(tmp_path / "raw")
    with caplog.at_level("INFO"):
        if not HAS_GPU:
            monkeypatch.setattr(gpu, "has_cudf", lambda: True)
            assert etl(*files, tmp_path / "data", dry_run=True)["engine"] == "memory"
            assert "there is no CUDA device: on the CPU" in caplog.text
        monkeypatch.setattr(gpu, "obstacle", lambda: None)
        assert etl(*files, tmp_path / "data", dry_run=True)["engine"] == "memory"
    assert "fewer than 1,000,000 events in parquet: on the CPU" in caplog.text
    monkeypatch.setattr(pipeline, "GPU_EVENTS", len(EVENTS))
    assert etl(*files, tmp_path / "data", dry_run=True)["engine"] == "gpu"
    assert pipeline.ENGINES == ("auto", "memory", "disk", "gpu")
    assert etl(*files, tmp_path / "data", dry_run=True, dask_scheduler="processes")["engine"] == "memory"
