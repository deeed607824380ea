"""The evaluation report of a run: content, tables, files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, MISSRecError
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM, PROTOCOLS
from missrec_t4r.evaluation.report import metrics_table, table
from missrec_t4r.io.json_files import write_json
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs import run_folder
from missrec_t4r.runs.evaluate import evaluate, evaluate_sessions
from missrec_t4r.runs.run_folder import load_run, save_run
from missrec_t4r.schema import ITEM_LIST

SYSTEMS = {"model", "network", "terms", "popularity", "item_knn", "content_knn"}
"""In every protocol; the model with the weights of its bundle is not strict."""
SPLITS = {
    "train": [[3, 4, 5], [3, 4], [4, 5, 5], [6, 3], [7]],
    "valid": [[3, 4, 5, 6], [3, 4, 5], [4, 5, 5, 3], [6, 3, 4], [7, 6]],
    "test": [[3, 4, 5, 6, 8], [3, 4, 5, 6], [4, 5, 5, 3, 4], [6, 3, 4, 2], [2, 3]],
}


def write_run(folder: Path, catalogue: Catalogue) -> Path:
    """Write a run with random weights on five users, complete on disk."""
    data, run = folder / "data", folder / "run"
    for split, sessions in SPLITS.items():
        (data / split).mkdir(parents=True)
        pq.write_table(pa.table({ITEM_LIST: sessions}), data / split / "part_0.parquet")
    catalogue.save(data / "catalogue")
    torch.manual_seed(0)
    recipe = Recipe(model=MISSRecConfig(d_model=8, n_head=2))
    model = build_missrec(recipe.model, catalogue)
    model.discover_interests(seed=0)
    save_run(run, model, recipe, data, {"best_epoch": 3, "epochs": 5, "stopped_by": "patience"})
    return run


@pytest.fixture
def run(tmp_path: Path, catalogue: Catalogue) -> Path:
    return write_run(tmp_path, catalogue)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> dict[str, Any]:
    """The evaluation of such a run."""
    return evaluate(write_run(tmp_path_factory.mktemp("evaluated"), catalogue))


def spoken(report: dict[str, Any], width: int = 220) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(report))
    return console.export_text()


def systems_of(protocol: str) -> set[str]:
    return SYSTEMS if protocol == KEPT_STRICT else SYSTEMS | {"exported"}


def test_a_run_stays_until_the_one_that_replaces_it_is_complete(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves no run of the files of both, and none without `run.json`."""
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    model = load_run(run).model
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_json", lambda *_: Path("/dev/full").write_text("x"))
        with pytest.raises(DataError, match="the disk ran full while .* was written"):
            save_run(run, model, Recipe(model=MISSRecConfig(d_model=8, n_head=2)), tmp_path / "data", {})
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_the_tutorial_shows_the_table_that_is_printed(report: dict[str, Any], repository: Path) -> None:
    """Its figures are of a larger run; the intervals and the row of the exported blend are left out there."""
    page = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
    ((title, head, *rows),) = (shown.splitlines() for shown in re.findall(r"```\n(test, .*?)```", page, re.DOTALL))
    printed = metrics_table(report, EXCLUDED)
    assert re.sub(r"[\d,]+ users", "N users", title) == re.sub(r"[\d,]+ users", "N users", str(printed.title))
    assert [name.strip() for name in head.strip("┃").split("┃")] == [column.header for column in printed.columns]
    assert [row.split("│")[1].strip() for row in rows] == [
        name for name in printed.columns[0].cells if name != "exported"
    ]


def test_the_report_holds_every_system_in_every_protocol(report: dict[str, Any]) -> None:
    assert report["split"] == "test"
    assert report["n_users"] == 5
    assert set(report["protocols"]) == set(PROTOCOLS)
    for protocol in PROTOCOLS:
        assert set(report["protocols"][protocol]) == set(report["coverage"][protocol]) == systems_of(protocol)
        for measured in report["protocols"][protocol].values():
            assert {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (10, 20, 50)} < set(measured)
            low, high = measured["interval"]["ndcg@10"]
            assert low <= measured["ndcg@10"] <= high
        assert set(report["differences"][protocol]) == systems_of(protocol) - {"model"}
        assert set(report["slices"]["short"][protocol]) == systems_of(protocol)
        assert set(report["baseline_settings"]["item_knn"][protocol]) == {
            "follow_within", "decay", "power", "diagonal", "valid_ndcg@10",
        }  # fmt: skip


def test_a_terminal_of_80_columns_shows_every_figure(report: dict[str, Any]) -> None:
    assert "…" not in spoken(report, width=80)


def test_popularity_by_hand(report: dict[str, Any]) -> None:
    # counts 3, 3, 3, 1, 1, 0: ranks of 8, 6, 4, unknown, 3 are 6, 4, 2, miss, 1
    kept = report["protocols"][KEPT_STRICT]["popularity"]
    assert kept["recall@10"] == pytest.approx(4 / 5)
    assert kept["mrr@10"] == pytest.approx((1 / 6 + 1 / 4 + 1 / 2 + 0 + 1) / 5)
    # without what was seen: [7, 8] -> 2, [6, 7, 8] -> 1, in its own history -> miss, miss, [3, ...] -> 1
    excluded = report["protocols"][EXCLUDED]["popularity"]
    assert excluded["recall@10"] == pytest.approx(3 / 5)
    assert excluded["mrr@10"] == pytest.approx((1 / 2 + 1 + 0 + 0 + 1) / 5)
    assert report["coverage"][KEPT_STRICT]["popularity"]["coverage@10"] == 1
    assert report["counts"] == {
        "targets_in_history": 1,
        "targets_no_item": 1,
        "targets_unrecommendable": dict.fromkeys({*SYSTEMS, "exported"}, 1),
        "sessions_without_known_item": 1,
    }


def test_slices_hold_their_metrics(report: dict[str, Any]) -> None:
    parts = report["slices"]
    assert {name: part["n"] for name, part in parts.items()} == {
        "all": 5, "cold": 1, "rare": 4, "without_text": 1, "without_image": 0, "short": 3, "medium": 2, "long": 0,
    }  # fmt: skip
    assert parts["cold"][KEPT_STRICT]["popularity"]["mrr@10"] == pytest.approx(1 / 6)
    assert parts["long"][KEPT_STRICT]["model"]["ndcg@10"] is None


def test_the_file_is_the_result(run: Path, tmp_path: Path) -> None:
    report = evaluate(run, split="valid")
    file = run / "metrics_valid.json"
    assert json.loads(file.read_text()) | {"file": str(file)} == report
    elsewhere = tmp_path / "deep" / "result.json"
    evaluate(run, out=elsewhere, baselines=False)
    assert set(json.loads(elsewhere.read_text())["protocols"][KEPT_STRICT]) == {"model", "network"}
    assert not (run / "metrics_test.json").exists()
    assert [path.name for path in elsewhere.parent.iterdir()] == ["result.json"]


def test_the_same_run_gives_the_same_report(report: dict[str, Any]) -> None:
    again = evaluate(Path(report["file"]).parent)
    assert report | {"seconds": {}} == again | {"seconds": {}}


def test_the_table_shows_all_systems_protocols_and_slices(report: dict[str, Any]) -> None:
    words = spoken(report)
    titles = ("users, excluded", "users, kept, strict", "users, kept, with history term")
    for expected in (*SYSTEMS, "exported", *titles, "without_image", "cold", "coverage@10"):
        assert expected in words
    value = report["protocols"][KEPT_STRICT]["popularity"]["recall@10"]
    low, high = report["protocols"][KEPT_STRICT]["popularity"]["interval"]["recall@10"]
    assert f"{value:.4f}" in words
    assert f"±{(high - low) / 2:.4f}" in words


def test_the_checklist_says_what_was_decided_on_which_data(report: dict[str, Any]) -> None:
    found = report["checklist"]
    assert set(found["seen_items"]) == set(PROTOCOLS)
    assert "left out of a network that was trained with it" in found["history_bias"][KEPT_STRICT]
    assert found["epochs_chosen_on"] == {
        "split": "valid", "metric": "ndcg@10 of the network, before terms are tuned",
        "protocol": KEPT_WITH_HISTORY_TERM, "best_epoch": 3, "epochs": 5,
    }  # fmt: skip
    assert found["blend_weights_tuned_on"]["split"] == "valid"
    assert found["blend_weights_tuned_on"]["sessions"] == 5
    assert found["item_filter"]["ranked"] == 6
    assert found["stopped_by"] == "patience"
    assert found["seeds"]["training"] == 2020
    words = spoken(report)
    for expected in ("protocol checklist", "ties", "history length", "epochs chosen on", "stopped by", "patience"):
        assert expected in words


def test_a_report_of_an_earlier_version_is_shown_under_todays_names(report: dict[str, Any]) -> None:
    former = {"excluded": "seen_excluded", "kept_with_history_term": "seen_kept"}

    def renamed(part: dict[str, Any]) -> dict[str, Any]:
        return {former[name]: value for name, value in part.items() if name in former}

    earlier = {**report, **{name: renamed(report[name]) for name in ("protocols", "coverage")}}
    earlier["slices"] = {name: {"n": part["n"], **renamed(part)} for name, part in report["slices"].items()}
    del earlier["checklist"]
    words = spoken(earlier)
    assert "users, excluded" in words
    assert "users, kept, with history term" in words
    assert "strict" not in words


def test_a_table_without_baselines(run: Path) -> None:
    assert "popularity" not in spoken(evaluate(run, baselines=False))


def test_bad_input_is_an_error_with_expectation_and_cure(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--split 'train'; expected: valid or test"):
        evaluate(run, split="train")
    with pytest.raises(MISSRecError, match=r"nowhere holds no run\.json"):
        evaluate(tmp_path / "nowhere")
    (tmp_path / "data" / "test" / "part_0.parquet").unlink()
    with pytest.raises(DataError, match="no parquet file"):
        evaluate(run)
    assert not list(run.glob("*metrics_*"))


def test_an_empty_split_is_an_error(catalogue: Catalogue) -> None:
    with pytest.raises(DataError, match="no session"):
        evaluate_sessions({"popularity": Popularity.fit(catalogue)}, Sessions.from_lists([]), catalogue)


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    write_json(file, {"ndcg@10": 0.5}, allow_nan=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"ndcg@10": np.nan}, allow_nan=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads(file.read_text()) == {"ndcg@10": 0.5}


def test_a_protocol_without_a_system_is_empty(catalogue: Catalogue) -> None:
    class Knowing(Popularity):
        protocols = (EXCLUDED, KEPT_WITH_HISTORY_TERM)

    sessions = Sessions.from_lists(SPLITS["test"])
    report = evaluate_sessions({"alone": Knowing.fit(catalogue)}, sessions, catalogue)
    assert list(report["protocols"][EXCLUDED]) == ["alone"]
    assert report["protocols"][KEPT_STRICT] == report["differences"][KEPT_STRICT] == {}
    shown = spoken(report | {"split": "test"})
    assert "alone" in shown
    assert "kept, strict" not in shown


def test_a_baseline_recommends_no_retired_item(catalogue: Catalogue) -> None:
    retired = pa.array([row == 3 for row in range(3, catalogue.n_rows)])
    catalogue = Catalogue(catalogue.items.append_column("retired", retired), catalogue.modalities)
    sessions = Sessions.from_lists([[4, 5, 3], [5, 6, 4]])
    report = evaluate_sessions({"popularity": Popularity.fit(catalogue)}, sessions, catalogue)
    assert report["counts"]["targets_unrecommendable"] == {"popularity": 1}  # the retired target, as for a model
    assert report["protocols"][KEPT_STRICT]["popularity"]["recall@10"] == 0.5
