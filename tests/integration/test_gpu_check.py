"""``make gpu-check`` in its smallest size on the CPU: every part runs, and its result has the promised form."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import ALL, lines_that_wait, main
from benchmarks.gpu_etl import Record
from benchmarks.measure import write_result
from missrec_t4r.training import step as training_step
from tests.device.test_waiting import _trainer


@pytest.mark.skipif(torch.cuda.is_available(), reason="its figures would be those of the GPU: run make gpu-check")
def test_every_part_runs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvtabular", reason="the part etl runs NVTabular")
    monkeypatch.setattr(gpu_check, "_driver", lambda: None)
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


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="its figures would be those of the GPU: run make gpu-check")
def test_the_ensemble_is_measured_through_a_real_triton(tmp_path: Path) -> None:
    assert main(["serve", "--tiny", "--results", str(tmp_path)]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["failed"] == []
    assert found["served_by"] == "triton, gRPC"
    assert set(found["serve"]) == {"p50_1", "p50_64", "sessions_per_s"}
    assert all(value > 0 for value in found["serve"].values())


def test_a_part_that_fails_is_named_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu_check.LIMITS", {"rank": 0.002, "serve": 0.002})
    assert main(["rank", "serve", "--tiny", "--results", str(tmp_path)]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["failed"] == ["rank: stopped at its limit of 0.01 s", "serve: stopped at its limit of 0.01 s"]
    assert "FAILED  rank: stopped" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run everything")
def test_where_torch_finds_no_gpu_the_parts_say_why_and_do_not_fill_the_memory_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver older than torch's CUDA looks like no GPU; the etl has an environment of its own."""
    started: list[str] = []

    def run(part: str, *_: Any) -> list[str]:
        started.append(part)
        return []

    monkeypatch.setattr(gpu_check, "_run", run)
    monkeypatch.setattr(gpu_check, "_driver", lambda: "550.54")
    assert main(["etl", "rank", "serve", "--results", str(tmp_path)]) == 0
    assert started == ["etl"]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [one.partition(":")[0] for one in found["failed"]] == ["rank", "serve"]
    assert f"rank: torch {torch.__version__}, built for" in found["failed"][0]
    assert "finds no GPU (nvidia-smi shows driver 550.54)" in capsys.readouterr().out


def test_the_result_is_written_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in slim containers: the check would end before its first part."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.loads(write_result("gpu-check", {}, tmp_path).read_text())["commit"] == "unknown"


def test_the_table_says_what_a_figure_is_compared_with_and_what_is_wrong() -> None:
    found = {
        **{"card": "H200", "driver": "580.1", "torch": "2.13.0", "rapids": None, "tiny": False, "failed": ["serve: x"]},
        **{"train": {"paper_512": 80.0, "terms_ml1m_s": 2.5}, "without_graphs": {"paper_512": 40.0, "ml1m_200": 7.0}},
        **{"graphs": {"paper_512": 3}, "rank": {"1000/1": 0.6}, "roofline": {"1000/1": {"at_copy_rate_ms": 0.3}}},
        **{"serve": {"sessions_per_s": 900.0, "p50_1": 2.0}, "etl": {"1000": 0.5}},
        **{"compared": {"train": 1e-6, "serve": 0.5}, "bounds": {"train": 1e-3, "serve": 1e-5}},
    }
    lines = [" ".join(line.split()) for line in gpu_check._table_of(found).splitlines()]
    assert lines == [
        "H200, driver 580.1, torch 2.13.0, RAPIDS None",
        "etl 1000 0.5 s",
        "train paper_512 80.0 targets/s 2.00 times the 40.0 without graphs; 3 shapes recorded",
        "train terms_ml1m_s 2.5 s",
        "rank 1000/1 0.6 ms to read the tokens once takes 0.3 ms",
        "serve sessions_per_s 900.0 sessions/s",
        "serve p50_1 2.0 ms",
        "train ml1m_200 7.0 targets/s, without graphs",
        "equal train 1e-06 apart, at most 0.001: equal",
        "equal serve 0.5 apart, at most 1e-05: DIFFERENT",
        "FAILED serve: x",
        "1 of 2 comparisons equal; 1 failed",
    ]


def test_a_training_is_measured_when_the_graphs_of_its_batches_are_recorded() -> None:
    """Shapes of the first epoch need not come again, and large batches come a few times in all."""

    class Trainer:
        def __init__(self, recorded: list[int]) -> None:
            self.recorded, self.epochs, self.status = recorded, 0, {"step": 0}
            self.graphed = SimpleNamespace(graphs={}, obstacle="")

        def _epoch(self) -> dict[str, float]:
            self.status["step"] += 2
            self.graphed.graphs |= dict.fromkeys(range(sum(self.recorded[: self.epochs + 1])))
            self.epochs += 1
            return {"positions_per_s": float(self.epochs)}

    assert gpu_check._rate(Trainer([0, 0, 2, 0, 0])) == 5.0
    assert gpu_check._rate(Trainer([1] * 20)) == gpu_check._RECORDING + 1
    failed = Trainer([0])
    failed.graphed.obstacle = "out of memory"
    assert gpu_check._rate(failed) == 1.0


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
    file = tmp_path / "made"
    monkeypatch.setattr(gpu_check, "_command", lambda *_: [sys.executable, "-S", "-c", made.format(str(file))])

    def until_made(process: subprocess.Popen[bytes], _: float) -> bool:
        while process.poll() is None and not (file.is_file() and file.read_text()):
            time.sleep(0.01)
        return False  # its time is over

    monkeypatch.setattr(gpu_check, "_runs", until_made)
    main(["rank", "--tiny", "--results", str(tmp_path)])
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["failed"][0].startswith("rank: stopped at its limit")
    assert not Path(file.read_text().strip()).exists()


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
