"""Weights that an earlier version wrote load into today's model, from every kind of file."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.runs.extend import load_strictly
from missrec_t4r.runs.run_folder import load_tensors
from tests import shop

BEFORE = {
    "item_encoder.": "towers.",
    "event_features.": "side.",
    "terms.cold_start.": "prior.newcomers.",
    "terms.item_knn.": "prior.",
    "terms.content_knn.": "lookalikes.",
    "terms.history_bias.bias": "history_bias",
}


def built(seed: int) -> MISSRec:
    torch.manual_seed(seed)
    return shop.model(shop.default(n_neighbours=6, cold_start_exposure=1.0))


def earlier(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for now, before in BEFORE.items():
        weights = {
            before + name.removeprefix(now) if name.startswith(now) else name: weight
            for name, weight in weights.items()
        }
    return weights


def test_a_run_of_an_earlier_version_loads(tmp_path: Path) -> None:
    model, other = built(1), built(2)
    names = earlier(model.state_dict())
    assert {"towers.adapters.text.weight", "prior.counts", "prior.newcomers.settings", "history_bias"} <= set(names)
    save_file({name: weight.clone() for name, weight in names.items()}, tmp_path / "weights.safetensors")
    weights = load_tensors(tmp_path / "weights.safetensors")
    assert set(weights) == set(model.state_dict())
    load_strictly(other, weights, "here")
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_checkpoint_of_another_trainer_loads_where_the_model_is_a_part_of_it() -> None:
    model, other = built(1), built(2)
    state = {f"heads.0.{name}": weight for name, weight in earlier(model.state_dict()).items()}
    torch.nn.ModuleDict({"heads": torch.nn.ModuleList([other])}).load_state_dict(state)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())


def test_names_of_today_stay_as_they_are(tmp_path: Path) -> None:
    weights = built(1).state_dict()
    save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / "weights.safetensors")
    assert set(load_file(tmp_path / "weights.safetensors")) == set(load_tensors(tmp_path / "weights.safetensors"))
