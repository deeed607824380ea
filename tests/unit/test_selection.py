"""What is chosen on which sessions: best epoch, score terms, baselines; the test split and the clock choose nothing."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.union import load_domains
from missrec_t4r.errors import DataError
from missrec_t4r.evaluation.full_ranking import KEPT_WITH_HISTORY_TERM, quick_metrics
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.protocols import blends_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings, ItemKNNTerm
from missrec_t4r.ranking.tune import Validation
from missrec_t4r.runs.evaluate import evaluate, fitted_baselines
from missrec_t4r.runs.run_folder import load_run, load_tensors
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, UNKNOWN_ROW
from missrec_t4r.training import trainer as trainer_module
from missrec_t4r.training.fit import train
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Trainer
from tests import shop

N_ITEMS, N_COLD, N_USERS = 24, 2, 160
SETTINGS = {
    "model.d_model": 8,
    "model.n_head": 2,
    "model.d_feedforward": 8,
    "model.dropout": 0.0,
    "model.max_sequence_length": 5,
    "model.n_neighbours": 8,
    "model.n_similar_items": 4,
    "model.cold_start_exposure": 1.0,
    "train.batch_size": 64,
    "train.epochs": 2,
    "train.patience": 99,
    "train.learning_rate": 1e-2,
}
ALONE = {"model.n_neighbours": 0, "model.n_similar_items": 0, "model.cold_start_exposure": 0.0}
"""The network without terms that are tuned, which takes most of the time."""


def walks(length: int) -> list[list[int]]:
    """Return sessions that mostly step to the next item of a circle; a longer one begins like a shorter one."""
    rng = np.random.default_rng(5)
    steps = np.where(rng.random((N_USERS, 9)) < 0.7, 1, rng.integers(2, N_ITEMS, (N_USERS, 9)))
    at = (np.arange(N_USERS)[:, None] + steps.cumsum(1)) % (N_ITEMS - N_COLD)
    return (at[:, :length] + FIRST_ITEM_ROW).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder whose last items are cold."""
    made = tmp_path_factory.mktemp("selection")
    vectors = np.random.default_rng(0).normal(size=(N_ITEMS + FIRST_ITEM_ROW, 6))
    modalities = {"text": shop.modality(vectors, name="random", fingerprint="random-0")}
    counts = shop.counts_of(walks(5), N_ITEMS)
    shop.make_catalogue([f"P{i}" for i in range(N_ITEMS)], modalities, counts).save(made / CATALOGUE_FOLDER)
    for split, length in {"train": 5, "valid": 6, "test": 7}.items():
        shop.write_split(made / split, walks(length))
    return made


def poisoned(folder: Path, split: str, out: Path) -> Path:
    """Return a copy whose split has other histories and targets."""
    shutil.copytree(folder, out)
    rng = np.random.default_rng(1)
    shop.write_split(out / split, rng.integers(FIRST_ITEM_ROW, FIRST_ITEM_ROW + N_ITEMS, (N_USERS, 6)).tolist())
    return out


def trained(data: Path, out: Path, settings: Mapping[str, Any] = ALONE) -> dict[str, Any]:
    """Train and return all that a run stores, as plain values, but its duration."""
    facts = train(data, out, recipe="tiny", settings={**SETTINGS, **settings}, device="cpu")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "facts": {name: value for name, value in facts.items() if name not in ("run", "seconds")},
        "weights": {name: tensor.tolist() for name, tensor in load_tensors(out / "weights.safetensors").items()},
        "curve": [{name: line[name] for name in line if "second" not in name and "per_s" not in name} for line in log],
    }


def test_training_and_score_terms_do_not_know_the_test_split(folder: Path, tmp_path: Path) -> None:
    clean = trained(folder, tmp_path / "clean", {})
    assert clean["facts"]["epochs"] == len(clean["curve"]) == SETTINGS["train.epochs"]
    assert clean["facts"]["score_terms"]["cold_start"], "the cold-start term is tuned, too"
    assert trained(poisoned(folder, "test", tmp_path / "data1"), tmp_path / "run1", {}) == clean
    other = trained(poisoned(folder, "valid", tmp_path / "data2"), tmp_path / "run2", {})
    assert other["facts"]["score_terms"] != clean["facts"]["score_terms"]
    assert other["facts"]["valid_ndcg@10"] != clean["facts"]["valid_ndcg@10"]


def test_baselines_and_blends_are_tuned_without_the_test_split(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run", recipe="tiny", settings=SETTINGS | ALONE | {"train.epochs": 1}, device="cpu")
    reports = [
        evaluate(tmp_path / "run", data=data, out=tmp_path / "report.json")
        for data in (folder, poisoned(folder, "test", tmp_path / "test"))
    ]
    for chosen in ("baseline_settings", "blend_settings"):
        assert reports[0][chosen] == reports[1][chosen]
    assert reports[0]["protocols"] != reports[1]["protocols"]
    loaded = load_run(tmp_path / "run", folder)
    splits = (Sessions.load(folder / split) for split in ("train", "valid"))
    _, blends = blends_of(loaded.model, Validation(loaded.model, loaded.catalogue, *splits))
    assert blends["terms"] == reports[0]["blend_settings"]["terms"]
    assert fitted_baselines(folder)[1] == reports[0]["baseline_settings"]
    assert fitted_baselines(poisoned(folder, "valid", tmp_path / "valid"))[1] != reports[0]["baseline_settings"]


def test_the_item_knn_term_counts_the_training_sessions_alone(folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"model.cold_start_exposure": 0.0, "train.epochs": 1}
    result = train(folder, tmp_path / "run", recipe="tiny", settings=settings, device="cpu")
    window, directed = (result["score_terms"]["item_knn"][name] for name in ("window", "directed"))
    term = terms_of(load_run(tmp_path / "run").model).item_knn
    assert term is not None
    expected = ItemKNNTerm(N_ITEMS + FIRST_ITEM_ROW, 8)
    expected.fit(Sessions.load(folder / "train"), window, directed=directed)
    assert term.frequency.tolist()[FIRST_ITEM_ROW:] == shop.counts_of(walks(5), N_ITEMS).tolist()
    assert torch.equal(term.neighbours, expected.neighbours)
    assert torch.equal(term.counts, expected.counts)


class Notes(Trainer):
    """Keeps the weights before the first and after every step, and sees that nothing else changes them."""

    kept: list[dict[str, Tensor]]

    def _step(self, batch: TrainingBatch, share: float) -> Tensor:
        self.kept = getattr(self, "kept", [weights(self.model)])
        before = weights(self.model)
        assert all(torch.equal(weight, before[name]) for name, weight in self.kept[-1].items())
        loss = super()._step(batch, share)
        self.kept.append(weights(self.model))
        return loss


def weights(model: MISSRec) -> dict[str, Tensor]:
    return {name: weight.detach().double().clone() for name, weight in model.named_parameters()}


def noting(data: Path, out: Path, settings: Mapping[str, Any]) -> Notes:
    recipe, catalogue = Recipe.load("tiny", {**SETTINGS, **settings}), Catalogue.load(data / CATALOGUE_FOLDER)
    sessions = [Sessions.load(data / split) for split in ("train", "valid")]
    return Notes(recipe, TrainingData(catalogue, *sessions), out, "cpu")


def network_ndcg(model: MISSRec, data: Path) -> float | None:
    """Return the validation NDCG@10 without the terms that are counted."""
    terms = terms_of(model)
    assert terms.item_knn is not None
    assert terms.content_knn is not None
    terms.item_knn.choose(ItemKNNSettings(0.0, 1.0, 0.0))
    terms.content_knn.choose(ContentKNNSettings(0.0, 1.0))
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    scorer = ModelScorer.with_popularity(model.eval(), catalogue)
    return quick_metrics(scorer, Sessions.load(data / "valid"), catalogue.n_rows)[KEPT_WITH_HISTORY_TERM]["ndcg@10"]


def test_averaged_weights_are_evaluated_and_saved(folder: Path, tmp_path: Path) -> None:
    """The average is computed here once more: it follows the weights closely at first, and more slowly later."""
    settings = {"train.batch_size": 24, "train.ema_decay": 0.9, "model.cold_start_exposure": 0.0}
    run = noting(folder, tmp_path / "run", settings)
    facts = run.run(folder)
    average, *steps = run.kept
    steps = steps[: len(steps) // facts["epochs"] * (facts["best_epoch"] + 1)]
    assert len(steps) > 20, "early steps, in which the average follows faster, and later ones"
    for number, current in enumerate(steps, start=1):
        decay = min(0.9, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    model = load_run(tmp_path / "run", folder).model
    for name, saved in weights(model).items():
        torch.testing.assert_close(saved, average[name], rtol=1e-4, atol=1e-6, msg=name)
    assert facts["valid_ndcg@10"] == pytest.approx(network_ndcg(model, folder), abs=1e-9)
    model.load_state_dict(steps[-1], strict=False)
    assert network_ndcg(model, folder) != pytest.approx(facts["valid_ndcg@10"], abs=1e-4), "of the last step's weights"


@pytest.fixture(scope="module")
def misleading(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Return a data folder on which training makes validation worse: its targets never follow in training."""
    made = tmp_path_factory.mktemp("misleading") / "data"
    shutil.copytree(folder, made)
    n_warm = N_ITEMS - N_COLD
    valid = [[*session, (session[-1] - FIRST_ITEM_ROW + n_warm // 2) % n_warm + FIRST_ITEM_ROW] for session in walks(5)]
    straight = [[(user + step) % n_warm + FIRST_ITEM_ROW for step in range(5)] for user in range(N_USERS)]
    shop.write_split(made / "train", straight)
    shop.write_split(made / "valid", valid)
    return made


def test_the_best_epoch_is_kept_and_patience_ends_the_run(misleading: Path, tmp_path: Path) -> None:
    patient = trained(misleading, tmp_path / "patient", ALONE | {"train.epochs": 30, "train.patience": 3})
    facts, curve = patient["facts"], [line["valid_ndcg@10"] for line in patient["curve"]]
    assert facts["stopped_by"] == "patience"
    assert facts["best_epoch"] == int(np.argmax(curve)) < len(curve) - 1
    assert facts["epochs"] == len(curve) == facts["best_epoch"] + 1 + 3
    assert facts["valid_ndcg@10"] == max(curve)
    as_long = trained(misleading, tmp_path / "short", ALONE | {"train.epochs": facts["best_epoch"] + 1})
    assert patient["weights"] == as_long["weights"]


class Killed(Exception):
    pass


class Dies(Trainer):
    """Is killed after nine epochs."""

    def _epoch(self) -> dict[str, Any]:
        if self.status["epoch"] == 9:
            raise Killed
        return super()._epoch()


def test_a_resumed_run_keeps_the_best_epoch_of_before(misleading: Path, tmp_path: Path) -> None:
    settings = ALONE | {"train.epochs": 11}
    recipe, catalogue = Recipe.load("tiny", {**SETTINGS, **settings}), Catalogue.load(misleading / CATALOGUE_FOLDER)
    sessions = [Sessions.load(misleading / split) for split in ("train", "valid")]
    with pytest.raises(Killed):
        Dies(recipe, TrainingData(catalogue, *sessions), tmp_path / "killed", "cpu").run(misleading)
    whole = trained(misleading, tmp_path / "whole", settings)
    assert whole["facts"]["best_epoch"] < 9
    assert trained(misleading, tmp_path / "killed", settings) == whole


def test_no_result_depends_on_the_clock(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ALONE | {"train.batch_size": 160, "train.reverse_probability": 0.5}
    expected = trained(folder, tmp_path / "run", settings)
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(
        trainer_module.time, "perf_counter", lambda: float(next(hours))
    )  # a checkpoint after every step
    assert trained(folder, tmp_path / "slow", settings) == expected


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Notes):
    """Takes a second per step by the clock that replaces the real one."""

    clock: Clock

    def _step(self, batch: TrainingBatch, share: float) -> Tensor:
        self.clock.now += 1.0
        return super()._step(batch, share)


@pytest.mark.parametrize("whole_epochs", [0, 8])
def test_a_time_limit_ends_the_run_within_the_epoch_and_keeps_the_best(
    misleading: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_epochs: int
) -> None:
    settings = {"train.epochs": 30, **ALONE}
    steps = len(noting(misleading, tmp_path / "run", settings)._plan())
    run = noting(misleading, tmp_path / "run", settings | {"train.max_minutes": (whole_epochs * steps + 2.5) / 60})
    run.__class__, run.clock = Timed, Clock()  # type: ignore[assignment]
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=run.clock))  # type: ignore[attr-defined]
        facts = run.run(misleading)
    assert (facts["stopped_by"], facts["epochs"]) == ("max_minutes", whole_epochs + 1)
    assert run.status["step"] == whole_epochs * steps + 3
    if whole_epochs:  # validation had become worse before
        assert facts["best_epoch"] < whole_epochs
        settings = SETTINGS | ALONE | {"train.epochs": facts["best_epoch"] + 1}
        train(misleading, tmp_path / "short", recipe="tiny", settings=settings, device="cpu")
        kept, expected = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("run", "short"))
        assert all(torch.equal(kept[name], expected[name]) for name in expected)


def with_unknown_targets(folder: Path, out: Path, known: bool = True) -> Path:
    shutil.copytree(folder, out)
    unknown = [[*session, UNKNOWN_ROW] for session in walks(5)[:50]]
    shop.write_split(out / "valid", unknown + (walks(6) if known else []))
    return out


def test_validation_sessions_with_an_unknown_target_are_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their last known item is no target: it was trained on."""
    with caplog.at_level("INFO", logger="missrec_t4r"):
        found = trained(with_unknown_targets(folder, tmp_path / "data"), tmp_path / "run")
    assert "50 of 210 validation sessions are left out" in caplog.text
    assert found == trained(folder, tmp_path / "clean")
    assert len(load_domains({"shop": tmp_path / "data"}).splits["valid"]) == N_USERS
    with pytest.raises(DataError, match="no validation session has a known target"):
        trained(with_unknown_targets(folder, tmp_path / "none", known=False), tmp_path / "never")
