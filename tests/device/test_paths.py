"""Every public path with the model on the stand-in for a GPU: no two devices meet, and results are the CPU's."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from missrec_t4r.commands.training import train
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.export.export import export
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking import sasrec
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.retrieval import graphed_encoder, topk
from missrec_t4r.retrieval.filters import Rules
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.evaluate import evaluate_sessions
from missrec_t4r.runs.run_folder import load_run, load_tensors, save_run
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.serving.batch.export_vectors import session_vectors
from missrec_t4r.serving.batch.similar import similar
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.in_process import InProcessTransport
from missrec_t4r.training.pretrain import pretrain
from tests import shop
from tests.device.recorder import Recorder
from tests.device.second_device import second_device
from tests.serving import shop as served

N_ITEMS = 14
SMALL = {
    "model.d_model": 8,
    "model.n_head": 2,
    "model.d_feedforward": 8,
    "model.max_sequence_length": 5,
    "train.epochs": 1,
    "train.batch_size": 64,
    "train.precision": "fp32",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen items on a circle, two of them without image; all that training, evaluation and export read."""
    modalities = shop.random_modalities(N_ITEMS, {"text": 6, "image": 4}, 0, without={"image": [4, 9]})
    modalities = {
        name: replace(part, encoder=part.encoder | {"fingerprint": name}) for name, part in modalities.items()
    }
    folder = tmp_path_factory.mktemp("data")
    return shop.write_circle(folder, [f"P{item}" for item in range(N_ITEMS)], modalities, n_users=16)


def _trained(data: Path, out: Path, device: str, recipe: str, **settings: Any) -> dict[str, Any]:
    return train(data, out, recipe=recipe, settings=SMALL | settings, device=device)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("default", {"model.cold_start_exposure": 1.0}),
        ("paper", {}),
        ("long", {}),
        ("tiny", {"train.softmax": "sampled", "train.negatives": 4}),
        ("tiny", {"train.softmax": "chunked", "train.chunk_size": 8}),
    ],
)
def test_training_and_all_that_is_fitted_after_it(
    data: Path, tmp_path: Path, recipe: str, settings: dict[str, Any]
) -> None:
    with second_device():
        result = _trained(data, tmp_path / "run", "cuda", recipe, **settings)
    assert result["device"].startswith("cuda")
    assert bool(result["score_terms"]) == (recipe != "paper")
    assert np.isfinite(result["valid_ndcg@10"])
    assert all(tensor.isfinite().all() for tensor in load_tensors(tmp_path / "run" / "weights.safetensors").values())


def test_a_run_on_the_gpu_is_that_of_the_cpu(data: Path, tmp_path: Path) -> None:
    settings = {"model.dropout": 0.0, "model.id_dropout": 0.0, "train.epochs": 2}
    expected = _trained(data, tmp_path / "cpu", "cpu", "tiny", **settings)
    with second_device():
        found = _trained(data, tmp_path / "gpu", "cuda", "tiny", **settings)
    assert found["score_terms"] == expected["score_terms"]
    assert found["valid_ndcg@10"] == pytest.approx(expected["valid_ndcg@10"], abs=1e-6)
    weights = load_tensors(tmp_path / "gpu" / "weights.safetensors")
    for name, value in load_tensors(tmp_path / "cpu" / "weights.safetensors").items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_pretraining_transfer_and_continuation(data: Path, tmp_path: Path) -> None:
    settings = SMALL | {"model.interest_ratio": 0.3}
    with second_device():
        pretrain([data], tmp_path / "pre", settings=settings, device="cuda")
        train(data, tmp_path / "run", start_from=tmp_path / "pre", recipe="pretrain", settings=settings, device="cuda")
        result = train(data, tmp_path / "next", warm_start=tmp_path / "run", settings=SMALL, device="cuda")
    assert np.isfinite(result["valid_ndcg@10"])


def test_the_neural_baseline_uses_one_gpu_of_several(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And draws what a CPU does; torch would save the random numbers of all GPUs, and warn of it."""
    monkeypatch.setattr(sasrec, "EPOCHS", 1)
    train, valid = (load_sessions(data, split, []) for split in ("train", "valid"))
    sessions = train.known(), valid.with_known_target(), Catalogue.load(data / CATALOGUE_FOLDER)
    expected = sasrec.tuned_sasrec(*sessions)
    with second_device(), warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        found = sasrec.tuned_sasrec(*sessions)
        assert {best.scorer.model.items.weight.device.type for best in found.values()} == {"cuda"}  # type: ignore[attr-defined]
    for protocol, best in expected.items():
        assert found[protocol].criterion == pytest.approx(best.criterion, abs=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with large random weights in every part, and what export reads."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "data").mkdir()
    catalogue = served.catalogue()
    model = served.model_for(catalogue)
    data = served.data_folder(folder / "data", catalogue)
    save_run(folder / "run", model, served.recipe_of(model), data, {"best_epoch": 0})
    return folder / "run"


def test_evaluation(run: Path) -> None:
    loaded = load_run(run)
    sessions = Sessions.load(loaded.data / "test", ()).take(np.arange(40))
    popularity = Popularity.fit(loaded.catalogue)

    def report(model: MISSRec) -> dict[str, Any]:
        systems = {"model": ModelScorer(model, popularity), "popularity": popularity}
        return evaluate_sessions(systems, sessions, loaded.catalogue)

    expected = report(loaded.model)
    with second_device():
        found = report(load_run(run).model.to("cuda"))
    assert found["protocols"] == expected["protocols"]


@pytest.mark.parametrize("together", [1 << 15, 1])
def test_ranking_with_every_rule(run: Path, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """``together`` 1: the search of large catalogues."""
    monkeypatch.setattr(topk, "_TOGETHER", together)
    loaded = load_run(run)
    rng = np.random.default_rng(0)
    rows = served.padded([rng.integers(0, loaded.catalogue.n_rows, length) for length in (0, 1, 3, 8, 8, 5)])
    asked: dict[str, Any] = {
        "top_k": np.array([3, 5, 1, 7, 4, 2]),
        "exclude_seen": np.array([True, False] * 3),
        "exclude": rng.integers(0, loaded.catalogue.n_rows, (6, 2)),
        "allow": np.stack([np.zeros(20, np.int64), *[rng.permutation(np.arange(3, 33))[:20] for _ in range(5)]]),
    }
    rules = [Rules.of({"where": {"in_stock": True}}), Rules.of({"at_most": {"brand": 1}})] * 3
    expected = Ranker(loaded.model, loaded.catalogue).rank(rows, **asked, rules=rules)
    with second_device():
        found = Ranker(load_run(run).model, loaded.catalogue, device="cuda:0").rank(rows, **asked, rules=rules)
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.n_items.tolist() == expected.n_items.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"interest_ratio": 0.0, "n_decoder_layers": 2},
        {"interest_ratio": 0.0, "attention": "bidirectional", "sequence_fusion": "contextual"},
    ],
)
def test_recorded_sessions_are_ranked_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(graphed_encoder, "GraphRecorder", Recorder)
    catalogue, rng = served.catalogue(), np.random.default_rng(0)
    rows = served.padded([rng.integers(0, catalogue.n_rows, length) for length in (0, 1, 3, 8, 8, 5)])
    expected = Ranker(served.model_for(catalogue, **settings), catalogue).rank(rows, top_k=5)
    with second_device():
        ranker = Ranker(served.model_for(catalogue, **settings), catalogue, device="cuda:0", batch_size=4)
        found = ranker.rank(rows, top_k=5)
    assert isinstance(ranker.encoder.plain, graphed_encoder.GraphedEncoder)
    assert sorted(ranker.encoder.plain.graphs) == [(1, 8), (2, 8), (4, 8)]
    assert found.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


def test_export_and_serving_from_the_bundle(run: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"top_k": 5, "exclude_seen": True, "reasons": True}
    with second_device():
        export(run, tmp_path / "bundle")
        catalogue = load_run(run).catalogue
        sessions = served.raw_sessions(catalogue, 20)
        answers = {}
        for device in ("cpu", "cuda:0"):
            transport = InProcessTransport(tmp_path / "bundle", device=device)
            with MISSRecClient("bundle", transport=transport) as client:
                answers[device] = client.recommend(sessions, **asked)
    for found, expected in zip(answers["cuda:0"], answers["cpu"], strict=True):
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        assert found.item_ids == expected.item_ids
        assert found.fallback == expected.fallback
        assert len(found.item_ids) == len(expected.item_ids)
        assert len(found.reasons) == len(expected.reasons)


def test_similar_items_and_vectors(run: Path) -> None:
    loaded = load_run(run)
    rows = np.array([[4, 5, 6], [7, 0, 0]])
    expected = session_vectors(loaded.model, rows)
    with second_device():
        found = session_vectors(load_run(run).model.to("cuda"), rows)
        for by in ("session", "content"):
            assert similar([loaded.catalogue.ids_of(np.array([4]))[0]], run=run, by=by)["similar"]  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-5)
