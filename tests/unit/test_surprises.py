"""What surprised new users of training: a device that is not there, a run that was replaced, names nobody typed."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.cli.demo import _get_json, without_restart
from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.runs.run_folder import load_run, load_tensors
from missrec_t4r.serving.http_server import HttpServer
from missrec_t4r.training import distributed
from missrec_t4r.training.distributed import own_device
from missrec_t4r.training.step import Totals
from missrec_t4r.training.trainer import Trainer
from tests import shop

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


def test_a_gpu_that_torch_does_not_find_is_mentioned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a driver older than torch's CUDA, or a torch for CPUs, a training would be slow for no visible reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def warnings_of(device: str) -> list[str]:
        caplog.clear()
        distributed._warn_of_an_idle_gpu.cache_clear()
        assert own_device(device) == own_device(device) == torch.device("cpu")
        return caplog.messages

    assert warnings_of("auto") == []
    (tmp_path / "nvidiactl").touch()
    (line,) = warnings_of("auto")
    assert re.match(r"this machine has an NVIDIA GPU, and torch \S+, built for .*, finds none: on the CPU", line)
    assert warnings_of("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert warnings_of("auto") == []
    distributed._warn_of_an_idle_gpu.cache_clear()


def test_a_finished_run_is_replaced_by_other_settings_only_on_request(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(data, run)[0] == 0
    weights = (run / "weights.safetensors").read_bytes()
    assert json.loads(_train(data, run)[1])["found"] is True
    code, _, words = _train(data, run, "--set=train.batch_size=64")
    assert code == 2
    assert "holds a finished run with other settings: train.batch_size 256 -> 64" in words
    assert f"remove {run} to train anew" in without_restart(words, run)  # what `missrec demo` says of it
    assert "--restart" in words
    assert (run / "weights.safetensors").read_bytes() == weights
    assert _train(data, run, "--set=train.batch_size=64", "--restart")[0] == 0
    assert json.loads((run / "recipe.json").read_text())["train"]["batch_size"] == 64


def test_a_run_works_on_a_data_folder_with_new_items_and_events(data: Path, tmp_path: Path) -> None:
    """As after `missrec etl --update`: old items keep rows and scores, a new one is scored by its modalities."""
    run, grown = tmp_path / "run", tmp_path / "grown"
    assert _train(data, run)[0] == 0
    before = Catalogue.load(data / "catalogue")
    vectors = shop.random_modalities(14, {"text": 8, "image": 5}, seed=4)
    for name, old in before.modalities.items():
        vectors[name].vectors[:15], vectors[name].present[:15] = old.vectors, old.present
    shop.write_circle(grown, [f"P{number}" for number in range(14)], vectors, n_users=50)
    old, new = load_run(run), load_run(run, grown)
    assert new.catalogue.train_count[3:].tolist() == [*before.train_count[3:].tolist(), 0, 0]
    sessions = torch.tensor([[3, 4, 5], [9, 10, 0]])
    with torch.inference_mode():
        scores = [one.model.score(one.model(sessions), one.model.candidates(), sessions) for one in (old, new)]
    torch.testing.assert_close(scores[1][:, 3:15], scores[0][:, 3:15])
    assert torch.isfinite(scores[1][:, 15:]).all()
    evaluated = CliRunner().invoke(app, ["evaluate", f"--run={run}", f"--data={grown}", "--no-baselines"])
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.stdout)["n_items"] == 14
    shop.write_circle(tmp_path / "other", [f"P{number}" for number in range(14, 0, -1)], vectors)
    with pytest.raises(CheckpointError, match=r"another order of items, than .*--warm-start"):
        load_run(run, tmp_path / "other")
    shop.write_circle(tmp_path / "numbers", [*range(14)], vectors)
    with pytest.raises(CheckpointError, match=r"another order of items, than .*: 0 of 12 are there"):
        load_run(run, tmp_path / "numbers")


def _encoded_anew(folder: Path, modalities: dict[str, Modality]) -> Path:
    return shop.write_circle(folder, [f"P{number}" for number in range(12)], modalities)


def test_a_run_takes_the_vectors_that_it_was_trained_on(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Vectors of another encoder, or of one that was fitted anew, have the same shape and give other scores."""
    run, before = tmp_path / "run", dict(Catalogue.load(data / "catalogue").modalities)
    before["text"] = replace(before["text"], encoder={"fingerprint": "sha256:ours"})
    assert _train(_encoded_anew(tmp_path / "data", before), run)[0] == 0
    more = {"audio": shop.random_modalities(12, {"audio": 3}, seed=1)["audio"], **before}
    caplog.set_level("INFO")
    loaded = load_run(run, _encoded_anew(tmp_path / "more", more))
    assert list(loaded.catalogue.modalities) == ["text", "image"]
    assert "also has vectors of audio" in caplog.text
    with pytest.raises(CheckpointError, match="has no vectors of image, which .* was trained on"):
        load_run(run, _encoded_anew(tmp_path / "less", {"text": before["text"]}))
    other = replace(before["text"], encoder={"fingerprint": "sha256:other"})
    with pytest.raises(
        CheckpointError, match="the text vectors of .* of another encoder .*sha256:ours then, sha256:other now"
    ):
        load_run(run, _encoded_anew(tmp_path / "other", {**before, "text": other}))
    unknown = replace(before["text"], encoder={})
    load_run(run, _encoded_anew(tmp_path / "unknown", {**before, "text": unknown}))
    assert "whether the text vectors are those" in caplog.text


def test_a_time_limit_is_an_option(data: Path, tmp_path: Path) -> None:
    code, answer, _ = _train(data, tmp_path / "run", "--set=train.epochs=50", "--max-minutes=1e-9")
    assert code == 0
    assert (json.loads(answer)["stopped_by"], json.loads(answer)["epochs"]) == ("max_minutes", 1)
    assert json.loads((tmp_path / "run/recipe.json").read_text())["train"]["max_minutes"] == 1e-9
    code, _, words = _train(data, tmp_path / "other", "--set=train.max_minutes=5", "--max-minutes=3")
    assert (code, "--max-minutes and another --set train.max_minutes" in words) == (2, True)


def test_every_epochs_line_tells_the_speed_and_the_time_left(data: Path, tmp_path: Path) -> None:
    code, _, words = _train(data, tmp_path / "run", "--set=train.epochs=2")
    assert code == 0
    told = re.findall(r"epoch +(\d) .*? [\d.]+ steps/s +at most (\d+) (?:s|min) left", words)
    assert [epoch for epoch, _ in told] == ["0", "1"]
    assert told[1][1] == "0"


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model.n_head", 7, "model.d_model 32 is no multiple of model.n_head 7"),
        ("train.learning_rate", -1, "train.learning_rate -1 is not positive"),
        ("train.epochs", 0, "train.epochs 0 is below 1"),
    ],
)
def test_messages_name_settings_as_they_are_typed(setting: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        Recipe.load("tiny", {setting: value})
    assert "--n-head" not in str(refused.value)


@pytest.mark.parametrize("step", [2, 9], ids=["in the first epoch", "later"])
def test_an_interrupt_keeps_the_best_so_far_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run, options = tmp_path / "run", ["--set=train.epochs=3", "--set=train.batch_size=32"]
    assert _train(data, tmp_path / "whole", *options)[0] == 0
    real = Trainer.loss

    def interrupted(self: Trainer, batch: TrainingBatch, totals: Totals | None = None) -> torch.Tensor:
        if self.status["step"] == step:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, totals)

    monkeypatch.setattr(Trainer, "loss", interrupted)
    code, answer, words = _train(data, run, *options)
    monkeypatch.undo()
    assert code == 130
    assert json.loads(answer)["stopped_by"] == "interrupt"
    assert "the same command continues from here" in words
    assert not load_run(run).model.training
    code, answer, words = _train(data, run, *options)
    assert (code, json.loads(answer)["stopped_by"]) == (0, "epochs")
    assert "resuming in epoch" in words
    one, other = (load_tensors(folder / "weights.safetensors") for folder in (tmp_path / "whole", run))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_demo_asks_its_server_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is set, the loopback interface need not be among its exceptions."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://no-such-proxy.invalid:1")
    with HttpServer(0, lambda request: (200, {}, b'{"version": "1"}')) as server:
        assert _get_json(server.address, "") == {"version": "1"}


def test_a_finished_run_goes_on_for_more_epochs_and_ends_like_a_longer_one(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(data, run, "--set=train.epochs=1")[0] == 0
    code, answer, words = _train(data, run, "--set=train.epochs=2", "--set=train.patience=9")
    assert code == 0, words
    assert json.loads(answer)["epochs"] == 2
    assert "resuming in epoch 1" in words
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert _train(data, tmp_path / "longer", "--set=train.epochs=2", "--set=train.patience=9")[0] == 0
    one, other = (load_tensors(folder / "weights.safetensors") for folder in (tmp_path / "longer", run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    code, _, words = _train(data, run, "--set=train.epochs=1")
    assert code == 2
    assert "train.epochs 2 -> 1" in words


def test_the_home_folder_is_meant_by_a_tilde_that_the_shell_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``--run=~/run``, and in a pattern in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    answer = CliRunner().invoke(app, ["evaluate", "--run=~/run"])
    assert f"{tmp_path / 'run'} holds no run.json" in " ".join(answer.stderr.split())
    given = ["etl", "--interactions=~/events/*.csv", "--items=~/items.csv", "--out=~/data"]
    answer = CliRunner().invoke(app, given)
    assert f"{tmp_path / 'events'}" in "".join(answer.stderr.split())
    assert "~" not in answer.stderr
    given = ["train", "--data=~/data", "--out=~/run", "--recipe=~/mine.yaml"]
    assert f"{tmp_path / 'mine.yaml'}" in "".join(CliRunner().invoke(app, given).stderr.split())
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\nann,desk,1\n")
    given = ["etl", "--interactions=~/events.csv", "--modality", "text=~/text.npy", "--out=~/data"]
    answer = CliRunner().invoke(app, [*given, "--items", str(tmp_path / "events.csv")])
    assert f"{tmp_path / 'text.npy'}" in "".join(answer.stderr.split())


def test_the_tilde_of_an_unknown_user_stays(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["evaluate", "--run", "~nobody-of-this-name/run"])
    assert answer.exit_code == 2
    assert "~nobody-of-this-name/run holds no run.json" in " ".join(answer.stderr.split())
