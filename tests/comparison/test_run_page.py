"""`missrec page`: one run on one page, from its log, its evaluation and its weights."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from missrec_t4r import commands
from missrec_t4r.cli.app import app
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.evaluation.full_ranking import EXCLUDED
from missrec_t4r.runs.run_folder import LOG_FILE
from tests.comparison.test_compare import data, write_run  # noqa: F401  # a fixture

CURVE = [{"epoch": 0, "loss": 7.5, "valid_ndcg@10": 0.08}, {"epoch": 1, "loss": 6.25, "valid_ndcg@10": 0.125}]


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:  # noqa: F811  # the fixture
    folder = write_run(tmp_path / "run", data, 0)
    (folder / LOG_FILE).write_text("".join(json.dumps(record) + "\n" for record in CURVE))
    return folder


def test_the_page_holds_the_runs_figures_curves_and_titles(run: Path) -> None:
    result = commands.run_page(run)
    report = json.loads((run / "metrics_test.json").read_text())
    text = (run / "page.html").read_text(encoding="utf-8")
    served, network = (report["protocols"][EXCLUDED][name]["ndcg@10"] for name in ("exported", "network"))
    assert result["ndcg@10"] == served
    assert result["terms_added"] == pytest.approx(served - network)
    assert f"<b>NDCG@10 {served:.4f}, seen items excluded</b>" in text
    recall = report["protocols"][EXCLUDED]["exported"]
    low, high = recall["interval"]["recall@10"]
    assert f"{recall['recall@10']:.1%} of the next items" in result["headline"]
    assert f"(95 % interval {low:.1%} to {high:.1%})" in result["headline"], "of what the sentence states"
    for part in report["slices"]["all"][EXCLUDED]:
        assert f"{report['slices']['all'][EXCLUDED][part]['ndcg@10']:.4f}" in text
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    points = [[title.text for title in chart.iter("title")] for chart in charts]
    assert ["0: 0.08", "1: 0.125"] in points, "validation by epoch"
    assert ["0: 7.5", "1: 6.25"] in points, "loss by epoch"
    assert "Sofa &lt;red&gt;" in text
    assert "Sofa <red>" not in text
    assert "User u0 had:" in text
    assert not re.findall(r"(?:src|href)=", text), "one file, nothing is loaded"


def test_a_finished_evaluation_is_read_and_an_older_one_repeated(run: Path) -> None:
    commands.evaluate(run, baselines=False)
    file = run / "metrics_test.json"
    before = file.stat().st_mtime_ns
    commands.run_page(run)
    assert file.stat().st_mtime_ns == before
    assert "popularity" not in (run / "page.html").read_text()
    os.utime(file, (1, 1))
    assert commands.run_page(run, dry_run=True)["evaluates"] is True
    commands.run_page(run)
    assert "popularity" in (run / "page.html").read_text()


def test_baselines_without_a_hit_are_no_error(run: Path) -> None:
    commands.evaluate(run)
    file = run / "metrics_test.json"
    report = json.loads(file.read_text())
    for name in ("popularity", "item_knn", "content_knn"):
        report["protocols"][EXCLUDED][name]["ndcg@10"] = 0.0
    file.write_text(json.dumps(report))
    assert "has 0.0000." in commands.run_page(run)["headline"]


def test_a_page_elsewhere_of_another_split(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["page", "--run", str(run), "--out", str(tmp_path / "valid.html"), "--split", "valid"]
    )
    assert done.exit_code == 0, done.output
    assert "valid sessions" in (tmp_path / "valid.html").read_text()
    assert not (run / "page.html").exists()


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run.json"):
        commands.run_page(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="^split=.train.; expected"):
        commands.run_page(run, split="train")  # type: ignore[arg-type]  # what a user may type


def test_a_killed_training_and_a_damaged_evaluation_do_not_stop_the_page(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (run / LOG_FILE).open("a") as file:
        file.write('{"epoch": 2, "lo')
    commands.run_page(run)
    (run / "metrics_test.json").write_text("{")
    commands.run_page(run)
    assert "cannot be read: evaluating again" in caplog.text
    with pytest.raises(ConfigError, match="is a folder; expected: the HTML file to write"):
        commands.run_page(run, run)
