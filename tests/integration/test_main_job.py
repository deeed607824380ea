"""The main job: from a generated shop to recommendations of a real Triton Inference Server."""

import json
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r import commands
from missrec_t4r.cli.demo import demo, find_inputs, leave_out_words_without_gain
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.progress import reporting
from tests import processes

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, str]:
    out = tmp_path_factory.mktemp("demo")
    with (out / "log").open("w") as log, redirect_stderr(log), pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "120")
        with reporting():
            summary = demo(None, out, recipe="tiny", users=240, items=100)
    return summary, out / "shop", (out / "log").read_text()


def test_triton_returns_the_recommendations_of_the_model(result: tuple[dict, Path, str]) -> None:
    summary, _, _ = result
    assert summary["served_equals_offline"] is True
    assert summary["max_abs_diff"] <= 1e-5
    assert summary["sessions_compared"] >= 200
    assert summary["requests_per_execution"] > 1  # dynamic batching merged requests
    assert summary["triton_version"][0].isdigit()


def test_the_summary_has_the_keys_of_the_readme(result: tuple[dict, Path, str]) -> None:
    summary, _, _ = result
    json.dumps(summary)
    promised = {"data", "recall@10", "ndcg@10", "baselines", "triton_version", "served_equals_offline", "max_abs_diff"}
    assert promised | {"recommendations", "seconds", "excluded", "kept_strict"} <= set(summary)
    rows = {"exported", "network", "terms", "popularity", "item_knn", "content_knn"}
    assert set(summary["baselines"]) == rows
    assert {"generate", "etl", "features", "train", "evaluate", "export", "serve"} == set(summary["seconds"])
    assert len(summary["recommendations"]) == 3
    for query in summary["recommendations"]:
        seen = {item["item_id"] for item in query["session"]}
        assert query["recommended"]
        assert not seen & {answer["item_id"] for answer in query["recommended"]}
        scores = [answer["score"] for answer in query["recommended"]]
        assert scores == sorted(scores, reverse=True)


def test_the_terminal_shows_metrics_and_titles(result: tuple[dict, Path, str]) -> None:
    summary, folder, shown = result
    for words in ("popularity", "item-kNN", "content-kNN", "Triton is ready"):
        assert words.lower() in shown.lower().replace("_", "-"), words
    catalogue = Catalogue.load(folder / "data" / "catalogue")
    titles = set(catalogue.items["title"].to_pylist())
    assert summary["recommendations"][0]["recommended"][0]["title"] in titles


def test_bad_input_ends_with_a_message_and_exit_code_2(result: tuple[dict, Path, str], tmp_path: Path) -> None:
    _, folder, _ = result
    (tmp_path / "few.parquet").write_bytes(b"not parquet")
    bad = [
        ["etl", "--interactions", "missing.parquet", "--items", "x.parquet", "--out", "o"],
        ["etl", "--interactions", "few.parquet", "--items", "few.parquet", "--out", "o"],
        ["train", "--data", "nowhere", "--out", "o"],
        ["train", "--data", str(folder / "data"), "--out", "o", "--set", "model.d_modle=3"],
        ["train", "--data", str(folder / "data"), "--out", "o", "--set", "train.epochs=["],
        ["train", "--data", str(folder / "data"), "--out", "o", "--set", "train.epochs=2026-13-45"],
        ["evaluate", "--run", "nowhere"],
        ["export", "--run", "nowhere", "--out", "o"],
        ["serve", "--repository", "nowhere"],
        ["recommend", "--url", "127.0.0.1:1", "--items", "a"],
        ["demo", "--data", "nowhere", "--out", "o"],
    ]
    for arguments in bad:
        done = processes.run(["-m", "missrec_t4r", *arguments], cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr, arguments
        assert done.stderr.strip(), arguments
        assert not done.stdout, arguments
    assert [p.name for p in tmp_path.iterdir()] == ["few.parquet"]


def test_a_folder_of_another_demo_is_told_what_this_command_can_do(
    result: tuple[dict, Path, str], tmp_path: Path
) -> None:
    """A training that cannot go on with other settings: there is no --restart here."""
    _, folder, _ = result
    (tmp_path / "shorter.yaml").write_text("extends: tiny\ntrain: {epochs: 1}\n")
    with pytest.raises(ConfigError, match=r"interrupted run .*: train.epochs \d+ -> 1;") as refused:
        demo(None, folder.parent, recipe=tmp_path / "shorter.yaml", users=240, items=100)
    assert f"give another --out, or remove {folder / 'run'} to train anew" in refused.value.cure
    assert "--restart" not in str(refused.value)


@pytest.mark.parametrize(("titles", "kept"), [("by theme", True), ("at random", False)])
def test_words_are_kept_where_they_tell_what_is_bought_together(titles: str, kept: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    theme = np.arange(60) % 6
    told = theme if titles == "by theme" else random.permutation(theme)
    items = pa.table(
        {"item_id": [f"P{n}" for n in range(60)], "title": [f"brand{t} item{n}" for n, t in enumerate(told)]}
    )
    bought = [random.choice(np.flatnonzero(theme == user % 6), 6, replace=False) for user in range(80)]
    events = pa.table(
        {
            "user_id": [f"u{user}" for user in range(80) for _ in range(6)],
            "item_id": [f"P{item}" for items_of_user in bought for item in items_of_user],
            "timestamp": [step for _ in range(80) for step in range(6)],
        }
    )
    raw = tmp_path / "raw"
    raw.mkdir()
    pq.write_table(items, raw / "items.parquet")
    pq.write_table(events, raw / "interactions.parquet")
    np.save(raw / "text_some.npy", (np.eye(6)[theme] + 0.4 * random.normal(size=(60, 6))).astype(np.float32))
    inputs = find_inputs(raw)
    assert inputs.features == {"word_columns": ["title"]}
    commands.etl(inputs.interactions, inputs.items, tmp_path / "data", modality=inputs.modality)
    commands.features(tmp_path / "data", **inputs.features)
    leave_out_words_without_gain(tmp_path / "data")
    assert list(Catalogue.load(tmp_path / "data" / "catalogue").modalities) == ["text"] + ["words"] * kept


def test_titles_without_a_text_are_no_words(tmp_path: Path) -> None:
    items = pa.table(
        {"item_id": ["a", "b", "c"], "title": pa.array([None, " ", ""]), "brand": pa.nulls(3, pa.string())}
    )
    pq.write_table(items, tmp_path / "items.parquet")
    (tmp_path / "interactions.parquet").touch()
    np.save(tmp_path / "text_some.npy", np.eye(3, dtype=np.float32))
    assert not find_inputs(tmp_path).features


def test_a_folder_without_vectors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="interactions.parquet"):
        find_inputs(tmp_path)
    for name in ("interactions.parquet", "items.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="text_minilm.npy"):
        find_inputs(tmp_path)
