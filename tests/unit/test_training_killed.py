"""A real process, killed without warning in the middle of an epoch, and what becomes of its run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from missrec_t4r.training.checkpoint import RUN_FILE, STATE_FILE, load_metadata, load_tensors
from missrec_t4r.training.finetune import train

SETTINGS = {
    "model.d_model": 16,
    "model.n_head": 2,
    "model.dropout": 0.3,
    "model.max_sequence_length": 5,
    "model.modality_dropout": 0.2,
    "train.next_items": 2,
    "train.reverse_probability": 0.5,
    "train.batch_size": 8,
    "train.epochs": 4,
    "train.patience": 99,
    "train.warmup_steps": 5,
    "train.schedule": "cosine",
}


def _curve(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["epoch"], line["loss"], line["valid_ndcg@10"]) for line in lines]


def _place(run: Path) -> tuple[int, int]:
    """Epoch and steps of the state on disk."""
    try:
        status = json.loads(load_metadata(run / STATE_FILE)["facts"])["status"]
    except (OSError, KeyError):
        return 0, 0
    return status["epoch"], status["done"]


def _start(data: Path, run: Path) -> subprocess.Popen[bytes]:
    options = [f"--set={name}={value}" for name, value in (SETTINGS | {"train.checkpoint_minutes": "0.000001"}).items()]
    command = [sys.executable, "-m", "missrec_t4r", "train", "--data", str(data), "--out", str(run), "--recipe", "tiny"]
    return subprocess.Popen([*command, *options, "--device=cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_killed_in_mid_epoch_and_started_again_a_run_ends_as_if_nothing_had_happened(
    data: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process: sums in the same order
    train(data, tmp_path / "whole", recipe="tiny", settings=SETTINGS, device="cpu")
    process = _start(data, tmp_path / "killed")
    while process.poll() is None and not (_place(tmp_path / "killed")[0] >= 1 and _place(tmp_path / "killed")[1] > 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    epoch, done = _place(tmp_path / "killed")
    assert epoch >= 1
    assert done > 0, "not in the middle of an epoch"
    assert not (tmp_path / "killed" / RUN_FILE).exists()

    train(data, tmp_path / "killed", recipe="tiny", settings=SETTINGS, device="cpu")
    torch.set_num_threads(threads)
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "whole")
    whole, killed = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
