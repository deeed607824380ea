"""Every command in docs/howto/data.md exists, with every option that stands beside it."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from missrec_t4r.cli.app import loaded

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "data.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```\n(.*?)```", DOCUMENT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("missrec ")
]


@cache
def _commands() -> dict[str, Any]:
    return {command.name: shown for command, shown in loaded()}


def _resolve(words: list[str]) -> tuple[Any, list[str]]:
    """Return the click command that words begin with, and the rest of them."""
    length = 1 if words[0] in _commands() else 2
    return _commands()[" ".join(words[:length])], words[length:]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_the_command_takes_these_options(words: list[str]) -> None:
    command, rest = _resolve(words)
    known = {option for parameter in command.params for option in parameter.opts}
    required = {parameter.opts[0] for parameter in command.params if parameter.required}
    given = {word for word in rest if word.startswith("--")}
    assert given <= known
    assert required <= given


def test_the_options_of_the_table_exist() -> None:
    command, _ = _resolve(["features"])
    known = {option for parameter in command.params for option in parameter.opts}
    named = re.findall(r"^\| `(--[\w-]+)|, `(--[\w-]+)", DOCUMENT, re.MULTILINE)
    assert len(named) >= 6
    assert {first or second for first, second in named} - {"--valid", "--test"} <= known
    assert COMMANDS
