"""`missrec train` without a recipe: what it chooses for which data and device, what it says, and what a run stores."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from missrec_t4r import commands
from missrec_t4r.cli.app import app
from missrec_t4r.config import Recipe
from missrec_t4r.errors import ConfigError
from missrec_t4r.runs.run_folder import load_tensors
from missrec_t4r.training.auto import Facts, by_rules, choose
from tests import shop

N_ITEMS = 30
SMALL: dict[str, Any] = {"model.d_model": 8, "model.n_head": 2, "train.epochs": 1}


def write(folder: Path, longer: int = 0) -> Path:
    modalities = shop.random_modalities(N_ITEMS, {"text": 8, "image": 5}, seed=0, without={"image": [5]})
    return shop.write_circle(folder, [f"P{i}" for i in range(N_ITEMS)], modalities, longer=longer)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("long"), longer=60)


MOVIES = Facts(6_000, 1_000_000, 96, 400, 3_400, {"text": 1.0}, "cuda", 80 << 30, "bf16")


def test_short_sessions_are_trained_as_default_and_long_ones_as_long(short: Path, long: Path) -> None:
    for data, expected in ((short, "default"), (long, "long")):
        chosen = choose(data, device="cpu").recipe
        assert chosen == dataclasses.replace(Recipe.load(expected), name="auto")


def test_a_gpu_gets_a_wider_model_where_sessions_are_long_and_many() -> None:
    cpu, gpu = by_rules(MOVIES._replace(device="cpu")).recipe, by_rules(MOVIES).recipe
    assert gpu.model.d_model > cpu.model.d_model
    assert cpu == dataclasses.replace(Recipe.load("long"), name="auto")
    few = by_rules(MOVIES._replace(events=50_000)).recipe  # too few to fill a large model
    assert few == dataclasses.replace(Recipe.load("long"), name="auto")
    assert by_rules(MOVIES._replace(median=6)).recipe.model == Recipe.load("default").model


def test_a_catalogue_of_millions_is_sampled_and_little_memory_splits_the_batch_and_no_time_limit_is_set() -> None:
    large = by_rules(MOVIES._replace(items=3_000_000)).recipe.train
    split = by_rules(MOVIES._replace(memory=1 << 29)).recipe.train
    whole = by_rules(MOVIES).recipe.train
    assert (large.softmax, whole.softmax) == ("sampled", "auto")
    assert split.accumulate > whole.accumulate == 1
    assert split.batch_size == whole.batch_size  # the step is that of the whole batch
    assert {one.max_minutes for one in (large, split, whole)} == {0}


def test_the_command_says_why_in_three_lines_and_given_settings_win(long: Path, tmp_path: Path) -> None:
    words = ["train", "--data", str(long), "--out", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]
    ran = CliRunner().invoke(
        app, [*words, "--set", "model.max_sequence_length=20", "--set", "train.learning_rate=2e-3"]
    )
    assert ran.exit_code == 0, ran.output
    lines = " ".join(ran.stderr.split()).split("recipe auto: ")[1:]  # as long as they are, on a terminal of any width
    assert len(lines) == 3
    assert "40 training sessions (median 66 events" in lines[0], lines
    assert "sessions are long" in lines[1]
    assert "model.max_sequence_length=20" in lines[2]
    answer = json.loads(ran.stdout)
    assert answer["chosen"]["recipe"] == "long"
    assert answer["recipe"]["model"]["max_sequence_length"] == 20
    assert answer["recipe"]["train"]["learning_rate"] == 0.002
    assert answer["recipe"]["model"]["d_model"] == Recipe.load("long").model.d_model
    assert len(answer["chosen"]["reasons"]) == 3


def test_the_recipe_that_a_run_stores_trains_to_the_same_weights(short: Path, tmp_path: Path) -> None:
    first = commands.train(short, tmp_path / "first", settings=SMALL, device="cpu")
    stored = tmp_path / "first" / "recipe.json"
    again = commands.train(short, tmp_path / "again", recipe=stored, device="cpu")
    content = json.loads(stored.read_text())
    assert content["name"] == "auto"
    assert content["model"] == dataclasses.asdict(Recipe.load("default", SMALL).model)
    assert "chosen" in first
    assert "chosen" not in again
    assert first["valid_ndcg@10"] == again["valid_ndcg@10"]
    weights = [load_tensors(tmp_path / name / "weights.safetensors") for name in ("first", "again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_training_that_began_as_default_goes_on(short: Path, tmp_path: Path) -> None:
    commands.train(short, tmp_path, recipe="default", settings=SMALL, device="cpu")
    commands.train(short, tmp_path, settings=SMALL | {"train.epochs": 2}, device="cpu")
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert epochs == [0, 1]


def test_a_finished_run_is_found_again(short: Path, tmp_path: Path) -> None:
    train = {"data": short, "out": tmp_path, "settings": SMALL, "device": "cpu", "reuse": True}
    commands.train(**train)
    again = commands.train(**train)
    assert (again["found"], again["chosen"]["recipe"]) == (True, "default")


def test_auto_has_no_values_without_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no values of its own.*expected: a recipe with fixed values"):
        Recipe.load("auto")
    (tmp_path / "mine.yaml").write_text("extends: auto")
    with pytest.raises(ConfigError, match="mine extends 'auto'.*no values of its own"):
        Recipe.load(tmp_path / "mine.yaml")
