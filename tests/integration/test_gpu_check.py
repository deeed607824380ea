"""``make gpu-check`` in its smallest size on the CPU: every part runs, and its result has the promised form."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import ALL, lines_that_wait, main
from benchmarks.gpu_etl import Record
from missrec_t4r.training import step as training_step
from tests.device.test_waiting import _trainer


@pytest.mark.skipif(torch.cuda.is_available(), reason="its figures would be those of the GPU: run make gpu-check")
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("nvtabular", reason="the part etl runs NVTabular")
    assert main(["--tiny", "--in-process", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-gpu-check.json")
    found = json.loads(file.read_text())
    assert found["failed"] == []
    assert found["equal"] is True
    assert found["card"] is None
    assert found["driver"] is None
    assert {name.partition("/")[0] for name in found["compared"]} == set(ALL)
    assert set(found["etl"]) == {"2000"}
    assert found["etl_engine"].startswith("memory: ")
    assert set(found["train"]) == {
        *("paper_512", "paper_4096", "default_512", "default_8192"),
        *("ml1m_200", "terms_ml1m_s"),
    }
    assert set(found["without_graphs"]) == set(found["train"]) - {"terms_ml1m_s"}
    assert "train/graphs" in found["compared"]
    assert found["waits"] == {"paper": [], "default": [], "long": []}
    assert set(found["rank"]) == set(found["roofline"]) == {"2000/1", "2000/64"}
    assert set(found["serve"]) == {"p50_1", "p50_64", "sessions_per_s"}
    assert all(value > 0 for part in ALL for value in found[part].values())


def test_a_part_that_fails_is_named_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu_check.LIMITS", {"rank": 0.002, "serve": 0.002})
    assert main(["rank", "serve", "--tiny", "--results", str(tmp_path)]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["failed"] == ["rank: stopped at its limit of 0.01 s", "serve: stopped at its limit of 0.01 s"]
    assert "failed: rank: stopped" in capsys.readouterr().out


def test_a_part_has_the_time_that_those_before_it_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cuDF the part etl ends at once: what comes after it may then take longer."""
    limits: list[float] = []

    def run(part: str, found: Path, limit: float, *_: Any) -> list[str]:
        limits.append(limit)
        return []

    monkeypatch.setattr(gpu_check, "LIMITS", {"etl": 20, "rank": 10, "serve": 30})
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    monkeypatch.setattr(gpu_check, "_run", run)
    main(["etl", "rank", "serve", "--tiny", "--results", str(tmp_path)])
    assert limits == pytest.approx([20, 30, 60], abs=1)


def test_a_part_that_is_stopped_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = "import tempfile, time; print(tempfile.mkdtemp(), file=open({!r}, 'w'), flush=True); time.sleep(60)"
    code = made.format(str(tmp_path / "made"))
    monkeypatch.setattr(gpu_check, "LIMITS", {"rank": 2})
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    monkeypatch.setattr(gpu_check, "_command", lambda *_: [sys.executable, "-S", "-c", code])
    main(["rank", "--tiny", "--results", str(tmp_path)])
    assert not Path((tmp_path / "made").read_text().strip()).exists()


def test_what_was_found_is_kept_where_the_check_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.dumps({"at": ["rank", "1000000/1"], "value": 0.5})
    code = f"import sys, time; print('{found}', file=open(sys.argv[1], 'a'), flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu_check, "_command", lambda part, file, _: [sys.executable, "-c", code, str(file)])
    kept: list[dict[str, object]] = []

    def cut(process: object, seconds: float, runs: Callable[..., bool] = gpu_check._runs) -> bool:
        (file,) = tmp_path.glob("*-gpu-check.json")
        kept.append(json.loads(file.read_text()))
        if kept[-1]["rank"]:
            raise KeyboardInterrupt
        return runs(process, 0.05)

    monkeypatch.setattr(gpu_check, "_runs", cut)
    with pytest.raises(KeyboardInterrupt):
        main(["rank", "serve", "--tiny", "--results", str(tmp_path)])
    assert kept[0]["rank"] == {}
    assert kept[-1]["rank"] == {"1000000/1": 0.5}
    assert kept[-1]["failed"] == ["rank: not finished", "serve: not begun"]


def test_a_failure_names_the_line_of_the_package(tmp_path: Path) -> None:
    record = Record(tmp_path / "found")
    with record.step("train/equal"):
        training_step.batch_totals(None, None)  # type: ignore[arg-type]
    (failed,) = [json.loads(line)["failed"] for line in record.file.read_text().splitlines()]
    assert re.fullmatch(r"train/equal: AttributeError: .* \(missrec_t4r/training/step\.py:\d+\)", failed)


@pytest.mark.filterwarnings("ignore:called a synchronizing CUDA operation")  # of the first step, which is not watched
def test_all_lines_that_wait_for_the_device_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA warns where the host waits; what comes before it in the stack are lines of other packages."""
    orthogonality_loss = training_step.orthogonality_loss

    def loss(*given: Any, **named: Any) -> torch.Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return orthogonality_loss(*given, **named)

    monkeypatch.setattr(training_step, "orthogonality_loss", loss)
    trainer = _trainer(tmp_path, "tiny", {}, "cpu")
    (line,) = lines_that_wait(trainer)
    assert re.fullmatch(r"missrec_t4r/training/step\.py:\d+", line)
    monkeypatch.undo()
    assert lines_that_wait(_trainer(tmp_path / "next", "tiny", {}, "cpu")) == []


def test_the_etl_runs_in_an_environment_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("nvtabular", reason="the part etl runs NVTabular")
    other = tmp_path / "python"
    hide = "import sys; sys.modules['torch'] = None; sys.argv = ['gpu_etl', *sys.argv[3:]]"
    start = f"{hide}; import runpy; runpy.run_module('benchmarks.gpu_etl', run_name='__main__')"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -c "{start}" "$@"\n')
    other.chmod(0o755)
    assert main(["etl", "--tiny", "--etl-python", str(other), "--results", str(tmp_path)]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["failed"] == []
    assert found["etl"]["2000"] > 0
