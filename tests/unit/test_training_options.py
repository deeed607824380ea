"""Gradient accumulation, precision, schedule, clipping, compilation and curves of a training run."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from missrec_t4r.config import Recipe, TrainConfig
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.runs.run_folder import load_tensors, save_tensors
from missrec_t4r.training.fit import train
from missrec_t4r.training.optim import Optimiser, learning_rate
from missrec_t4r.training.precision import resolve_precision, translate_compile_errors
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Curves, Trainer

SMALL = {
    "model.d_model": 16,
    "model.n_head": 2,
    "model.dropout": 0.0,
    "model.max_sequence_length": 5,
    "model.n_neighbours": 0,
    "model.n_similar_items": 0,
    "train.batch_size": 64,
    "train.epochs": 2,
    "train.ema_decay": 0.0,
}


def _trainer(data: Path, out: Path, **settings: Any) -> Trainer:
    recipe = Recipe.load("tiny", SMALL | {name.replace("__", "."): value for name, value in settings.items()})
    sessions = [Sessions.load(data / split).known() for split in ("train", "valid")]
    return Trainer(recipe, TrainingData(Catalogue.load(data / "catalogue"), *sessions), out, "cpu")


def _weights_after(trainer: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    losses = [trainer._epoch()["loss"] for _ in range(2)]
    return losses, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(data: Path, tmp_path: Path, attention: str) -> None:
    same = {"model__attention": attention, "train__next_items": 2, "model__orthogonality_weight": 0.1}
    losses, weights = _weights_after(_trainer(data, tmp_path, **same))
    for parts in (3, 16):  # 16: more parts than a batch has sessions
        found, ours = _weights_after(_trainer(data, tmp_path, **same, train__accumulate=parts))
        assert found == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_of_the_parts_sum_to_those_of_the_batch(data: Path, tmp_path: Path) -> None:
    """Sharper than weights, which Adam moves by the sign of a gradient; in double precision."""
    targets = torch.randint(3, 15, (4, 2, 2), generator=torch.Generator().manual_seed(0))
    targets[1, 1] = 0
    targets[:, 1, 1] = 0
    batch = TrainingBatch(torch.tensor([[3, 4], [5, 0], [6, 7], [8, 9]]), targets)
    gradients = []
    for parts in (1, 3):
        trainer = _trainer(data, tmp_path, train__accumulate=parts, model__orthogonality_weight=0.1)
        trainer.model.discover_interests(0)
        trainer.model.double().train()
        loss = trainer._step(batch, 0.0)
        found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        gradients.append((loss, found))
    (loss, whole), (sum_of_losses, sums) = gradients
    assert float(sum_of_losses) == pytest.approx(float(loss), abs=1e-10)
    for name, gradient in whole.items():
        torch.testing.assert_close(sums[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_the_cosine_schedule_decreases_to_zero(data: Path, tmp_path: Path) -> None:
    train_ = TrainConfig.paper(schedule="cosine", warmup_steps=10, learning_rate=0.1)
    assert learning_rate(train_, 5, 0.0) == pytest.approx(0.05)
    assert learning_rate(train_, 50, 0.5) == pytest.approx(0.05)
    assert learning_rate(train_, 99, 1.0) == 0.0
    assert learning_rate(TrainConfig.paper(), 99, 1.0) == TrainConfig.paper().learning_rate
    rates = []

    class Notes(Trainer):
        def loss(self, batch: TrainingBatch, totals: Any = None) -> Tensor:
            rates.append(self.optimizer.rate)
            return super().loss(batch, totals)

    made = _trainer(data, tmp_path, train__schedule="cosine")
    made.__class__ = Notes
    _weights_after(made)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.3 * rates[1]


def test_clipping_scales_all_gradients_together_dense_and_sparse() -> None:
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2, bias=False), "table": torch.nn.Embedding(5, 2)})
    dense, table = model["dense"].weight, model["table"].weight
    optimiser = Optimiser(model, TrainConfig.paper(clip_norm=1.0), frozenset({table}), torch.device("cpu"))
    dense.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    pieces = torch.tensor([[1.0, 2.0], [1.0, 2.0]])  # of one row, which is (2, 4)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), pieces, (5, 2), check_invariants=True)
    before = table.detach().clone()
    optimiser.step(0.1)
    norm = (9 + 4 + 16) ** 0.5
    torch.testing.assert_close(dense.grad, torch.tensor([[3.0, 0.0], [0.0, 0.0]]) / norm)
    torch.testing.assert_close(table.grad.to_dense()[1], torch.tensor([2.0, 4.0]) / norm)
    assert (table != before).any(1).tolist() == [False, True, False, False, False]  # Adam rests where nothing came


def test_sparse_tables_keep_the_models_order() -> None:
    """Their moments are stored by number: in the order of a set, a resumed run could give one table another's."""
    tables = torch.nn.ModuleList(torch.nn.Embedding(3, 2) for _ in range(12))
    model, weights = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 1), "tables": tables}), list(tables.parameters())
    sparse = Optimiser(model, TrainConfig.paper(), frozenset(weights), torch.device("cpu")).optimizers[1]
    assert [id(one) for one in sparse.param_groups[0]["params"]] == [id(one) for one in weights]


def test_clipping_is_off_by_default_and_keeps_small_gradients(data: Path, tmp_path: Path) -> None:
    _, free = _weights_after(_trainer(data, tmp_path))
    _, loose = _weights_after(_trainer(data, tmp_path, train__clip_norm=1e6))
    _, tight = _weights_after(_trainer(data, tmp_path, train__clip_norm=1e-9))
    assert all(torch.equal(free[name], loose[name]) for name in free)
    assert not all(torch.equal(free[name], tight[name]) for name in free)


def test_bf16_trains_nearly_the_same(data: Path, tmp_path: Path) -> None:
    losses, _ = _weights_after(_trainer(data, tmp_path))
    found, weights = _weights_after(_trainer(data, tmp_path, train__precision="bf16"))
    assert found == pytest.approx(losses, rel=0.02)
    assert found != losses
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("has", "meant"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_precision_is_bf16_on_processors_with_bf16_instructions(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], meant: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    found = [_weights_after(_trainer(data, tmp_path / name, train__precision=name)) for name in ("auto", meant)]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], weight) for name, weight in found[1][1].items())


def test_auto_precision_is_fp32_where_torch_reports_no_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


def test_fp16_is_an_error_on_a_cpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bf16"):
        _trainer(data, tmp_path, train__precision="fp16")


def test_loss_scaling_does_not_change_the_step_and_skips_infinite_gradients() -> None:
    """On a GPU fp16 needs it; its arithmetic is the same on a CPU, where torch has a scaler to try it with."""
    weights = []
    for scaled in (False, True):
        table, dense = torch.nn.Embedding(5, 2), torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.constant_(table.weight, 0.5)
        torch.nn.init.constant_(dense.weight, 0.5)
        model = torch.nn.ModuleDict({"table": table, "dense": dense})
        optimiser = Optimiser(model, TrainConfig.paper(clip_norm=0.1), frozenset({table.weight}), torch.device("cpu"))
        optimiser.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        for factor in (1.0, float("inf"), 2.0) if scaled else (1.0, 2.0):
            optimiser.zero_grad()
            rows = torch.nn.functional.embedding(torch.tensor([1, 3]), table.weight, sparse=True)
            optimiser.backward(dense(rows).sum() * factor)
            optimiser.step(0.1)
        weights.append(torch.cat([table.weight.detach().flatten(), dense.weight.detach().flatten()]))
    torch.testing.assert_close(weights[1], weights[0])
    assert optimiser.scaler is not None
    assert optimiser.scaler.get_scale() == 512.0
    resumed = Optimiser(model, TrainConfig.paper(), frozenset({table.weight}), torch.device("cpu"))
    resumed.scaler = torch.amp.GradScaler("cpu")
    resumed.load(optimiser.state())
    assert resumed.scaler.get_scale() == 512.0
    assert resumed.state().keys() == optimiser.state().keys()


@pytest.mark.parametrize("softmax", ["chunked", "sampled"])
def test_large_softmaxes_train(data: Path, tmp_path: Path, softmax: str) -> None:
    """Twelve items, three of them drawn: the estimate is rough and still learns the order of the items."""
    settings = SMALL | {"train.softmax": softmax, "train.negatives": 3, "train.chunk_size": 4, "train.epochs": 15}
    more = {"train.learning_rate": 1e-2, "train.ema_decay": 0.5, "train.patience": 99}
    result = train(data, tmp_path / "run", recipe="tiny", settings=settings | more)
    assert result["valid_ndcg@10"] > 0.6  # popularity: about .38 of twelve items


def test_curves_drop_epochs_that_are_trained_again(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"epoch": 0, "loss": 3}\n{"epoch": 1, "loss": 2}\n{"epoch": 2, "lo')
    curves = Curves(tmp_path, epoch=1)
    curves.epoch({"epoch": 1, "loss": 1.5}, 10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 0, "loss": 3}, {"epoch": 1, "loss": 1.5}]


def test_tensorboard_writes_every_step_or_names_the_package_to_install(data: Path, tmp_path: Path) -> None:
    settings = SMALL | {"train.tensorboard": True}
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        with pytest.raises(ConfigError, match=r"missrec-t4r\[tensorboard\]"):
            train(data, tmp_path / "run", recipe="tiny", settings=settings)
        return
    train(data, tmp_path / "run", recipe="tiny", settings=settings)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [json.loads(line)["valid_ndcg@10"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("epoch/valid_ndcg@10")] == pytest.approx(logged)
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 9))


def test_a_failed_compilation_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"train.compile=false"), translate_compile_errors(active=True):
        torch.compile(lambda x: x + 1, backend=_broken)(torch.ones(2))
    with pytest.raises(ValueError, match="other"), translate_compile_errors(active=True):
        raise ValueError("other")  # what is no matter of compilation stays what it is


def _broken(*_: Any) -> Any:
    raise RuntimeError("no compiler")


@pytest.mark.slow  # a minute of C++ compilation
def test_a_compiled_model_trains_the_same(data: Path, tmp_path: Path) -> None:
    losses, weights = _weights_after(_trainer(data, tmp_path))
    found, ours = _weights_after(_trainer(data, tmp_path, train__compile=True))
    assert found == pytest.approx(losses, rel=1e-3)
    assert ours.keys() == weights.keys()


def test_the_settings_of_the_howto_exist(repository: Path) -> None:
    text = (repository / "docs" / "howto" / "train.md").read_text(encoding="utf-8")
    settings = re.findall(r"`((?:train|model)\.\w+)=([\w.]+)`", text)
    assert len(settings) >= 10
    for name, value in settings:
        Recipe.load("default", {name: yaml.safe_load(value)})
    named = set(re.findall(r"`train\.(\w+)", text))
    assert named <= {field.name for field in dataclasses.fields(TrainConfig)}
    assert (repository / "benchmarks" / "speed" / "large_catalogue.py").is_file()


def test_contradictory_settings_are_an_error() -> None:
    for wrong in ({"accumulate": 0}, {"negatives": 0}, {"chunk_size": 0}, {"clip_norm": -1.0}, {"precision": "int8"}):
        with pytest.raises(ConfigError):
            TrainConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="train.refresh_interests_every 0 is below 1"):
        TrainConfig(refresh_interests_every=0)
    for name in ("windows_per_session", "validation_sessions", "warmup_steps"):
        with pytest.raises(ConfigError, match=f"train.{name} -1 is negative"):
            TrainConfig(**{name: -1})
    for name in ("weight_decay", "next_items_weight"):
        with pytest.raises(ConfigError, match=f"train.{name} -1.0 is negative"):
            TrainConfig(**{name: -1.0})


def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    tensors = {"table": table, "again": table, "row": table[1], "turned": table.T, "empty": torch.zeros(0)}
    save_tensors(tmp_path / "x.safetensors", tensors | {"none": torch.zeros(0)})
    found = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
