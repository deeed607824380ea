"""`benchmarks.quality.grid` on the CPU: trainings in their own processes, cut by the limit, gone on with, skipped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.quality import grid as module
from benchmarks.quality.grid import RESULTS_FILE, Job, grid, read_jobs
from missrec_t4r.errors import ConfigError, DataError
from tests.shop import random_modalities, write_circle

SMALL = {"model.d_model": 16, "model.max_sequence_length": 5, "train.epochs": 1}
ENDLESS = SMALL | {"train.epochs": 100_000, "train.patience": 100_000, "model.n_neighbours": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 40 short sessions."""
    folder = tmp_path_factory.mktemp("grid") / "data"
    return write_circle(folder, [f"P{n}" for n in range(12)], random_modalities(12, {"text": 6}, seed=3))


def _jobs(folder: Path, data: Path, *runs: dict[str, Any], evaluate: tuple[str, ...] = ("valid",)) -> list[Job]:
    file = folder / "settings.yaml"
    content = {"evaluate": list(evaluate), "runs": [{"data": "shop", "recipe": "tiny", **run} for run in runs]}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return read_jobs(file, {"shop": str(data)}, device="cpu")


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS_FILE).read_text(encoding="utf-8").splitlines()]


def _clock(over: Callable[[], bool]) -> Any:
    """A clock that stands still, and jumps past any limit once ``over`` is true."""
    return type("Clock", (), {"monotonic": lambda: 1e9 if over() else 0.0, "sleep": time.sleep})


def test_two_side_by_side_one_that_fails_and_a_second_call_that_trains_nothing(data: Path, tmp_path: Path) -> None:
    deep = SMALL | {"model.n_decoder_layers": 2}
    runs = [{"name": name, "set": deep if name == "two" else SMALL} for name in ("fails", "one", "two")]
    fails, *jobs = _jobs(tmp_path, data, *runs, evaluate=("test",))
    fails = fails._replace(folder=str(tmp_path / "nowhere"))
    found = grid([fails, *jobs], tmp_path / "out", side_by_side=2)
    assert [line["name"] for line in found] == ["one", "two"]
    written = {line["name"]: line["stopped_by"] for line in _lines(tmp_path / "out")}
    assert set(written) == {"fails", "one", "two"}
    assert written["fails"].startswith("failed: ")
    for line in found:
        assert line["stopped_by"] == "epochs"
        assert line["device"] == "cpu"
        assert set(line["test"]) == {"excluded", "kept_strict", "kept_with_history_term"}
        assert 0 < line["test"]["kept_strict"]["network"]["ndcg@10"] <= 1
        assert {"model", "network"} <= set(line["test"]["excluded"])
    weights = {run: run.stat().st_mtime_ns for run in (tmp_path / "out").glob("shop/*/seed-2020/weights.safetensors")}
    assert len(weights) == 2
    assert grid(jobs, tmp_path / "out") == found
    assert {run: run.stat().st_mtime_ns for run in weights} == weights
    assert len(_lines(tmp_path / "out")) == 3


def test_the_limit_interrupts_and_a_later_call_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _jobs(tmp_path, data, {"name": "long", "set": ENDLESS}, {"name": "later", "set": SMALL})
    out, curve = tmp_path / "out", tmp_path / "out/shop/long/seed-2020/log.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(module, "time", _clock(lambda: curve.is_file() and len(curve.read_text()) > 0))
        assert grid(jobs, out, minutes=1, grace=1e12) == []
    (cut,) = _lines(out)  # the second one was not started
    assert (cut["name"], cut["stopped_by"]) == ("long", "interrupt")
    assert 0 < cut["valid"]["excluded"]["network"]["ndcg@10"] <= 1
    first = json.loads(curve.read_text().splitlines()[0])

    with monkeypatch.context() as patched:
        patched.setattr(module, "time", _clock(lambda: len(curve.read_text().splitlines()) > cut["epochs"] + 1))
        assert [line["name"] for line in grid(jobs, out, side_by_side=2, minutes=1, grace=0.0)] in ([], ["later"])
    killed = next(line for line in _lines(out)[1:] if line["name"] == "long")
    assert killed["stopped_by"] == "killed"
    assert killed["epochs"] > cut["epochs"]
    assert json.loads(curve.read_text().splitlines()[0]) == first  # resumed, not started anew


def test_a_grid_that_is_terminated_ends_its_trainings_and_writes_their_lines(
    data: Path, tmp_path: Path, repository: Path
) -> None:
    _jobs(tmp_path, data, {"name": "long", "set": ENDLESS})
    out, curve = tmp_path / "out", tmp_path / "out/shop/long/seed-2020/log.jsonl"
    words = [str(tmp_path / "settings.yaml"), "--data", f"shop={data}", "--out", str(out), "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-m", "benchmarks.quality.grid", *words], cwd=repository) as process:
        while process.poll() is None and not (curve.is_file() and curve.read_text()):
            time.sleep(0.2)
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = _lines(out)
    assert line["stopped_by"] == "killed"
    assert line["epochs"] >= 1


def test_finished_lines_are_not_taken_for_those_of_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items, folder, out = [f"P{n}" for n in range(12)], tmp_path / "shop", tmp_path / "out"
    write_circle(folder, items, random_modalities(12, {"text": 6}, seed=3))
    (job,) = _jobs(tmp_path, folder, {"name": "one", "set": SMALL})
    words = [str(tmp_path / "settings.yaml"), "--data", f"shop={folder}", "--out", str(out), "--device", "cpu"]
    module.main([*words, "--minutes", "1e-9"])  # prepares, starts nothing
    (out / RESULTS_FILE).write_text(json.dumps({**job.asked, "stopped_by": "epochs"}) + "\n")
    module.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"] == 1
    write_circle(folder, items, random_modalities(12, {"text": 6}, seed=4))
    with pytest.raises(DataError, match="prepared otherwise: data_folder was"):
        module.main(words)
    shutil.rmtree(out / "shop")  # one of the message's cures; the lines stay, and nothing says any more of which data
    with pytest.raises(DataError, match="has finished lines of shop, .* give another --out or another name"):
        module.main(words)
    assert not (out / "shop").exists()


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"name": "a", "set": {"model.d_modell": 8}}, "d_modell"),
        ({"name": "a", "seed": 3}, "unknown setting of a run in .*: seed; .* did you mean 'seeds'"),
        ({"name": "../a"}, "names a folder"),
        ({"name": "a", "data": "other"}, "nothing to train"),
        ({"name": "a", "seeds": [1, 1]}, "twice"),
    ],
)
def test_a_wrong_settings_file_is_refused_before_anything_trains(
    data: Path, tmp_path: Path, run: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        _jobs(tmp_path, data, run)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs: [", "cannot be read"),
        ("evaluate: [test]", "has no runs"),
        ("run: []\nruns: [{}]", "unknown setting in .*mine.yaml: run; .* did you mean 'runs'"),
        ("evaluate: [tset]\nruns: [{}]", "unknown split in .*mine.yaml: tset; .* did you mean 'test'"),
    ],
)
def test_a_settings_file_without_runs_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_jobs(tmp_path / "mine.yaml", {})


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("grid_gpu.yaml", {"ml1m", "instruments", "beauty", "scientific", "subset"}),
        ("grid_network.yaml", {"subset"}),
        ("grid_subset.yaml", {"subset"}),
    ],
)
def test_the_prepared_settings_are_valid(repository: Path, file: str, names: set[str]) -> None:
    jobs = read_jobs(repository / "benchmarks/quality" / file, dict.fromkeys(names, "nowhere"))
    assert {job.data for job in jobs} == names
