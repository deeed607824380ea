"""What surprised new users of training: a device that is not there, a run that was replaced, names nobody typed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.config import Recipe
from missrec_t4r.errors import ConfigError
from missrec_t4r.training.distributed import own_device

SMALL = ["--recipe=tiny", "--set=model.d_model=16", "--set=model.n_head=2", "--set=train.epochs=1", "--device=cpu"]


def _train(data: Path, run: Path, *options: str) -> tuple[int, str, str]:
    answer = CliRunner().invoke(app, ["train", f"--data={data}", f"--out={run}", *SMALL, *options])
    return answer.exit_code, answer.stdout, " ".join(answer.stderr.split())


def test_a_device_that_is_not_there_is_named_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"--device cuda, and PyTorch \S+ finds 0 GPUs; expected: a GPU\. --device auto"
    ):
        own_device("cuda")
    with pytest.raises(ConfigError, match="--device 'gpu'; expected: auto, cpu or cuda"):
        own_device("gpu")
    assert own_device("auto") == torch.device("cpu")


def test_a_finished_run_is_replaced_by_other_settings_only_on_request(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(data, run)[0] == 0
    weights = (run / "weights.safetensors").read_bytes()
    assert json.loads(_train(data, run)[1])["found"] is True
    code, _, words = _train(data, run, "--set=train.batch_size=64")
    assert code == 2
    assert "holds a finished run with other settings: train.batch_size 256 -> 64" in words
    assert "--restart" in words
    assert (run / "weights.safetensors").read_bytes() == weights
    assert _train(data, run, "--set=train.batch_size=64", "--restart")[0] == 0
    assert json.loads((run / "recipe.json").read_text())["train"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model.n_head", 7, "model.d_model 32 is no multiple of model.n_head 7"),
        ("train.learning_rate", -1, "train.learning_rate -1 is not positive"),
        ("train.epochs", 0, "train.batch_size, epochs, patience or next_items is below 1"),
    ],
)
def test_messages_name_settings_as_they_are_typed(setting: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        Recipe.load("tiny", {setting: value})
    assert "--n-head" not in str(refused.value)
