"""The host does not wait for the device in a training step, nor while a batch is ranked, except for the list itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from missrec_t4r.config import Recipe
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.retrieval.filters import Rules
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Trainer
from tests import shop
from tests.device.second_device import second_device
from tests.device.test_paths import N_ITEMS, SMALL, run  # noqa: F401  # a fixture
from tests.serving import shop as served


@pytest.mark.parametrize("with_terms", [False, True])
def test_ranking_reads_one_result(run: Path, with_terms: bool) -> None:  # noqa: F811  # the fixture
    loaded = load_run(run)
    rng = np.random.default_rng(0)
    rows = served.padded([rng.integers(0, loaded.catalogue.n_rows, length) for length in (0, 1, 3, 8, 8, 5)])
    asked: dict[str, Any] = {
        "top_k": np.array([3, 5, 1, 7, 4, 2]),
        "exclude_seen": True,
        "allow": np.stack([np.zeros(20, np.int64), *[rng.permutation(np.arange(3, 33))[:20] for _ in range(5)]]),
        "rules": [Rules.of({"where": {"in_stock": True}}), Rules.of({"at_most": {"brand": 3}})] * 3,
    }
    item_knn = terms_of(loaded.model).item_knn
    if with_terms:
        assert item_knn is not None
        item_knn.counts.fill_(1.0)
        item_knn.choose(ItemKNNSettings(0.5, 0.7, 0.1))
        content_knn = terms_of(loaded.model).content_knn
        assert content_knn is not None
        drawn = rng.integers(3, 9, content_knn.alike.shape)  # lists of very different lengths once inverted
        content_knn.alike.copy_(torch.from_numpy(drawn))
        content_knn.likeness.copy_(torch.from_numpy(rng.random(drawn.shape)))
        content_knn.index()
        content_knn.choose(ContentKNNSettings(0.4, 0.8))
    expected = Ranker(loaded.model, loaded.catalogue).rank(rows, **asked)
    with second_device() as waits:
        ranker = Ranker(loaded.model, loaded.catalogue, device="cuda:0")
        before = len(waits)
        found = ranker.rank(rows, **asked)
    assert [wait.split(" at ")[0] for wait in waits[before:]] == ["cpu"]
    assert found.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_what_is_waited_for_is_noted() -> None:
    with second_device() as waits:
        there = torch.arange(4.0, device="cuda")
        mask = there > 1
        assert waits == []
        actions = [
            lambda: there.sum().item(),
            lambda: bool(mask.any()),
            lambda: there[mask],
            lambda: torch.nonzero(there),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: torch.ones(3).to("cuda"),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.repeat_interleave(there.long()),
            lambda: there.unique(),
            lambda: there.__setitem__(0, 1.0),
        ]
        for number, action in enumerate(actions, 1):
            action()
            assert len(waits) >= number, number
        before = len(waits)
        there.masked_fill(mask, 0).sort().values.gather(0, torch.zeros(2, dtype=torch.int64, device="cuda"))
        torch.ones(3).to("cuda", non_blocking=True)
        there[mask] = 0.0
        there[:1] = 1.0
        assert waits[before:] == []


def _trainer(
    out: Path, recipe: str, settings: dict[str, Any], device: str, names: tuple[str, ...] = ("text", "image")
) -> Trainer:
    without = {name: [4, 9] for name in names[1:]}
    modalities = shop.random_modalities(N_ITEMS, dict(zip(names, (6, 4, 5))), 0, without=without)
    catalogue = shop.make_catalogue([f"P{item}" for item in range(N_ITEMS)], modalities, [1] * N_ITEMS)
    rng = np.random.default_rng(0)
    sessions = Sessions.from_lists([rng.integers(3, N_ITEMS + 3, rng.integers(2, 9)) for _ in range(60)])
    chosen = Recipe.load(recipe, SMALL | {"model.dropout": 0.0} | settings)
    return Trainer(chosen, TrainingData(catalogue, sessions, sessions), out, device)


def test_the_rate_of_an_epoch_counts_the_work_that_the_device_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with second_device():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: time.sleep(0.5))
        trainer = _trainer(tmp_path, "tiny", {}, "cuda")
        record = trainer._epoch()
    assert record is not None
    assert record["steps_per_s"] <= len(trainer._plan()) / 0.5


@pytest.mark.parametrize(
    ("recipe", "settings", "names"),
    [
        ("paper", {}, ("text", "image")),
        ("paper", {}, ("text",)),
        ("paper", {"model.candidate_fusion": "dynamic_instance"}, ("text", "image", "audio")),
        ("paper", {"model.attention": "causal", "train.group_by_length": True}, ("text", "image")),
        ("default", {}, ("text", "image")),
        ("default", {"model.candidate_fusion": "dynamic_shared"}, ("text",)),
        ("default", {"train.accumulate": 2, "train.clip_norm": 1.0}, ("text", "image")),
        ("long", {}, ("text", "image")),
        ("long", {"model.interest_ratio": 0.3}, ("text", "image")),
        (
            "tiny",
            {"model.attention": "bidirectional", "model.sequence_fusion": "contextual", "train.ema_decay": 0.9},
            ("text", "image"),
        ),
    ],
)
def test_a_training_step_waits_for_nothing(
    tmp_path: Path, recipe: str, settings: dict[str, Any], names: tuple[str, ...]
) -> None:
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        with second_device() as waits:
            trainer = _trainer(tmp_path / device, recipe, settings, device, names)
            steps, counted = trainer._step, []

            def step(*given: Any, steps: Any = steps, counted: Any = counted, waits: Any = waits) -> torch.Tensor:
                before = len(waits)
                loss: torch.Tensor = steps(*given)
                assert waits[before:] == []
                counted.append(loss)
                return loss

            trainer._step = step  # type: ignore[method-assign]
            assert trainer._epoch() is not None
            losses[device] = [loss.item() for loss in counted]
    assert len(losses["cuda"]) > 1
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)
