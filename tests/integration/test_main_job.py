"""The main job: from a generated shop to recommendations of a real Triton Inference Server."""

import json
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from missrec_t4r.cli.demo import demo, find_inputs
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
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
        assert query["answers"]
        assert not seen & {answer["item_id"] for answer in query["answers"]}
        scores = [answer["score"] for answer in query["answers"]]
        assert scores == sorted(scores, reverse=True)


def test_the_terminal_shows_metrics_and_titles(result: tuple[dict, Path, str]) -> None:
    summary, folder, shown = result
    for words in ("popularity", "item-kNN", "content-kNN", "Triton is ready"):
        assert words.lower() in shown.lower().replace("_", "-"), words
    catalogue = Catalogue.load(folder / "data" / "catalogue")
    titles = set(catalogue.items["title"].to_pylist())
    assert summary["recommendations"][0]["answers"][0]["title"] in titles


def test_bad_input_ends_with_a_message_and_exit_code_2(result: tuple[dict, Path, str], tmp_path: Path) -> None:
    _, folder, _ = result
    (tmp_path / "few.parquet").write_bytes(b"not parquet")
    bad = [
        ["etl", "--interactions", "missing.parquet", "--items", "x.parquet", "--out", "o"],
        ["etl", "--interactions", "few.parquet", "--items", "few.parquet", "--out", "o"],
        ["train", "--data", "nowhere", "--out", "o"],
        ["train", "--data", str(folder / "data"), "--out", "o", "--set", "model.d_modle=3"],
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


def test_a_folder_without_vectors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="interactions.parquet"):
        find_inputs(tmp_path)
    for name in ("interactions.parquet", "items.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="text_minilm.npy"):
        find_inputs(tmp_path)
