"""A training process is killed (SIGKILL) within an epoch and resumed: the result is that of an uninterrupted run."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.runs.run_folder import RUN_FILE, STATE_FILE, load_metadata, load_tensors
from missrec_t4r.training.fit import train
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.step import Totals
from missrec_t4r.training.trainer import Trainer
from tests import processes

SETTINGS = {
    "model.d_model": 16,
    "model.n_head": 2,
    "model.dropout": 0.3,
    "model.max_sequence_length": 5,
    "model.modality_dropout": 0.2,
    "model.n_neighbours": 0,  # terms are fitted after training, from sessions alone
    "model.n_similar_items": 0,
    "train.next_items": 2,
    "train.reverse_probability": 0.5,
    "train.batch_size": 8,
    "train.epochs": 4,
    "train.patience": 99,
    "train.warmup_steps": 5,
    "train.schedule": "cosine",
}


STEPWISE = {"train.epochs": 2, "train.batch_size": 16, "train.checkpoint_minutes": 1e-9}
KILLED = """
import os, signal, torch
from missrec_t4r.cli import app
from missrec_t4r.training.trainer import Trainer

def dies(trainer, *given, loss=Trainer.loss):
    if (trainer.status["epoch"], trainer.status["done"]) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(trainer, *given)

torch.set_num_threads(1)
Trainer.loss = dies
app()
"""


def _curve(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["epoch"], line["loss"], line["valid_ndcg@10"]) for line in lines]


def _position(run: Path) -> tuple[int, int]:
    """Epoch and steps of the state on disk."""
    try:
        status = json.loads(load_metadata(run / STATE_FILE)["facts"])["status"]
    except (OSError, KeyError, RuntimeError):  # RuntimeError: replaced by the next state while it was mapped
        return 0, 0
    return status["epoch"], status["done"]


def test_a_run_killed_within_an_epoch_is_resumed_and_ends_like_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process: sums in the same order
    train(data, tmp_path / "whole", recipe="tiny", settings=SETTINGS, device="cpu")
    options = [f"--set={name}={value}" for name, value in (SETTINGS | {"train.checkpoint_minutes": "0.000001"}).items()]
    words = ["train", "--data", data, "--out", tmp_path / "killed", "--recipe=tiny", "--device=cpu", *options]
    assert processes.run(["-c", KILLED, *words]).returncode == -signal.SIGKILL
    assert _position(tmp_path / "killed") == (1, 3), "in the middle of an epoch"
    assert not (tmp_path / "killed" / RUN_FILE).exists()

    train(data, tmp_path / "killed", recipe="tiny", settings=SETTINGS, device="cpu")
    torch.set_num_threads(threads)
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "whole")
    whole, killed = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"train.softmax": "sampled", "train.negatives": 4, "train.clip_norm": 1.0},
        {"train.softmax": "chunked", "train.chunk_size": 4, "train.accumulate": 2, "train.precision": "bf16"},
    ],
    ids=["sampled", "chunked"],
)
def test_every_kind_of_step_is_resumed_within_its_epoch(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = Recipe.load("tiny", SETTINGS | settings | STEPWISE)
    train(data, tmp_path / "whole", recipe=recipe, device="cpu")
    sessions = [Sessions.load(data / split).known() for split in ("train", "valid")]

    class Killed(Exception):
        pass

    class Dies(Trainer):
        def loss(self, batch: TrainingBatch, totals: Totals | None = None) -> Tensor:
            if self.status["done"] == 7:
                raise Killed
            return super().loss(batch, totals)

    read = TrainingData(Catalogue.load(data / "catalogue"), *sessions)
    with pytest.raises(Killed):
        Dies(recipe, read, tmp_path / "killed", "cpu").run(data)
    assert _position(tmp_path / "killed") == (0, 7)
    torch.manual_seed(123)
    train(data, tmp_path / "killed", recipe=recipe, device="cpu")
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "whole")
    whole, killed = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_an_interrupted_run_is_not_resumed_with_other_data_of_the_same_sizes(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    sessions = [Sessions.load(data / split).known() for split in ("train", "valid")]
    catalogue, recipe = Catalogue.load(data / "catalogue"), Recipe.load("tiny", SETTINGS)
    for go_on in (Trainer.save_checkpoint, Trainer.resume):
        go_on(Trainer(recipe, TrainingData(catalogue, *sessions), tmp_path / "run", "cpu"))
    others = [Sessions(part.values[::-1].copy(), part.offsets) for part in sessions]
    text = catalogue.modalities["text"]
    encoded = catalogue.modalities | {"text": replace(text, vectors=text.vectors[::-1].copy())}
    for items, train_split, valid_split in (
        (catalogue, others[0], sessions[1]),
        (catalogue, sessions[0], others[1]),
        (Catalogue(catalogue.items, encoded), *sessions),
    ):
        with pytest.raises(ConfigError, match="other settings or data: the data, the run that it starts from, or"):
            Trainer(recipe, TrainingData(items, train_split, valid_split), tmp_path / "run", "cpu").resume()


def test_settings_of_speed_may_change_when_a_run_is_resumed(data: Path, tmp_path: Path) -> None:
    sessions = [Sessions.load(data / split).known() for split in ("train", "valid")]
    read, out = TrainingData(Catalogue.load(data / "catalogue"), *sessions), tmp_path / "run"
    out.mkdir()
    Trainer(Recipe.load("tiny", SETTINGS), read, out, "cpu").save_checkpoint()
    changed = SETTINGS | {"train.checkpoint_minutes": 1.0, "train.cuda_graphs": False}
    Trainer(Recipe.load("tiny", changed), read, out).resume()
    with pytest.raises(ConfigError, match="number of processes"):
        Trainer(Recipe.load("tiny", SETTINGS | {"train.accumulate": 2}), read, out).resume()
