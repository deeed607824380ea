"""What commit 10bf1f3 wrote is still read, and means the same: a data folder, a run and a bundle of its generated shop.

Made there with ``missrec generate --users 150 --items 100 --seed 11``, ``etl``, ``features``, ``train --recipe tiny``
with 16 dimensions and every score term, ``evaluate``, ``export`` and ``score``; the encoders' states are left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from missrec_t4r import commands
from missrec_t4r.evaluation.report import with_current_names
from missrec_t4r.serving.batch.score import event_feature_names

FILES = Path(__file__).parent / "files"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since commands write beside what they read."""
    folder = tmp_path_factory.mktemp("earlier") / "files"
    shutil.copytree(FILES, folder)
    return folder


def test_a_run_evaluates_to_the_same_metrics(earlier: Path) -> None:
    found = commands.evaluate(earlier / "run")["protocols"]
    for systems in (found["excluded"], found["kept_with_history_term"]):
        systems["model"] = systems["exported"]  # today's model is tuned for one protocol alone
    for protocol, systems in with_current_names(json.loads((FILES / "metrics.json").read_text())).items():
        for system, metrics in systems.items():
            for metric, value in metrics.items():
                assert found[protocol][system][metric] == pytest.approx(value, abs=1e-6), (protocol, system, metric)


def test_a_bundle_gives_the_same_recommendations(earlier: Path, tmp_path: Path) -> None:
    assert commands.verify(earlier / "bundle")["items"] == 100
    commands.score(earlier / "sessions.parquet", tmp_path / "scores.parquet", bundle=earlier / "bundle", top_k=10)
    found, expected = pq.read_table(tmp_path / "scores.parquet"), pq.read_table(FILES / "scores.parquet")
    assert found.column_names == expected.column_names
    for name in expected.column_names:
        ours, theirs = found[name].to_pylist(), expected[name].to_pylist()
        if name == "score":
            np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-5)
        else:
            assert ours == theirs, name


def test_a_run_exports(earlier: Path, tmp_path: Path) -> None:
    answer = commands.export(earlier / "run", tmp_path / "bundle")
    assert answer["parity"]["equal"]


def test_the_page_of_a_run_states_the_settings_of_its_score_terms(earlier: Path) -> None:
    page = Path(commands.run_page(earlier / "run")["page"]).read_text(encoding="utf-8")
    assert "counts events that follow, within 5" in page
    assert "threshold 0, bias 0.469" in page
    assert "Validation NDCG@10 0.1186 without the kNN terms, 0.2931 with." in page


def test_batch_scoring_knows_the_event_features_of_a_bundle(earlier: Path) -> None:
    assert event_feature_names(earlier / "bundle") == ["event_type", "category", "dwell_seconds"]


def test_the_etl_makes_the_same_data_folder(earlier: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvtabular", reason="the ETL needs the extra merlin")
    raw = earlier / "raw"
    commands.etl(raw / "interactions.parquet", raw / "items.parquet", tmp_path / "data")
    for split in ("train", "valid", "test"):
        made, expected = (
            pq.read_table(folder / split / "part_0.parquet") for folder in (tmp_path / "data", FILES / "data")
        )
        assert made.schema.remove_metadata() == expected.schema.remove_metadata()
        assert made.equals(expected), split
    for file in ("schema.pbtxt", "session_transform.json"):
        assert (tmp_path / "data" / file).read_text() == (FILES / "data" / file).read_text()
