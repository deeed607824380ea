"""`missrec train --dry-run`: steps are counted as a training takes them, time and memory follow the settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from missrec_t4r import commands
from missrec_t4r.runs.run_folder import STATE_FILE, load_metadata
from tests import shop

SMALL: dict[str, Any] = {"model.d_model": 8, "model.n_head": 2, "train.batch_size": 32, "train.epochs": 3}


def plan(data: Path, out: Path, **settings: Any) -> dict[str, Any]:
    given = {name.replace("__", ".", 1): value for name, value in settings.items()}
    answer = commands.train(data, out, recipe="default", settings=SMALL | given, device="cpu", dry_run=True)
    assert not out.exists()
    return answer


def test_the_steps_are_those_of_the_training_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    planned = plan(data, tmp_path / "run", train__windows_per_session=1)  # as many windows in every epoch
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*")} == before
    settings = SMALL | {"train.windows_per_session": 1}
    commands.train(data, tmp_path / "run", recipe="default", settings=settings, device="cpu")
    status = json.loads(load_metadata(tmp_path / "run" / STATE_FILE)["facts"])["status"]
    assert planned["steps_per_epoch"] * 3 == status["step"]
    assert 0 < planned["predicted"]["probed_steps"] <= planned["steps_per_epoch"]


def test_time_is_that_of_the_epochs_until_a_limit_is_set(data: Path, tmp_path: Path) -> None:
    alone = {"model__n_neighbours": 0, "model__n_similar_items": 0}  # no score terms to tune afterwards
    long = plan(data, tmp_path / "run", train__epochs=100_000, **alone)["predicted"]
    assert long["minutes_at_most"] == pytest.approx(
        long["seconds_per_epoch"] * 100_000 / 60, rel=0.6
    )  # rounded seconds
    assert long["typical_epochs"] < 100
    assert 0 < long["typical_minutes"] < long["minutes_at_most"]
    limited = plan(data, tmp_path / "run", train__epochs=100_000, train__max_minutes=0.25, **alone)["predicted"]
    assert limited["minutes_at_most"] == 0.25


def test_memory_grows_by_the_copies_of_the_id_table(tmp_path: Path) -> None:
    n_items = 20_000
    folder = tmp_path / "data"
    modalities = shop.random_modalities(n_items, {"text": 4}, seed=0)
    shop.write_circle(folder, list(range(n_items)), modalities, n_users=4)
    tables = {"model__interest_ratio": 0.001, "train__windows_per_session": 1}
    small, large = (plan(folder, tmp_path / "run", model__d_model=width, **tables) for width in (8, 256))
    weights = 4 * (large["parameters"] - small["parameters"])
    grown = large["predicted"]["peak_memory_gib"] - small["predicted"]["peak_memory_gib"]
    assert grown * 2**30 > 6 * weights  # weights, gradient, two moments, average, the best ones, a checkpoint
    assert large["predicted"]["peak_memory_gib"] < large["predicted"]["memory_gib"]
