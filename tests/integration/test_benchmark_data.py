"""The data of the quality benchmarks: prepared once, never mixed with runs of other data, with or without words."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import datasets
from benchmarks.quality.datasets import prepare
from missrec_t4r.errors import ConfigError, DataError
from tests import processes
from tests.shop import random_modalities, write_circle

N_ITEMS, N_USERS = 12, 30


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Every item in more than five events, a title each, two files of vectors."""
    folder = tmp_path / "shop"
    folder.mkdir()
    ids = [f"P{n}" for n in range(N_ITEMS)]
    pq.write_table(pa.table({"item_id": ids, "title": [f"ware {n}" for n in range(N_ITEMS)]}), folder / "items.parquet")
    bought = [ids[(user + step) % N_ITEMS] for user in range(N_USERS) for step in range(6)]
    users = [f"u{user}" for user in range(N_USERS) for _ in range(6)]
    events = pa.table({"user_id": users, "item_id": bought, "timestamp": list(range(len(users)))})
    for name in ("interactions.parquet", "others.parquet"):
        pq.write_table(events, folder / name)
    for name in ("text_some.npy", "image_some.npy"):
        np.save(folder / name, np.random.default_rng(0).normal(size=(N_ITEMS, 4)).astype(np.float32))
    return folder


def test_finished_runs_are_not_mixed_with_those_of_other_data(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out/shop/data"
    given: dict[str, Any] = {"modality": {"text": "text_some.npy"}, "words": False}
    prepare(raw, out, **given)
    made = (out / "prepared.json").stat().st_mtime_ns
    assert prepare(raw, out, **given) == out
    for other, words in (
        ({"words": True}, "word_columns was none, now ['title']"),
        ({"interactions": "others.parquet"}, "interactions was interactions.parquet, now others.parquet"),
        (
            {"modality": {"image": "image_some.npy"}},
            "modality was {'text': 'text_some.npy'}, now {'image': 'image_some",
        ),
    ):
        with pytest.raises(DataError) as refused:
            prepare(raw, out, **given | other)
        assert f"{out} was prepared otherwise: {words}" in str(refused.value)
        assert f"give another --out or name, or remove {out.parent}" in str(refused.value)
    assert (out / "prepared.json").stat().st_mtime_ns == made


def test_a_data_folder_that_was_made_anew_is_not_mixed_either(raw: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "out/data/data"
    write_circle(folder, [f"P{n}" for n in range(N_ITEMS)], random_modalities(N_ITEMS, {"text": 6}, seed=3))
    assert prepare(folder, out) == prepare(folder, out) == prepare(folder, out, words=False) == folder
    with pytest.raises(DataError, match="prepared otherwise: raw was data, now shop; data_folder was .*, now none"):
        prepare(raw, out, modality={"text": "text_some.npy"})
    write_circle(folder, [f"P{n}" for n in range(N_ITEMS)], random_modalities(N_ITEMS, {"words": 6}, seed=4))
    with pytest.raises(DataError, match="prepared otherwise: data_folder was"):
        prepare(folder, out)
    with pytest.raises(ConfigError, match="--no-words, and the data folder .* has them"):
        prepare(folder, out, words=False)


def test_the_command_says_what_differs_without_a_traceback(raw: Path, tmp_path: Path, repository: Path) -> None:
    prepare(raw, tmp_path / "out/shop/data", modality={"text": "text_some.npy"}, words=False)
    words = [
        "-m",
        "benchmarks.quality.bench",
        "--data",
        raw,
        "--out",
        tmp_path / "out",
        "--modality=text=text_some.npy",
    ]
    ended = processes.run(words, cwd=repository)
    assert ended.returncode == 2
    assert ended.stderr.startswith("DataError: ")
    assert "word_columns was none, now ['title']" in ended.stderr


@pytest.mark.parametrize("name", ["bench", "grid", "sasrec_beside", "t4r_swap"])
def test_every_benchmark_can_leave_out_the_words(
    name: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, str]] = []

    def prepared(_: Path, out: Path, *, words: bool, **__: Any) -> Path:
        asked.append((words, out.parent.name))
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "prepare", prepared)
    module = importlib.import_module(f"benchmarks.quality.{name}")
    data = ["settings.yaml", "--data", f"shop={raw}"] if name == "grid" else ["--data", str(raw)]
    for option in ([], ["--no-words"]):
        monkeypatch.setattr(sys, "argv", [name, *data, "--out", str(tmp_path), *option])
        with pytest.raises(KeyboardInterrupt):
            module.main()
    assert [words for words, _ in asked] == [True, False]
    if name != "grid":  # each has a folder of its own
        assert [folder for _, folder in asked] == ["shop", "shop-without-words"]
