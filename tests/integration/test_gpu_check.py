"""``make gpu-check`` in its smallest size on the CPU: every part runs, and its result has the promised form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import ALL, main


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
