"""The parts for Transformers4Rec on the stand-in for a GPU: loss, backward pass, metrics, its Trainer, ``save_run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.device.second_device import second_device

pytest.importorskip("transformers4rec", reason="the integration needs the extra merlin")


def _model(**settings: Any) -> Any:
    import transformers4rec.torch as tr

    from missrec_t4r.t4r import MISSRecBlock, MISSRecNextItemTask, MultiModalSequenceFeatures
    from tests.contract import shop

    inputs = MultiModalSequenceFeatures.from_schema(
        shop.schema(), catalogue=shop.catalogue(), max_sequence_length=shop.MAX_LENGTH
    )
    body = tr.SequentialBlock(inputs, MISSRecBlock(**shop.SMALL | settings))
    return tr.Model(tr.Head(body, [MISSRecNextItemTask()], inputs=inputs))


def _batch() -> dict[str, Tensor]:
    from tests.contract import shop

    sessions = shop.sessions(6, 0, longest=shop.MAX_LENGTH)
    rows = torch.tensor([line + [0] * (shop.MAX_LENGTH - len(line)) for line in sessions])
    return {"item_id-list": rows, "category-list": rows % shop.N_CATEGORIES, "price-list": (rows / shop.N_ROWS).float()}


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_a_training_step_on_prefixes_waits_for_nothing(ratio: float) -> None:
    from missrec_t4r.t4r.loader import PREFIX_ROWS

    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        with second_device() as waits:
            model = _model(dropout=0.0, interest_ratio=ratio).to(device)
            rows = {name: values.to(device) for name, values in _batch().items()}
            rows[PREFIX_ROWS] = torch.ones(len(rows["item_id-list"]), 1, dtype=torch.bool, device=device)
            model.train()
            for number in range(2):  # the first one discovers interests and reads the number of steps
                before = len(waits)
                result = model(rows, training=True)
                result["loss"].backward()
                assert not number or waits[before:] == []
            losses.append(result["loss"].item())
            assert len(result["predictions"]) == len(result["labels"]) == len(rows["item_id-list"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("mode", ["training", "testing", "ranking"])
def test_a_t4r_model_runs_on_the_gpu(mode: str) -> None:
    torch.manual_seed(0)
    with second_device():
        model = _model(interest_ratio=0.3).to("cuda")
        batch = {name: values.to("cuda") for name, values in _batch().items()}
        model.train(mode == "training")
        result = model(batch, training=mode == "training", testing=mode == "testing")
        if mode == "ranking":
            assert result.device.type == "cuda"
            return
        assert torch.isfinite(result["loss"]).item()
        if mode == "training":
            result["loss"].backward()
            assert any(weight.grad is not None for weight in model.parameters())
        else:
            found = model.calculate_metrics(result["predictions"], result["labels"])
            assert found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

    from tests.contract import shop

    folder = tmp_path_factory.mktemp("shop")
    for seed, split in enumerate(("train", "valid", "test")):
        shop.write_sessions(folder / split, shop.sessions(24, seed))
    TensorflowMetadata.from_merlin_schema(shop.schema()).to_proto_text_file(str(folder))
    shop.catalogue().save(folder / "catalogue")
    return folder


@pytest.mark.parametrize("resumed", [False, True])
def test_the_command_trains_by_t4rs_trainer(data: Path, tmp_path: Path, resumed: bool) -> None:
    from missrec_t4r.commands.training import train
    from missrec_t4r.t4r import trainer

    settings = {"model.d_model": 16, "model.n_head": 2, "model.d_feedforward": 16, "model.max_sequence_length": 9}
    settings |= {"train.batch_size": 32, "train.epochs": 2}
    command: dict[str, Any] = {"trainer": "t4r", "recipe": "default", "settings": settings, "device": "cuda"}
    with second_device():
        if resumed:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(trainer, "fit_terms", _killed)
                with pytest.raises(KeyboardInterrupt):
                    train(data, tmp_path / "run", **command)
        result = train(data, tmp_path / "run", **command)
    assert (result["device"], result["epochs"]) == ("cuda:0", 2)
    assert result["score_terms"]


def _killed(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_script_trains_evaluates_and_saves(data: Path, tmp_path: Path) -> None:
    """As in the README."""
    import transformers4rec.torch as tr
    from transformers4rec.config.trainer import T4RecTrainingArguments

    from missrec_t4r.runs.run_folder import load_run
    from missrec_t4r.t4r import save_run
    from tests.contract import shop

    with second_device():
        model = _model(interest_ratio=0.0)
        arguments = T4RecTrainingArguments(
            output_dir=str(tmp_path / "t4r"),
            data_loader_engine="missrec",
            max_sequence_length=shop.MAX_LENGTH,
            num_train_epochs=1,
            learning_rate=1e-3,
            per_device_train_batch_size=32,
            report_to=[],
            disable_tqdm=True,
        )
        paths = {"train_dataset_or_path": str(data / "train"), "eval_dataset_or_path": str(data / "test")}
        trainer = tr.Trainer(model=model, args=arguments, schema=shop.schema(), compute_metrics=True, **paths)
        trainer.train()
        assert 0 <= trainer.evaluate()["eval_/next-item/ndcg_at_10"] <= 1
        assert save_run(model, trainer=trainer, out=tmp_path / "run")["device"] == "cuda:0"
    assert load_run(tmp_path / "run").model.recommendable.any()
