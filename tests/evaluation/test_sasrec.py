"""The neural baseline: causal, learns what follows what, is trained once, and is ranked like the other baselines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from missrec_t4r import commands
from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, PROTOCOLS
from missrec_t4r.ranking import sasrec
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.ranking.sasrec import SASRec, SASRecScorer, tuned_sasrec
from missrec_t4r.runs.run_folder import save_run
from missrec_t4r.runs.sasrec_file import SASREC_FILE
from tests import shop

N_ITEMS = 12


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The circle is learned in a few epochs."""
    monkeypatch.setattr(sasrec, "PATIENCE", 3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder whose users walk around a circle of twelve items."""
    modalities = shop.random_modalities(N_ITEMS, {"text": 4}, seed=0)
    return shop.write_circle(tmp_path / "data", [f"i{n}" for n in range(N_ITEMS)], modalities)


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """An untrained run on the circle."""
    recipe, catalogue = Recipe(model=MISSRecConfig(d_model=8, n_head=2)), Catalogue.load(data / "catalogue")
    model = build_missrec(recipe.model, catalogue)
    model.discover_interests(seed=0)
    save_run(tmp_path / "run", model, recipe, data, {"best_epoch": 1, "epochs": 1}, catalogue)
    return tmp_path / "run"


def test_it_learns_what_follows_what(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec, "PATIENCE", 10)
    train, valid = (Sessions.load(data / split, ()) for split in ("train", "valid"))
    best = tuned_sasrec(train, valid, Catalogue.load(data / "catalogue"))
    assert set(best) == set(PROTOCOLS)
    assert best[EXCLUDED].criterion > 0.95
    scores = best[KEPT_STRICT].scorer(Sessions.from_lists([[3, 4, 5], [7, 8]]))
    assert scores.argmax(1).tolist() == [6, 9]


def test_a_position_knows_nothing_of_later_items() -> None:
    model = SASRec(9, length=4, dropout=0.5).eval()
    first, second = model(torch.tensor([[3, 4, 5, 6], [3, 4, 8, 0]]))
    torch.testing.assert_close(first[:2], second[:2])
    assert not torch.allclose(first[2], second[2])


def test_sessions_without_a_known_item_get_popularity_and_long_ones_their_last_items(data: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    scorer = SASRecScorer(SASRec(catalogue.n_rows, length=2, dropout=0.5), Popularity.fit(catalogue))
    scores = scorer(Sessions.from_lists([[], [9, 3, 4], [3, 4]]))
    assert torch.isneginf(scores[:, :3]).all()
    assert scores[0, 3:].tolist() == catalogue.train_count[3:].tolist()
    torch.testing.assert_close(scores[1], scores[2])


def test_large_catalogues_are_trained_on_a_sample_of_classes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec, "MOST_CLASSES", 6)
    train, valid = (Sessions.load(data / split, ()) for split in ("train", "valid"))
    assert tuned_sasrec(train, valid, Catalogue.load(data / "catalogue"))[EXCLUDED].criterion > 0.9


def test_evaluate_trains_it_once_and_again_for_other_sessions(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sasrec, "EPOCHS", 2)
    first = commands.evaluate(run, baselines=["popularity", "sasrec"])
    assert list(first["protocols"][KEPT_STRICT]) == ["model", "network", "terms", "popularity", "sasrec"]
    assert first["baseline_settings"]["sasrec"][EXCLUDED]["epoch"] in (1, 2)
    written = (run / SASREC_FILE).stat().st_mtime_ns
    second = commands.evaluate(run, baselines=["sasrec"])
    assert (run / SASREC_FILE).stat().st_mtime_ns == written
    for protocol in PROTOCOLS:
        again, before = (report["protocols"][protocol]["sasrec"]["ndcg@10"] for report in (second, first))
        assert again == pytest.approx(before)
    (run / SASREC_FILE).write_bytes(b"damaged")
    commands.evaluate(run, baselines=["sasrec"])
    written = (run / SASREC_FILE).stat().st_mtime_ns
    (data / "train" / "part_0.parquet").unlink()
    shop.write_split(data / "train", shop.circle(N_ITEMS, 30, 6))
    commands.evaluate(run, baselines=["sasrec"])
    assert (run / SASREC_FILE).stat().st_mtime_ns != written


def test_compare_finds_what_evaluate_trained(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sasrec, "EPOCHS", 2)
    evaluated = commands.evaluate(run, baselines=["sasrec"])["protocols"][EXCLUDED]["sasrec"]
    compared = commands.compare(
        [str(run), "popularity"], tmp_path / "out", baselines=["sasrec"], candidate="popularity"
    )
    assert compared["protocols"][EXCLUDED]["sasrec"]["ndcg@10"] == pytest.approx(evaluated["ndcg@10"])
    assert not (tmp_path / "out" / SASREC_FILE).exists()
    commands.compare(["popularity", "sasrec"], tmp_path / "alone", data=data)
    assert (tmp_path / "alone" / SASREC_FILE).is_file()


def test_an_unknown_baseline_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="the baseline 'bert'.*popularity, item_knn, content_knn, sasrec"):
        commands.evaluate(run, baselines=["bert"])
