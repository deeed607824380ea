"""``--dry-run`` beside the night's own commands: imports, adoption, pre-training; what it says is what then happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app
from tests.workflows.tables import save_vectors

USERS, ITEMS = 12, 9


def _events() -> pd.DataFrame:
    chance = np.random.default_rng(5)
    rows = [(user, item, 1_500_000_000 + place) for user in range(USERS) for place, item in enumerate(_drawn(chance))]
    return pd.DataFrame(rows, columns=["userId", "movieId", "timestamp"]).assign(rating=4.0)


def _drawn(chance: np.random.Generator) -> list[int]:
    return [int(item) for item in chance.permutation(ITEMS)[:5]]


def _movielens(folder: Path) -> list[object]:
    (folder / "ml").mkdir()
    columns = ["userId", "movieId", "rating", "timestamp"]
    _events()[columns].to_csv(folder / "ml" / "ratings.csv", index=False)
    films = pd.DataFrame(
        {"movieId": range(ITEMS), "title": [f"Film {n} (1999)" for n in range(ITEMS)], "genres": "Drama"}
    )
    films.to_csv(folder / "ml" / "movies.csv", index=False)
    return ["import", "movielens", "--archive", folder / "ml", "--out", folder / "raw"]


def _amazon(folder: Path) -> list[object]:
    named = _events().rename(columns={"userId": "user_id", "movieId": "parent_asin"})
    reviews = [
        {**row, "timestamp": 1000 * row["timestamp"]} for row in named.astype({"user_id": str}).to_dict("records")
    ]
    for file, rows in (
        ("reviews.jsonl", [{**row, "parent_asin": f"B{row['parent_asin']}"} for row in reviews]),
        ("meta.jsonl", [{"parent_asin": f"B{n}", "title": f"thing {n}", "categories": ["a"]} for n in range(ITEMS)]),
    ):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--reviews", folder / "reviews.jsonl", "--metadata", folder / "meta.jsonl"]
    return ["import", "amazon-2023", *files, "--out", folder / "raw", "--k-core", "2"]


def _data(folder: Path, name: str) -> Path:
    events = _events()
    events.to_parquet(folder / f"{name}.parquet")
    pd.DataFrame({"movieId": range(ITEMS)}).to_parquet(folder / f"{name}-items.parquet")
    vectors = save_vectors(folder / f"{name}.npy", np.random.default_rng(1).normal(size=(ITEMS, 4)))
    columns = ["--user-column", "userId", "--item-column", "movieId"]
    files = ["--interactions", folder / f"{name}.parquet", "--items", folder / f"{name}-items.parquet"]
    told = ["--modality", f"text={vectors}", "--fingerprint", "text=mine"]
    _answer(["etl", *files, *columns, *told, "--out", folder / name])
    return folder / name


def _adopt(folder: Path) -> list[object]:
    data = _data(folder, "data")
    return ["catalogue", "adopt", "--workflow", data / "workflow", "--sessions", data / "test", "--out", folder / "own"]


def _pretrain(folder: Path) -> list[object]:
    shops = [word for name in ("one", "other") for word in ("--data", _data(folder, name))]
    small = {"model.d_model": 8, "model.n_head": 2, "train.epochs": 1, "pretrain.sequence_sequence_weight": 0}
    chosen = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    return ["pretrain", *shops, *chosen, "--device", "cpu", "--out", folder / "run"]


def _t4r(folder: Path) -> list[object]:
    small = ["--recipe", "tiny", "--set", "train.epochs=1", "--trainer", "t4r", "--device", "cpu"]
    return ["train", "--data", _data(folder, "data"), *small, "--out", folder / "run"]


def _answer(words: list[object]) -> dict[str, Any]:
    ran = CliRunner().invoke(app, [str(word) for word in words])
    assert ran.exit_code == 0, ran.output
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("command", [_movielens, _amazon, _adopt, _pretrain, _t4r])
def test_a_dry_run_writes_nothing_and_tells_what_a_run_then_does(command: Any, tmp_path: Path) -> None:
    words = command(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    plan = _answer([*words, "--dry-run"])
    assert (plan.pop("dry_run"), plan["would_replace"]) == (True, False)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    answer = _answer(words)
    for name in set(plan) & set(answer) - {"seconds"}:
        assert plan[name] == answer[name], name
    assert len(set(plan) & set(answer)) >= 2
    for file in plan.get("would_write", []):
        assert Path(file).exists(), file
    again = _answer([*words, "--dry-run"])
    assert again.get("found") or again["would_replace"] is True
