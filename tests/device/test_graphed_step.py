"""Training steps as CUDA graphs, on the stand-in: padded batches, recorded steps, and what becomes of wrong ones."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from missrec_t4r.config import TrainConfig
from missrec_t4r.cuda_graph import obstacle
from missrec_t4r.data.batching import TrainingBatch, iterate, trained_positions, training_batches
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.training import graphed_step
from missrec_t4r.training.graphed_step import Shapes, differences
from missrec_t4r.training.step import slots_counted, training_loss, with_interests_counted
from missrec_t4r.training.trainer import Trainer
from tests import shop
from tests.device.recorder import Recorder
from tests.device.second_device import second_device
from tests.device.test_waiting import _trainer

COLUMNS = (EventColumn("event", "categorical", 6, 4), EventColumn("scene", "pretrained", 3, 4, std=2.0))
CONFIGS = {
    "paper": shop.paper(dropout=0.0),
    "masked": shop.ours_masked(dropout=0.0, orthogonality="cosine", sequence_fusion="contextual"),
    "default": shop.default(dropout=0.0),
    "without interests": shop.default(dropout=0.0, interest_ratio=0.0),
    "with event features": shop.default(dropout=0.0, event_feature_dropout=0.0),
}
FEW = {
    "train.batch_size": 48,
    "train.schedule": "cosine",
    "train.epochs": 3,
    "train.warmup_steps": 4,
    "train.validation_sessions": 8,
}


PLAIN_STEPS = graphed_step._PLAIN_STEPS


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record on the stand-in, and at the second batch of a shape: these trainings are short."""
    torch.set_num_threads(1)
    monkeypatch.setattr(graphed_step, "GraphRecorder", Recorder)
    monkeypatch.setattr(graphed_step, "_PLAIN_STEPS", 1)


def _state(trainer: Trainer) -> dict[str, list[Tensor]]:
    averages = list(trainer.average.weights.values())
    weights = {"weight": [weight.detach().clone() for weight in trainer.model.parameters()]}
    return weights | ({"average": [one.clone() for one in averages]} if averages else {})


def _recorder_of(trainer: Trainer) -> Recorder:
    assert trainer.graphed is not None
    assert isinstance(trainer.graphed.recorder, Recorder)
    return trainer.graphed.recorder


def _epochs(out: Path, recipe: str, settings: dict[str, Any], device: str, n: int) -> tuple[Trainer, list[Any], Any]:
    """Train ``n`` epochs; return the trainer, loss and validation metric of each, and the weights before and after."""
    with second_device():
        trainer = _trainer(out, recipe, settings, device)
        states = [_state(trainer)]
        records = [trainer._epoch() for _ in range(n)]
        states.append(_state(trainer))
    return trainer, [(record["loss"], record["valid_ndcg@10"]) for record in records if record], states


@pytest.mark.parametrize("n_slots", [None, 5, 40])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_neither_loss_nor_gradients(name: str, n_slots: int | None) -> None:
    config = CONFIGS[name]
    net = shop.model(config)
    if name == "with event features":
        net = build_missrec(config, shop.catalogue(), COLUMNS).double()
        net.discover_interests(0)
    net.train()
    train = TrainConfig.paper(batch_size=7, next_items=2, next_items_weight=0.3)
    pairs = zip(shop.SESSIONS, shop.TARGETS, strict=True)
    sessions = Sessions.from_lists([shop.rows([*session, target]) for session, target in pairs])
    shapes = Shapes(config.max_sequence_length + 3, 16)  # longer than any of these sessions
    net.decoder.positions = torch.nn.Embedding(config.max_sequence_length + 3, config.d_model).double()
    slots = n_slots if config.orthogonality == "faithful" else None
    plan = training_batches(sessions, config, train, np.random.default_rng(0))
    assert len(plan) > 1
    for batch in iterate(sessions, plan, config, train):
        if name == "with event features":
            shape = batch.item_ids.shape
            values = {"event": torch.randint(0, 6, shape), "scene": torch.rand(*shape, 3).double()}
            batch = batch._replace(event_features=values)
        counted = with_interests_counted(batch, net, net.interests.assignment, slots)
        assert counted.n_interests is not None
        padded = shapes.padded(counted._replace(n_interests=counted.n_interests + 5))
        assert padded.item_ids.numel() > batch.item_ids.numel()
        found = [_loss_and_gradients(net, one, train, slots) for one in (batch, padded)]
        assert found[1].keys() == found[0].keys()
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-11, msg=key)


def _loss_and_gradients(
    net: MISSRec, batch: TrainingBatch, train: TrainConfig, n_slots: int | None
) -> dict[str, Tensor]:
    net.zero_grad()
    loss = training_loss(net, batch, train, n_slots=n_slots)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("paper", {}),
        ("paper", {"train.group_by_length": False}),
        ("default", {"train.clip_norm": 0.5}),
        ("long", {}),
        ("long", {"model.interest_ratio": 0.3}),
        ("tiny", {}),
    ],
)
def test_recorded_steps_train_like_plain_ones(tmp_path: Path, recipe: str, settings: dict[str, Any]) -> None:
    """Rate, average, interests of every epoch and padded batches: curve and weights are those of a CPU."""
    _, expected, (before, plain) = _epochs(tmp_path / "cpu", recipe, FEW | settings, "cpu", 3)
    trainer, found, (_, recorded) = _epochs(tmp_path / "cuda", recipe, FEW | settings, "cuda", 3)
    assert trainer.graphed is not None
    assert trainer.graphed.obstacle == ""
    assert _recorder_of(trainer).replays > trainer.status["step"] / 2
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4)
    assert max(differences(before, plain, recorded).values()) < 1e-2


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Any]:
    """Two epochs of the recipe tiny on the CPU: the curve, and the weights before and after."""
    return _epochs(tmp_path_factory.mktemp("cpu"), "tiny", FEW, "cpu", 2)[1:]


@pytest.mark.parametrize("fault", ["reads a value", "does nothing", "fails"])
def test_a_wrong_recording_is_noticed_and_training_goes_on_plainly(
    plainly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    expected, (before, plain) = plainly
    record, loss = Recorder.record, Trainer.loss

    def faulty(self: Recorder, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        _, result = record(self, work)
        return (lambda: result.fill_(3.0)) if fault == "does nothing" else _fail, result

    def reading(self: Trainer, batch: TrainingBatch, totals: Any = None) -> Tensor:
        value = loss(self, batch, totals)
        assert float(value.detach()) > 0
        return value

    if fault == "reads a value":
        monkeypatch.setattr(Trainer, "loss", reading)
    else:
        monkeypatch.setattr(Recorder, "record", faulty)
    with caplog.at_level(logging.WARNING):
        trainer, found, (_, after) = _epochs(tmp_path / "cuda", "tiny", FEW, "cuda", 2)
    assert trainer.graphed is not None
    assert not trainer.graphed.graphs
    (line,) = [one.getMessage() for one in caplog.records if "CUDA graphs" in one.getMessage()]
    why = {"reads a value": "not permitted", "does nothing": "differs from a plain one in loss", "fails": "illegal"}[
        fault
    ]
    assert why in line
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4)
    assert max(differences(before, plain, after).values()) < 1e-2


def _fail() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def test_every_replay_draws_its_own_dropout(tmp_path: Path) -> None:
    with second_device():
        trainer = _trainer(tmp_path, "paper", FEW | {"model.dropout": 0.5}, "cuda")
        trainer._epoch()
        trainer.model.train()
        assert trainer.graphed is not None
        batch = next(iterate(trainer.sessions, trainer._plan(), trainer.recipe.model, trainer.recipe.train))
        trainer.graphed(trainer._counted(batch), 0.0, trainer.loss)
        trainer.graphed(trainer._counted(batch), 0.0, trainer.loss)
        replays = _recorder_of(trainer).replays
        losses = [trainer.graphed(trainer._counted(batch), 0.0, trainer.loss) for _ in range(4)]
        assert _recorder_of(trainer).replays == replays + 4
        found = [float(loss) for loss in losses]
    assert len(set(found)) == 4
    assert np.isfinite(found).all()


def test_a_shape_is_recorded_when_its_plain_steps_have_cost_what_a_recording_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_step, "_PLAIN_STEPS", PLAIN_STEPS)
    with second_device():
        trainer = _trainer(tmp_path, "tiny", FEW, "cuda")
        trainer.refresh_interests(0)
        trainer.assignment = trainer.model.interests.assignment.cpu()
        assert trainer.graphed is not None
        batch = next(iterate(trainer.sessions, trainer._plan(), trainer.recipe.model, trainer.recipe.train))
        replays = []
        for _ in range(8):
            trainer.graphed(trainer._counted(batch), 0.0, trainer.loss)
            replays.append(_recorder_of(trainer).replays)
    assert replays == [0, 0, 0, 0, 0, 1, 2, 3]  # the sixth batch is recorded, and trained by the graph as well


def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = FEW | {"model.dropout": 0.3, "train.ema_decay": 0.9}
    with second_device():
        whole = _trainer(tmp_path / "whole", "tiny", settings, "cuda")
        records = [whole._epoch() for _ in range(2)]
        first = _trainer(tmp_path / "cut", "tiny", settings, "cuda")
        first._epoch()
        first.save_checkpoint()
        second = _trainer(tmp_path / "cut", "tiny", settings, "cuda")
        second.resume()
        record = second._epoch()
        assert _recorder_of(second).replays > 0
        assert record is not None
        assert records[1] is not None
        assert record["loss"] == pytest.approx(records[1]["loss"], rel=1e-5)
        before = {name: [torch.zeros_like(one) for one in values] for name, values in _state(whole).items()}
        assert max(differences(before, _state(whole), _state(second)).values()) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"train.cuda_graphs": False},
        {"train.accumulate": 2},
        {"train.softmax": "chunked"},
        {"train.softmax": "sampled"},
        {"train.precision": "fp16"},
        {"model.history_bias": True, "model.padding_candidate": True, "model.missing_modality": "zero_row"},
    ],
)
def test_what_cannot_be_recorded_is_trained_as_before(tmp_path: Path, settings: dict[str, Any]) -> None:
    with second_device():
        assert _trainer(tmp_path, "tiny", FEW, "cuda").graphed is not None
        assert _trainer(tmp_path, "tiny", FEW | settings, "cuda").graphed is None
    assert _trainer(tmp_path, "tiny", FEW, "cpu").graphed is None


def test_shapes_beyond_the_limit_are_trained_plainly(
    plainly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphed_step, "_MOST_GRAPHS", 1)
    expected, _ = plainly
    with caplog.at_level(logging.INFO):
        trainer, found, _ = _epochs(tmp_path, "tiny", FEW, "cuda", 2)
    assert "steps on batches of 1 shapes are recorded as CUDA graphs; those of others are not" in caplog.messages
    assert trainer.graphed is not None
    assert len(trainer.graphed.graphs) == 1 < len(trainer.graphed.seen)
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4)


class _Memory:
    """A recording's replay, which holds memory for as long as it exists."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay

    def __call__(self) -> None:
        self.replay()


@pytest.mark.parametrize("when", ["while one is recorded", "while one is compared", "at a new shape"])
def test_training_goes_on_plainly_where_memory_does_not_suffice_for_graphs(
    plainly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    expected, (before, plain) = plainly
    record, loss, held = Recorder.record, Trainer.loss, weakref.WeakSet[_Memory]()

    def recorded(self: Recorder, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, result = record(self, work)
        memory = _Memory(replay)
        held.add(memory)
        if when == "while one is recorded":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return memory, result

    def full(self: Trainer, batch: TrainingBatch, totals: Any = None) -> Tensor:
        if held and not (when == "at a new shape" and _recorder_of(self).replays == 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(self, batch, totals)

    monkeypatch.setattr(Recorder, "record", recorded)
    monkeypatch.setattr(Trainer, "loss", full)
    with caplog.at_level(logging.WARNING):
        trainer, found, (_, after) = _epochs(tmp_path / "cuda", "tiny", FEW, "cuda", 2)
    assert trainer.graphed is not None
    assert "out of memory" in trainer.graphed.obstacle
    assert not trainer.graphed.graphs
    (line,) = [one.getMessage() for one in caplog.records if "CUDA graphs" in one.getMessage()]
    assert "out of memory" in line
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4)
    assert max(differences(before, plain, after).values()) < 1e-2


class _BrokenOff:
    """Ends as ``torch.cuda.graph`` does after an error within it."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nSearch for ...")


def test_the_error_that_broke_a_recording_off_is_told_with_its_line() -> None:
    """CUDA's own says only that there was one; torch raises it in place of the first."""
    with pytest.raises(RuntimeError) as raised, _BrokenOff():
        slots_counted("many", 3)  # type: ignore[arg-type]
    assert re.fullmatch(r"missrec_t4r/training/step\.py:\d+: unsupported operand .*", obstacle(raised.value))
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("CUDA out of\n memory")
    assert obstacle(raised.value) == "CUDA out of memory"


@pytest.mark.parametrize("n", [3, 70, 255, 300, 1170, 8000])
def test_padding_of_large_batches_is_bounded_and_its_positions_are_spread(n: int) -> None:
    item_ids, targets = torch.ones(n, 7, dtype=torch.int64), torch.ones(n, 7, 1, dtype=torch.int64)
    padded = Shapes(50, 7 * n).padded(TrainingBatch(item_ids, targets, {}, trained_positions(targets), 5))
    rows = len(padded.item_ids)
    assert n < rows <= (2 * n if n < 256 else 1.25 * (n + 1))
    assert padded.positions is not None
    session, step = padded.positions[:, 7 * n :]
    assert session.unique().tolist() == [rows - 1]
    assert step.bincount().tolist() == [7, 7, 6, 6, 6, 6, 6, 6]
