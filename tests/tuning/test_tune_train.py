"""`missrec tune train`: a search by Optuna that goes on, is shared, reads no test session, and ends with a recipe."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from missrec_t4r import commands
from missrec_t4r.cli.app import app
from missrec_t4r.config import Recipe
from missrec_t4r.errors import ConfigError
from missrec_t4r.training.trainer import Trainer
from missrec_t4r.tuning.space import DEFAULT, space_around
from missrec_t4r.tuning.train import STUDY_FILE, tune_train
from tests import processes, shop

N_ITEMS = 30
SMALL: dict[str, Any] = {
    "model.d_model": 8,
    "model.n_head": 2,
    "model.n_decoder_layers": 1,
    "train.epochs": 4,
    "train.batch_size": 64,
}
SPACE = {"train.learning_rate": {"low": 1e-5, "high": 0.1, "log": True}, "model.dropout": [0.0, 0.5]}
needs_optuna = pytest.mark.usefixtures("_optuna")


@pytest.fixture
def _optuna() -> None:
    pytest.importorskip("optuna", reason="the search needs the extra tune")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A shop without a test split: a search that reads it fails."""
    modalities = shop.random_modalities(N_ITEMS, {"text": 8}, seed=0)
    folder = shop.write_circle(tmp_path / "data", [f"P{i}" for i in range(N_ITEMS)], modalities)
    shutil.rmtree(folder / "test")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return folder


def search(data: Path, **given: Any) -> dict[str, Any]:
    start: dict[str, Any] = {"recipe": "default", "settings": SMALL, "space": data.parent / "space.yaml"}
    return tune_train(data, data.parent / "search", **(start | {"trials": 2, "device": "cpu"} | given))


@needs_optuna
def test_a_search_ends_with_a_recipe_that_trains_to_what_it_found(data: Path) -> None:
    found = search(data, trials=6)
    assert sum(found["trials"].values()) == 6
    assert found["valid_ndcg@10"] >= found["valid_ndcg@10_of_the_recipe"] > 0  # the recipe itself is the first trial
    trained = commands.train(data, data.parent / "run", recipe=found["recipe"], device="cpu")
    if found["trials"].get("complete", 0) == 6:
        assert trained["valid_ndcg@10"] == pytest.approx(found["valid_ndcg@10"])
    recipe = Recipe.load(found["recipe"])
    assert (recipe.model.d_model, recipe.train.epochs, recipe.train.max_minutes) == (8, 4, 0.0)
    for name, value in found["changes"].items():
        section, _, setting = name.partition(".")
        assert getattr(getattr(recipe, section), setting) == value
    page = Path(found["page"]).read_text()
    assert page.count("<polyline") == 6
    assert "the recipe itself" in page
    assert sorted(file.name for file in (data.parent / "search").iterdir() if not file.name.startswith(".")) == [
        "best.yaml",
        STUDY_FILE,
        "trials.html",
    ]


@needs_optuna
def test_the_same_command_goes_on_and_another_search_is_refused(data: Path) -> None:
    first = search(data)
    again = search(data, trials=3)
    assert (sum(first["trials"].values()), sum(again["trials"].values())) == (2, 5)
    assert again["valid_ndcg@10"] >= first["valid_ndcg@10"]
    with pytest.raises(ConfigError, match=r"a search with other recipe \(train.epochs 4 -> 3\).*give another --out"):
        search(data, settings=SMALL | {"train.epochs": 3})
    with pytest.raises(ConfigError, match="a search with other space"):
        search(data, space=None)


@needs_optuna
def test_time_ends_a_search_and_a_trial_that_it_cuts_is_kept(data: Path) -> None:
    found = search(data, minutes=1e-6, trials=0)
    assert found["stopped_by"] == "minutes"
    assert found["trials"] == {"pruned": 1}  # not to be told from a bad one: it had no time
    assert found["valid_ndcg@10"] >= 0
    assert Path(found["recipe"]).is_file()


@needs_optuna
def test_nothing_is_written_beside_the_folder(data: Path) -> None:
    """Of a mounted folder the parent is often read-only; here the place of a lock beside it is taken."""
    (data.parent / ".search.lock").mkdir()
    assert search(data, trials=1)["trials"] == {"complete": 1}


@needs_optuna
def test_a_search_without_a_time_limit_trains_to_the_end(data: Path) -> None:
    found = search(data, minutes=math.inf, trials=1, settings=SMALL | {"train.epochs": 1})
    assert (found["stopped_by"], found["trials"]) == ("trials", {"complete": 1})


@needs_optuna
def test_a_bad_trial_is_pruned(data: Path) -> None:
    import optuna

    (data.parent / "space.yaml").write_text(yaml.safe_dump({"train.learning_rate": [1e-9, 0.01]}))
    settings = SMALL | {"train.epochs": 12, "train.patience": 12}
    search(data, trials=1, settings=settings)
    study = optuna.load_study(study_name="train", storage=f"sqlite:///{data.parent / 'search' / STUDY_FILE}")
    for rate in (0.01, 0.01, 0.01, 1e-9):
        study.enqueue_trial({"train.learning_rate": rate})
    found = search(data, trials=4, settings=settings)
    *good, bad = study.trials
    assert found["trials"] == {"complete": 4, "pruned": 1}
    assert {len(trial.intermediate_values) for trial in good} == {12}
    assert len(bad.intermediate_values) < 12
    assert found["best_trial"] != bad.number


@needs_optuna
def test_a_trial_that_does_not_fit_into_a_gpu_is_refused_and_the_search_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import optuna

    (data.parent / "space.yaml").write_text(yaml.safe_dump({"train.batch_size": [32, 64, 128]}))
    settings = {name: value for name, value in SMALL.items() if name != "train.batch_size"} | {"train.epochs": 2}
    search(data, trials=1, settings=settings)
    study = optuna.load_study(study_name="train", storage=f"sqlite:///{data.parent / 'search' / STUDY_FILE}")
    for size in (128, 32):
        study.enqueue_trial({"train.batch_size": size})
    take = Trainer._step

    def step(trainer: Any, *given: Any) -> Any:
        if trainer.recipe.train.batch_size == 128 and trainer.status["epoch"] == 1:
            trainer.trial.report(1.0, 2)  # whatever it has reached
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return take(trainer, *given)

    monkeypatch.setattr(Trainer, "_step", step)
    found = search(data, trials=2, settings=settings)
    assert found["trials"] == {"complete": 2, "fail": 1}
    assert "trial 1 is refused: a training that does not fit into the GPU's memory" in caplog.text
    assert "<td>refused</td>" in Path(found["page"]).read_text()
    assert found["best_trial"] != 1  # its recipe could not be trained


@needs_optuna
def test_ctrl_c_keeps_what_was_found_and_a_killed_trial_is_tried_again(data: Path) -> None:
    options = [f"--set={name}={value}" for name, value in (SMALL | {"train.epochs": 100_000}).items()]
    out = data.parent / "search"
    words = ["--data", data, "--out", out, "--recipe", "default", "--space", data.parent / "space.yaml"]
    command = ["-m", "missrec_t4r", "tune", "train", *words, "--device", "cpu", "--set=train.patience=100000", *options]

    def until(done: Any) -> None:
        ends = time.monotonic() + 300
        while not done():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < ends
            time.sleep(0.3)

    process = processes.start(command)
    until(lambda: _epochs(out, trial=1) > 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    drawn = _trials(out)[0].params
    process = processes.start(command)
    until(lambda: _epochs(out, trial=2) > 2)
    process.send_signal(signal.SIGINT)
    answer, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    found = json.loads(answer)
    assert found["stopped_by"] == "interrupt"
    assert found["trials"] == {"pruned": 1, "fail": 1}
    assert _trials(out)[1].params == drawn
    assert Recipe.load(found["recipe"]).train.epochs == 100_000
    page = Path(found["page"]).read_text()
    assert "<td>killed</td>" in page
    assert "<td>interrupt</td>" in page


def _trials(out: Path) -> list[Any]:
    import optuna

    return optuna.load_study(study_name="train", storage=f"sqlite:///{out / STUDY_FILE}").trials


def _epochs(out: Path, trial: int) -> int:
    """Return how many epochs of a trial are stored, without touching what a process is making."""
    try:
        with sqlite3.connect(f"file:{out / STUDY_FILE}?mode=ro", uri=True) as study:
            rows = study.execute("select count(*) from trial_intermediate_values where trial_id = ?", (trial,))
            return int(rows.fetchone()[0])
    except sqlite3.OperationalError:  # no file, or no table so far
        return 0


@needs_optuna
def test_two_processes_share_a_search(data: Path) -> None:
    words = ["tune", "train", "--data", data, "--out", data.parent / "search", "--recipe", "default", "--trials", 2]
    options = [f"--set={name}={value}" for name, value in SMALL.items()]
    command = ["-m", "missrec_t4r", *words, *options, "--device", "cpu", "--space", data.parent / "space.yaml"]
    both = [processes.start(command) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    trials = _trials(data.parent / "search")
    assert len(trials) == 4
    assert len({tuple(trial.user_attrs["process"]) for trial in trials}) == 2


def test_a_search_is_not_written_among_the_files_of_something_else(data: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder of a search: it holds catalogue, .*a new folder, or that of a"):
        commands.tune_train(data, data, minutes=1)


def test_what_is_given_is_not_varied_and_the_recipe_lies_in_the_space(tmp_path: Path) -> None:
    recipe = Recipe.load("long", {"model.dropout": 0.9})
    space = space_around(recipe, None, {"model.d_model": 128})
    assert set(DEFAULT) - set(space) == {"model.d_model"}
    assert space["model.dropout"].samples()[1] == 0.9
    file = tmp_path / "space.yaml"
    for content, words in (
        ("model.droput: [0.1, 0.2]", "unknown setting model.droput.*'dropout'"),
        ("model.dropout: [0.1, 1.5]", r"model.dropout 1.5 is outside \[0, 1\)"),
        ("model.dropout: {low: 0.5, high: 0.1}", "space of model.dropout.*low below high"),
        ("model.dropout: 0.1", "space of model.dropout.*two values or more"),
        ("- a", "holds list"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=words):
            space_around(recipe, file, {})


def test_without_optuna_the_command_says_what_to_install(data: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['optuna'] = None; from missrec_t4r.cli import app; app()"
    words = ["tune", "train", "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ)
    assert "pip install 'missrec-t4r[tune]'" in ran.stderr
    assert ran.returncode == 2
    assert CliRunner().invoke(app, ["tune", "train", "--help"]).exit_code == 0
