"""The parts for Transformers4Rec on the stand-in for a GPU: loss, backward pass, metrics, ``model(batch)``."""

from __future__ import annotations

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
