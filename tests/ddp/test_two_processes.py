"""Two processes, as under torchrun (gloo, on CPU), against one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from missrec_t4r.config import TrainConfig
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.runs.run_folder import load_run, load_tensors
from missrec_t4r.training import distributed
from missrec_t4r.training.fit import train
from missrec_t4r.training.step import batch_totals, training_loss
from tests import shop
from tests.ddp import group, losses
from tests.unit.conftest import data  # noqa: F401  # the fixture of forty sessions

pytestmark = pytest.mark.ddp
REPOSITORY = Path(__file__).resolve().parents[2]


def test_losses_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    assert [code for code, _ in group.run(["-m", "tests.ddp.losses", tmp_path])] == [0, 0]
    expected = losses.results()
    assert sum(name.endswith("/loss") for name in expected) == 7
    for rank in range(2):
        found = load_tensors(tmp_path / f"{rank}.safetensors")
        assert found["share"].tolist() == [7]
        assert found["collect"].tolist() == [0, 10]
        assert found["broadcast"].tolist() == [0.0, 0.0]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=f"{name} in process {rank}")


def test_a_group_of_one_process_sends_its_messages_and_changes_nothing(tmp_path: Path) -> None:
    """What one GPU shows of the messages between several."""
    assert group.run(["-m", "tests.ddp.losses", tmp_path], size=1)[0][0] == 0
    found = load_tensors(tmp_path / "0.safetensors")
    assert found["grouped"].item()
    for name, value in losses.results().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_no_thread_of_the_group_outlives_it() -> None:
    """Such a thread can abort the process, after its training, while the interpreter exits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "tests.ddp.leave_group"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_parts_of_one_process_add_up_to_the_same(tmp_path: Path) -> None:
    """Against the plain loss of the whole batch, where the test above has the trainer in one process."""
    for name, (config, softmax) in losses.CASES.items():
        model, loss = losses.fine_tuning(name)
        batch = losses.whole_batch(config)
        torch.testing.assert_close(loss, training_loss(model, batch, losses.TRAIN, softmax=softmax))
        plain = training_loss(shop.model(config).train(), batch, losses.TRAIN)
        torch.testing.assert_close(loss, plain, msg=name)


def test_a_process_without_sessions_has_no_effect() -> None:
    batch = TrainingBatch(torch.tensor([[3, 4]]), torch.tensor([[[5], [6]]]), {"price": torch.ones(1, 2)})
    empty = batch.part(1, 2)
    assert empty.event_features["price"].tolist() == [[0, 0]]
    model = shop.model(shop.default(orthogonality_weight=0.1)).train()
    loss = training_loss(model, empty, TrainConfig.paper(), totals=batch_totals(model, batch))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


def test_missrec_train_under_torchrun(data: Path, tmp_path: Path) -> None:  # noqa: F811  # pytest's way
    settings = {
        "model.d_model": 16,
        "model.n_head": 2,
        "model.dropout": 0.0,
        "model.max_sequence_length": 5,
        "train.batch_size": 33,
        "train.epochs": 2,
        "train.checkpoint_minutes": 0.000001,
    }
    options = [
        f"--set={name}={value:f}" if isinstance(value, float) else f"--set={name}={value}"
        for name, value in settings.items()
    ]
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "missrec_t4r", "train", "--data", data, "--out", out, "--recipe=tiny", "--device=cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = done.stdout.strip().splitlines()  # one answer, the first process's
    assert json.loads(line)["run"] == str(out)
    alone = train(data, tmp_path / "one", recipe="tiny", settings=settings, device="cpu")
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert json.loads(line)["valid_ndcg@10"] == pytest.approx(alone["valid_ndcg@10"], abs=0.02)
    session = torch.tensor([[3, 4, 5]])
    one, two = (load_run(tmp_path / name).model(session) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=0.02)


def test_a_run_is_resumed_by_all_processes_or_by_none(data: Path, tmp_path: Path) -> None:  # noqa: F811  # pytest's way
    """Else the second one would go on with fresh weights, whose gradients are added to the first one's."""
    for code, message in group.run(["-m", "tests.ddp.folders", data, tmp_path]):
        assert code == 1
        assert "process 1 does not find the checkpoint" in message
    log = (tmp_path / "0" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0]


def test_without_torchrun_there_is_one_process() -> None:
    assert distributed.world() == (0, 1, 0)
    rows = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather_rows(rows) is rows
    assert distributed.rows_before(5) == 0
    assert distributed.collect("x") == ["x"]
