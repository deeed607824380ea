"""The data of the quality benchmarks: prepared once, never mixed with runs of other data, with or without words."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import datasets
from benchmarks.quality.bench import METRICS, bench
from benchmarks.quality.datasets import prepare
from benchmarks.quality.grid import RESULTS_FILE, Job, grid
from missrec_t4r import commands
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import PROTOCOLS
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.key_names import with_current_keys
from tests import processes
from tests.shop import random_modalities, write_circle

N_ITEMS, N_USERS = 12, 30
EARLIER_TERMS = read_json(Path(__file__).parents[1] / "earlier_version/files/run/run.json")["prior"]
TERMS = with_current_keys({"prior": EARLIER_TERMS})["score_terms"]


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


def _finished_seed(seed: int, key: str, terms: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"seed": seed, "valid_ndcg@10": 0.1, key: terms},
        "test": {protocol: {"model": dict.fromkeys(METRICS, 0.1)} for protocol in PROTOCOLS},
        "n_users": 30,
        "n_items": N_ITEMS,
        "checklist": {
            "epochs_chosen_on": {"best_epoch": 1, "epochs": 2},
            "seeds": {"training": seed},
            "stopped_by": "patience",
        },
        "blend_settings": {"model": dict.fromkeys(PROTOCOLS, terms), "exported": terms, "terms": {}},
        "baseline_settings": {},
    }


def test_seeds_that_an_earlier_version_finished_are_reported_under_the_keys_of_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "train", None)  # they are kept, not trained again
    data, out = tmp_path / "data", tmp_path / "out"
    write_circle(data, [f"P{n}" for n in range(N_ITEMS)], random_modalities(N_ITEMS, {"text": 6}, seed=3))
    for seed, key, terms in ((2020, "prior", EARLIER_TERMS), (2021, "score_terms", TERMS)):
        write_json(out / f"data/tiny/seed-{seed}/bench.json", _finished_seed(seed, key, terms))
    found = bench(data, "tiny", 2, out)
    assert [run["score_terms"] for run in found["runs"]] == [TERMS, TERMS]
    assert "prior" not in found["runs"][0]
    first, second = found["blend_settings"]
    assert first == second
    assert first["exported"] == first["model"][PROTOCOLS[0]] == TERMS


def test_a_line_that_an_earlier_version_finished_has_the_keys_of_todays(tmp_path: Path) -> None:
    jobs = [Job(name, "shop", "nowhere", "tiny", {}, 2020, "cpu", ["valid"]) for name in ("earlier", "today")]
    lines = [
        {**job.asked, "stopped_by": "epochs", "blend_settings": dict.fromkeys(PROTOCOLS, terms)}
        for job, terms in zip(jobs, (EARLIER_TERMS, TERMS), strict=True)
    ]
    (tmp_path / RESULTS_FILE).write_text("\n".join(map(json.dumps, lines)))
    earlier, today = grid(jobs, tmp_path)
    assert earlier["blend_settings"] == today["blend_settings"] == dict.fromkeys(PROTOCOLS, TERMS)
