"""Training through ``tr.Trainer``: evaluate, predict, save, load, resume, and the run folder at the end."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers4rec.torch as tr
from accelerate.state import AcceleratorState
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata
from transformers4rec.config.trainer import T4RecTrainingArguments

from missrec_t4r.config import Recipe, TrainConfig
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.evaluation.full_ranking import quick_metrics
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.t4r import (
    InterestRefresh,
    MISSRecBlock,
    MISSRecNextItemTask,
    MultiModalSequenceFeatures,
    build_model,
    from_core,
    to_core,
    train_t4r,
)
from missrec_t4r.t4r.trainer import CHECKPOINT_FOLDER, NDCG, _arguments, _Report
from missrec_t4r.training.step import training_loss
from tests.contract import shop
from tests.crafted import Crafted

ITEMS = shop.schema(event_features=False)


def a_model(**changes: Any) -> tr.Model:
    torch.manual_seed(0)
    return build_model(Recipe(model=shop.config(**changes)), ITEMS, shop.catalogue())


def arguments(folder: Path, **changes: Any) -> T4RecTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "data_loader_engine": "missrec",
        "max_sequence_length": shop.MAX_LENGTH,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "report_to": [],
        "no_cuda": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "predict_top_k": 20,
    }
    return T4RecTrainingArguments(**(settings | changes))


def a_trainer(model: tr.Model, data: Path, args: T4RecTrainingArguments, **more: Any) -> tr.Trainer:
    paths = {"train_dataset_or_path": data / "train", "eval_dataset_or_path": data / "valid"}
    return tr.Trainer(model=model, args=args, schema=ITEMS, compute_metrics=True, **paths, **more)


def test_evaluate_gives_our_own_numbers_and_predict_the_best_rows(data: Path, tmp_path: Path) -> None:
    model = a_model()
    trainer = a_trainer(model, data, arguments(tmp_path))
    before = trainer.evaluate()[NDCG]
    trainer.train()
    after = trainer.evaluate()
    assert after[NDCG] > 2 * before
    valid = Sessions.load(data / "valid")
    own = quick_metrics(ModelScorer.with_popularity(to_core(model), shop.catalogue()), valid, shop.N_ROWS)
    assert after[NDCG] == pytest.approx(own["kept_with_history_term"]["ndcg@10"], abs=1e-6)
    assert after["eval_/next-item/recall_at_10"] == pytest.approx(own["kept_with_history_term"]["recall@10"], abs=1e-6)

    trainer.test_dataset_or_path = str(data / "test")
    rows, scores = trainer.predict(trainer.test_dataset_or_path).predictions
    assert rows.shape == scores.shape == (17, 20)
    assert rows.min() >= 3
    model.top_k = 20
    top_rows, top_scores = trainer.predict(trainer.test_dataset_or_path).predictions
    np.testing.assert_array_equal(top_scores, scores)
    assert (np.sort(top_rows) == np.sort(rows)).all()


def test_the_seed_of_the_arguments_is_that_of_our_loader(data: Path, tmp_path: Path) -> None:
    model = a_model()
    orders = [
        [batch["item_id-list"].tolist() for batch, _ in trainer.get_train_dataloader()]
        for trainer in (a_trainer(model, data, arguments(tmp_path, seed=seed)) for seed in (1, 2, 1))
    ]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_a_saved_model_scores_bit_for_bit(data: Path, tmp_path: Path, loader: Callable[..., Any]) -> None:
    model = a_model()
    a_trainer(model, data, arguments(tmp_path, num_train_epochs=1)).train()
    model.save(tmp_path / "saved")
    again = tr.Model.load(tmp_path / "saved").eval()
    batch, _ = next(iter(loader("missrec", data / "test", ITEMS, batch_size=17, shuffle=False)))
    with torch.no_grad():
        assert torch.equal(model.eval()(dict(batch)), again(dict(batch)))
        del again.heads[0].body.inputs.__dict__["n_rows"]  # as of a model that was saved before there were any
        assert torch.equal(model(dict(batch)), again(dict(batch)))
    weights = (tmp_path / "saved" / "t4rec_model_class.pkl").stat().st_size
    a_trainer(again, data, arguments(tmp_path, num_train_epochs=1)).train()
    again.save(tmp_path / "trained")
    grown = (tmp_path / "trained" / "t4rec_model_class.pkl").stat().st_size - weights
    assert grown < 1000, "a saved model must not carry its last step"


@pytest.fixture
def own_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers and accelerate keep the precision of a training for all later ones of the process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("own_precision")
def test_after_bf16_a_model_is_unwrapped_before_it_is_saved(
    data: Path, tmp_path: Path, loader: Callable[..., Any]
) -> None:
    """accelerate leaves its autocast around the model's forward; then T4R's own models cannot be pickled either."""
    model = a_model()
    trainer = a_trainer(model, data, arguments(tmp_path, num_train_epochs=1, bf16=True))
    trainer.train()
    trainer.evaluate()
    with pytest.raises(pickle.PicklingError, match="automatic mixed precision"):
        model.save(tmp_path / "saved")
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.save(tmp_path / "saved")
    batch, _ = next(iter(loader("missrec", data / "test", ITEMS, batch_size=17, shuffle=False)))
    with torch.no_grad():
        assert torch.equal(model.eval()(dict(batch)), tr.Model.load(tmp_path / "saved").eval()(dict(batch)))


@pytest.mark.parametrize("stop_at", [5, 8], ids=["within an epoch", "at its end"])
def test_a_resumed_run_equals_one_that_never_stopped(
    data: Path, tmp_path: Path, stop_at: int, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    def run(folder: Path, resume: Path | None, **changes: Any) -> dict[str, torch.Tensor]:
        model = a_model()
        args = arguments(folder, per_device_train_batch_size=64, **changes)
        trainer = a_trainer(model, data, args, callbacks=[InterestRefresh(model.heads[0].body[1])])
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        steps = len(trainer.get_train_dataloader())
        assert steps == 8, "the test's stops are chosen for eight batches per epoch"
        return model.state_dict()

    whole = run(tmp_path / "whole", None, save_strategy="steps", save_steps=stop_at)
    resumed = run(tmp_path / "again", tmp_path / "whole" / f"checkpoint-{stop_at}")
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert different == []


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention": "causal"}, {"sequence_fusion": "contextual"}, {"item_ids": False}, {"candidate_ids": "own"}],
)
def test_core_and_t4r_model_share_weights_scores_and_loss(
    data: Path, loader: Callable[..., Any], changes: dict[str, Any]
) -> None:
    from missrec_t4r.data.batching import TrainingBatch

    model = a_model(dropout=0.0, **changes)
    core = to_core(model)
    core.discover_interests(0)
    batch, _ = next(iter(loader("missrec", data / "train", ITEMS, batch_size=24, shuffle=True)))
    model.heads[0].body[1].refresh_steps = 0
    loss = model.train()(dict(batch), training=True)["loss"]
    state = model.heads[0].body[1].state.sessions
    labels = model.heads[0].body[0].masking.masked_targets.amax(1, keepdim=True)
    settings = TrainConfig.paper(batch_size=24)
    native = training_loss(core, TrainingBatch(state.item_ids, labels), settings)
    torch.testing.assert_close(native, loss, rtol=1e-6, atol=1e-6)

    model.eval()
    outside = from_core(core, shop.schema(), shop.catalogue(), top_k=5).eval()
    item_ids = batch["item_id-list"][:, : shop.MAX_LENGTH]
    with torch.no_grad():
        scores = core.score(core(item_ids), core.candidates(), item_ids)
        assert torch.equal(model({"item_id-list": item_ids}), scores)
        best, rows = outside({"item_id-list": item_ids})
    assert torch.equal(best, scores.gather(1, rows))
    assert to_core(outside) is core


def test_core_and_t4r_model_share_event_features(data: Path, loader: Callable[..., Any]) -> None:
    from missrec_t4r.data.batching import TrainingBatch

    torch.manual_seed(0)
    recipe = Recipe(model=shop.config(dropout=0.0, event_feature_dropout=0.0))
    model = build_model(recipe, shop.schema(), shop.catalogue())
    core = to_core(model)
    core.discover_interests(0)
    assert [column.name for column in core.event_features.columns] == ["category", "price"]
    batch, _ = next(iter(loader("missrec", data / "train", shop.schema(), batch_size=24, shuffle=True)))
    model.heads[0].body[1].refresh_steps = 0
    loss = model.train()(dict(batch), training=True)["loss"]
    sessions = model.heads[0].body[1].state.sessions
    labels = model.heads[0].body[0].masking.masked_targets.amax(1, keepdim=True)
    event_features = {
        name: batch[f"{name}-list"].gather(1, sessions.window) * (sessions.item_ids > 0)
        for name in ("category", "price")
    }
    native = training_loss(
        core, TrainingBatch(sessions.item_ids, labels, event_features), TrainConfig.paper(batch_size=24)
    )
    torch.testing.assert_close(native, loss, rtol=1e-6, atol=1e-6)

    model.eval()
    outside = from_core(core, shop.schema(), shop.catalogue()).eval()
    item_ids = batch["item_id-list"][:, : shop.MAX_LENGTH]
    event_features = {name: batch[f"{name}-list"][:, : shop.MAX_LENGTH] for name in ("category", "price")}
    columns = {"item_id-list": item_ids, **{f"{name}-list": values for name, values in event_features.items()}}
    with torch.no_grad():
        scores = core.score(core(item_ids, event_features), core.candidates(), item_ids)
        assert torch.equal(model(dict(columns)), scores)
        assert torch.equal(outside(dict(columns)), scores)
        without = core.score(core(item_ids), core.candidates(), item_ids)
        assert torch.equal(model({"item_id-list": item_ids}), without), "a missing column counts as absent"
        assert not torch.equal(without, scores)


def test_a_module_between_inputs_and_block_has_no_core() -> None:
    inputs = MultiModalSequenceFeatures.from_schema(shop.schema(), catalogue=shop.catalogue(), max_sequence_length=6)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([12]), MISSRecBlock(**shop.SMALL))
    model = tr.Model(tr.Head(body, [MISSRecNextItemTask()], inputs=inputs))
    with pytest.raises(ConfigError, match="another module between"):
        to_core(model)


def recipe(**train: Any) -> Recipe:
    settings = {"batch_size": 64, "epochs": 3, "learning_rate": 0.01, "seed": 7}
    return Recipe(
        name="small",
        model=shop.config(n_neighbours=0, n_similar_items=0),
        train=TrainConfig.paper(**(settings | train)),
    )


def test_train_t4r_starts_the_ids_as_the_recipe_says(data: Path, tmp_path: Path) -> None:
    for start in ("content", "random"):
        info = train_t4r(data, recipe(id_init=start, learning_rate=1e-9), tmp_path / start, device="cpu")
        assert not info["ignored_settings"]
        tokens = load_run(tmp_path / start).model.item_encoder.catalogue()
        assert tokens.ids is not None
        total = (torch.nn.functional.normalize(tokens.modality, dim=-1) * tokens.mask.unsqueeze(-1)).sum(0)
        alike = torch.cosine_similarity(total, tokens.ids)[tokens.mask.any(0)]
        assert bool((alike > 0.99).all()) == (start == "content")


def test_train_t4r_writes_a_run_that_our_evaluation_loads(
    data: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "missrec_t4r")
    info = train_t4r(data, recipe(ema_decay=0.9, group_by_length=False), tmp_path / "run", device="cpu")
    assert info["ignored_settings"] == ["ema_decay", "group_by_length"]
    assert info["stopped_by"] == "epochs"
    assert "the T4R trainer has no ema_decay, group_by_length: trained without" in caplog.messages
    assert json.dumps(info)
    assert capsys.readouterr().out == ""
    loaded = load_run(tmp_path / "run")
    assert [column.name for column in loaded.model.event_features.columns] == ["category", "price"]
    own = quick_metrics(
        ModelScorer.with_popularity(loaded.model, loaded.catalogue), Sessions.load(data / "valid"), shop.N_ROWS
    )
    assert info["valid_ndcg@10"] == pytest.approx(own["kept_with_history_term"]["ndcg@10"], abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert (
        lines[info["best_epoch"]]["valid_ndcg@10"]
        == info["valid_ndcg@10"]
        == max(line["valid_ndcg@10"] for line in lines)
    )
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert (tmp_path / "run" / "vocabulary.parquet").is_file(), "with it the run takes a catalogue that has grown"


class _Stop(Exception):
    pass


def _interrupted(self: Any, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
    if state.epoch > 1.5:
        raise _Stop


def test_train_t4r_continues_an_interrupted_run(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    train_t4r(data, recipe(), tmp_path / "whole", device="cpu")

    with monkeypatch.context() as patch:
        patch.setattr("missrec_t4r.t4r.trainer._Report.on_evaluate", _interrupted)
        with pytest.raises(_Stop):
            train_t4r(data, recipe(), tmp_path / "halved", device="cpu")
    with pytest.raises(ConfigError, match="T4R run with other settings or data: train.seed 7 -> 8; expected"):
        train_t4r(data, recipe(seed=8), tmp_path / "halved", device="cpu")
    other = shutil.copytree(data, tmp_path / "other")  # as many sessions and items
    rows = pq.read_table(other / "valid" / "part_0.parquet")
    pq.write_table(rows.take(list(range(rows.num_rows))[::-1]), other / "valid" / "part_0.parquet")
    with pytest.raises(ConfigError, match="with other settings or data: the data; expected"):
        train_t4r(other, recipe(), tmp_path / "halved", device="cpu")
    train_t4r(data, recipe(), tmp_path / "halved", device="cpu")
    whole, halved = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "halved"))
    assert [name for name in whole if not torch.equal(whole[name], halved[name])] == []


def test_a_resumed_training_stops_as_early_as_one_that_never_stopped(
    data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Patience, and the time limit, count what was trained before; the log has every epoch once."""
    best_is_the_first = recipe(epochs=9, patience=3, learning_rate=1e-12)
    whole = train_t4r(data, best_is_the_first, tmp_path / "whole", device="cpu")
    assert (whole["stopped_by"], whole["epochs"]) == ("patience", 4)

    def dies(self: Any, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
        real(self, args, state, control, metrics, **more)
        if state.epoch > 2.5:
            raise _Stop

    real = _Report.on_evaluate
    with monkeypatch.context() as patch:
        patch.setattr(_Report, "on_evaluate", dies)
        with pytest.raises(_Stop):
            train_t4r(data, best_is_the_first, tmp_path / "halved", device="cpu")
    log = tmp_path / "halved" / "log.jsonl"
    log.write_text(log.read_text().replace('"seconds": ', '"seconds": 7') + '{"epoch": 3, "lo')
    halved = train_t4r(data, best_is_the_first, tmp_path / "halved", device="cpu")
    assert (halved["stopped_by"], halved["epochs"]) == ("patience", 4)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["seconds"] > lines[2]["seconds"] > lines[1]["seconds"] >= 70


@pytest.mark.parametrize("variable", [None, "1"])
def test_no_code_in_a_checkpoint_runs_when_training_resumes(
    variable: str | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in processes that the training starts: the variable that allows any pickle is set for none of them."""
    name, marker = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", tmp_path / "executed"
    monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(name, variable)
    with monkeypatch.context() as patch:
        patch.setattr("missrec_t4r.t4r.trainer._Report.on_evaluate", _interrupted)
        with pytest.raises(_Stop):
            train_t4r(data, recipe(), tmp_path / "run", device="cpu")
    (last,) = (tmp_path / "run" / CHECKPOINT_FOLDER).glob("checkpoint-*")
    for file in ("rng_state.pth", "optimizer.pt"):
        content = (last / file).read_bytes()
        torch.save({"python": Crafted(marker)}, last / file)
        with pytest.raises(CheckpointError, match="holds a file that could run code when it is read"):
            train_t4r(data, recipe(), tmp_path / "run", device="cpu")
        assert not marker.exists()
        assert os.environ.get(name) == variable
        (last / file).write_bytes(content)


def test_train_t4r_refuses_a_device_that_it_would_not_take(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T4R's Trainer takes the first GPU, or the CPU where there is none, whatever was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda, and PyTorch .* finds 0 GPUs"):
        train_t4r(data, recipe(), tmp_path / "run", device="cuda", dry_run=True)
    monkeypatch.setattr("missrec_t4r.t4r.trainer.own_device", torch.device)
    with pytest.raises(ConfigError, match="--device cuda:1 .* takes the first GPU.*CUDA_VISIBLE_DEVICES=1"):
        train_t4r(data, recipe(), tmp_path / "run", device="cuda:1", dry_run=True)


def test_train_t4r_refuses_several_processes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train on all sessions, and the last one to end would not find the checkpoints any more."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="t4r in 2 processes of torchrun.*leave --trainer out"):
        train_t4r(data, recipe(), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_train_t4r_says_what_needs_less_where_a_gpu_has_no_memory_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tr.Trainer, "training_step", step)
    with pytest.raises(ConfigError, match=r"Tried to allocate 2.00 GiB.*; expected: .*halve train.batch_size"):
        train_t4r(data, recipe(), tmp_path / "run", device="cpu")


def test_train_t4r_takes_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would start a thread for each, which `MISSRecBlock` refuses."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _arguments(recipe(), tmp_path, shop.catalogue(), "auto").n_gpu == 1
    assert _arguments(recipe(), tmp_path, shop.catalogue(), "cpu").n_gpu == 0


def test_train_t4r_stops_early_and_keeps_the_best_epoch(data: Path, tmp_path: Path) -> None:
    info = train_t4r(data, recipe(epochs=40, patience=2, learning_rate=0.05), tmp_path / "run", device="cpu")
    lines = [json.loads(line)["valid_ndcg@10"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) < 40
    assert info["best_epoch"] == int(np.argmax(lines))
    assert len(lines) == info["best_epoch"] + 1 + 2
    assert info["stopped_by"] == "patience"


def test_train_t4r_says_when_the_clock_stopped_it(data: Path, tmp_path: Path) -> None:
    info = train_t4r(data, recipe(epochs=1, batch_size=8, max_minutes=1e-9), tmp_path / "run", device="cpu")
    assert (info["epochs"], info["best_epoch"], info["stopped_by"]) == (1, 0, "max_minutes")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped_by"] == "max_minutes"


def test_a_catalogue_of_another_size_is_refused(data: Path) -> None:
    other = Catalogue(shop.catalogue().items.slice(0, 50), {})
    with pytest.raises(ConfigError, match="a model of 120 rows and a catalogue of 53"):
        from_core(to_core(a_model()), ITEMS, other)


def test_train_t4r_works_on_a_catalogue_below_one_hundred_rows(data: Path, tmp_path: Path) -> None:
    whole = shop.catalogue()
    few = {name: Modality(part.vectors[:40], part.present[:40]) for name, part in whole.modalities.items()}
    Catalogue(whole.items.slice(0, 37), few).save(tmp_path / "catalogue")
    for split in ("train", "valid"):
        rows = [[3 + row % 37 for row in line] for line in shop.sessions(40, seed=1)]
        shop.write_sessions(tmp_path / split, rows)
    TensorflowMetadata.from_merlin_schema(shop.schema(maximum=39)).to_proto_text_file(str(tmp_path))
    info = train_t4r(tmp_path, recipe(epochs=1), tmp_path / "run", device="cpu")
    assert 0 <= info["valid_ndcg@10"] <= 1
