"""docs/howto/pretrain.md: its commands are run one after the other, with the documented results."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app

pytest.importorskip("nvtabular", reason="the ETL needs the extra merlin")


def test_the_commands_of_the_howto(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "docs" / "howto" / "pretrain.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    assert commands
    monkeypatch.chdir(tmp_path)
    answers = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "missrec"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (command, done.output)
        answers[" ".join(arguments[:1] + arguments[-1:])] = json.loads(done.stdout.strip().splitlines()[-1])

    pre, tools, tonight = (
        json.loads((tmp_path / "runs" / run / "run.json").read_text()) for run in ("pre", "tools", "tools-tonight")
    )
    assert pre["pretraining"]["modalities"] == {"text": {"books": "text", "toys": "text"}}
    parts = {part["name"]: part for part in tools["weight_loading"]["parts"]}
    assert parts["adapter text"]["status"] == "loaded"
    assert parts["item IDs"]["status"] == "missing"
    assert {name for name, part in parts.items() if part["frozen"]} == {"position embedding", "decoder"}
    assert tonight["weight_loading"]["items"] == {"kept": 100, "new": 0, "retired": 0}
    for word in re.findall(r"^\| `(\w+)`", text, re.M):
        assert word in {"encoder_decoder", "none", "all_loaded"}
    named = set(re.findall(r"`(?:pretrain|train)\.(\w+)`", text))
    assert named
    assert named <= _settings(tmp_path / "runs" / "pre")


def _settings(run: Path) -> set[str]:
    recipe = json.loads((run / "recipe.json").read_text())
    return {name for part in ("model", "train", "pretrain") for name in recipe[part]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "--data", "nowhere", "--out", "o"], "missrec etl"),
        (["pretrain", "--data", "x/a", "--data", "y/a", "--out", "o"], "two domains are called 'a'"),
        (["pretrain", "--data", "a", "--out", "o", "--set", "pretrain.objectiv=x"], "did you mean 'objective'"),
        (["train", "--data", "a", "--out", "o", "--from", "nowhere"], "a finished run"),
        (["train", "--data", "a", "--out", "o", "--continue", "nowhere"], "a finished run"),
        (["train", "--data", "a", "--out", "o", "--freeze", "none"], "--from RUN"),
    ],
)
def test_bad_input_ends_with_a_message_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []
