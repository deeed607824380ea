"""``missrec etl --update --modality``: vectors of new items, and of those that only events knew; nothing else moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.data.catalogue import Catalogue
from tests.workflows.tables import save_vectors

OLD = [f"item {number}" for number in range(6)]
LATER = [*OLD[::-1], "ghost", "new", "newer"]
"""Items of the second run in another order; ``ghost`` was in the first run's events, but not in its item table."""


def _events(file: Path, items: list[str], start: int) -> Path:
    chance = np.random.default_rng(start)
    frame = pd.DataFrame(
        {
            "user_id": chance.integers(0, 12, 120),
            "item_id": chance.choice(items, 120),
            "timestamp": start + np.arange(120),
        }
    )
    frame.to_parquet(file)
    return file


def _run(*words: object) -> dict[str, Any]:
    ran = CliRunner().invoke(app, ["etl", *map(str, words)])
    if ran.exit_code:
        return {"refused": " ".join(ran.stderr.split()), "code": ran.exit_code}
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    for name, items, number in (("first", [*OLD, "ghost"], 0), ("second", LATER[:-1], 1000)):
        _events(folder / f"{name}.parquet", items, number)
    pd.DataFrame({"item_id": OLD, "title": OLD}).to_parquet(folder / "items_1.parquet")
    pd.DataFrame({"item_id": LATER, "title": LATER}).to_parquet(folder / "items_2.parquet")
    for name, width in (("text", 2), ("image", 3)):
        save_vectors(folder / f"{name}_1.npy", 1.0 + np.arange(6 * width).reshape(6, width))
        save_vectors(folder / f"{name}_2.npy", 100.0 + np.arange(9 * width).reshape(9, width))
    save_vectors(folder / "wide.npy", np.ones((9, 7)))
    save_vectors(folder / "short.npy", np.ones((8, 2)))
    words = ["--interactions", folder / "first.parquet", "--items", folder / "items_1.parquet", "--engine", "disk"]
    vectors = ["--modality", f"text={folder}/text_1.npy", "--modality", f"image={folder}/image_1.npy"]
    _run(*words, *vectors, "--out", folder / "data", "--workers", "1")
    return folder


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shop"))


def _second(shop: Path) -> list[object]:
    night = ["--interactions", shop / "second.parquet", "--items", shop / "items_2.parquet"]
    return ["--update", *night, "--out", shop / "data", "--workers", "1"]


def test_new_items_get_their_vectors_and_old_ones_keep_theirs(shop: Path) -> None:
    before = Catalogue.load(shop / "data" / "catalogue")
    plan = _run(*_second(shop), "--modality", f"text={shop}/text_2.npy", "--dry-run")
    assert (plan["new_lines"], plan["version"], len(plan["new_files"])) == (3, 1, 1)
    answer = _run(*_second(shop), "--modality", f"text={shop}/text_2.npy")
    assert (answer["added"]["items_added"], answer["modalities"]) == (2, {"text": 9, "image": 6})
    after = Catalogue.load(shop / "data" / "catalogue")
    assert after.ids_of(range(3, 12)) == [*OLD, "ghost", "new", "newer"]
    text, image = after.modalities["text"], after.modalities["image"]
    np.testing.assert_array_equal(text.vectors[:9], before.modalities["text"].vectors[:9])
    given = dict(zip(LATER, np.load(shop / "text_2.npy"), strict=True))
    np.testing.assert_array_equal(text.vectors[9:], [given[name] for name in ("ghost", "new", "newer")])
    assert text.present[3:].all()
    assert image.present.tolist() == [False] * 3 + [True] * 6 + [False] * 3
    assert not image.vectors[9:].any()
    assert after.items["title"].to_pylist() == [*OLD, "ghost", "new", "newer"]


def test_the_same_increment_again_changes_nothing(shop: Path) -> None:
    words = [*_second(shop), "--modality", f"text={shop}/text_2.npy"]
    _run(*words)
    files = {file: file.stat().st_mtime_ns for file in (shop / "data").rglob("*")}
    again = _run(*words)
    assert (again["updated"], again["version"], again["new_lines"]) == (False, 2, 0)
    assert {file: file.stat().st_mtime_ns for file in (shop / "data").rglob("*")} == files


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ("text=wide.npy", "modality 'text' of width 7; expected: one of the catalogue's: {'text': 2, 'image': 3}"),
        ("sound=text_2.npy", "modality 'sound' of width 2; expected: one of the catalogue's"),
        ("text=short.npy", r"shape (8, 2) in .*short.npy; expected: 9 rows, one per item of the item table"),
        ("text=none.npy", "modality 'text' cannot be read"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_the_folder_stays(shop: Path, vectors: str, words: str) -> None:
    name, _, file = vectors.partition("=")
    before = (shop / "data" / "etl.json").read_bytes()
    answer = _run(*_second(shop), "--modality", f"{name}={shop}/{file}")
    assert answer["code"] == 2
    for part in words.split(".*"):
        assert part in answer["refused"]
    assert (shop / "data" / "etl.json").read_bytes() == before
    assert [path.name for path in shop.iterdir() if path.name.startswith(".")] == []


def test_vectors_without_an_item_table_are_refused(shop: Path) -> None:
    words = ["--update", "--interactions", shop / "second.parquet", "--out", shop / "data"]
    answer = _run(*words, "--modality", f"text={shop}/text_2.npy")
    assert "vectors are given without an item table" in answer["refused"]
