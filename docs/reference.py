"""Writes docs/reference.md from the code: commands with their options, settings of recipes, public Python names.

    make docs

A test compares the page with the code, so that it cannot grow old.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import missrec_t4r
from missrec_t4r.cli.app import COMMON, loaded
from missrec_t4r.config import MISSRecConfig, PretrainConfig, Recipe, TrainConfig, shipped_recipes

PAGE = Path(__file__).with_suffix(".md")
SETTINGS = {"model": MISSRecConfig, "train": TrainConfig, "pretrain": PretrainConfig}
_HEAD = """# Reference

Made from the code by `make docs`. Every command is one typed Python function in `missrec_t4r.commands`, and every
option a keyword of it: `missrec evaluate --run work/run` is `commands.evaluate(run="work/run")`.

[Commands](#commands) · [Settings of recipes](#settings-of-recipes) · [Python](#python)
"""

_SETTINGS_HEAD = """## Settings of recipes

A recipe is a YAML file with `model:`, `train:` and `pretrain:`; `--set model.d_model=128` changes one setting of it.
Shipped: {}; `auto` [chooses](howto/train.md) for the data. *Default* is what a setting is that a recipe leaves out;
shipped recipes that have another value follow.
"""


def reference() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_commands(), *_settings(), *_python()]).rstrip() + "\n"


def _commands() -> Iterator[str]:
    yield "## Commands\n\nEvery command also has:\n"
    yield from (f"* `{'`, `'.join(flags)}`: {text}" for _, flags, text in COMMON)
    yield ""
    common = {flags[0] for _, flags, _ in COMMON} | {"--help"}
    for command, shown in loaded():
        name = f"`missrec {command.name}`"
        yield f"### {name}\n\n{_plain(shown.help or '')}\n\nPython: `commands.{command.function}`\n"
        yield "| option | in Python | meaning | default |\n|---|---|---|---|"
        for option in shown.params:
            if not common & set(option.opts):
                names = " / ".join([*option.opts, *option.secondary_opts])
                yield f"| `{names}` | `{option.name}` | {_cell(option.help or '')} | {_default(option)} |"
        yield ""


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default in ((), [], ""):
        return ""
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    if isinstance(option.default, list | tuple):
        return f"`{' '.join(map(str, option.default))}`"
    return f"`{getattr(option.default, 'value', option.default)}`"


def _settings() -> Iterator[str]:
    recipes = {name: Recipe.load(name).to_dict() for name in shipped_recipes()}
    yield _SETTINGS_HEAD.format(", ".join(f"`{name}`" for name in recipes))
    for part, settings in SETTINGS.items():
        yield f"### `{part}`\n\n| setting | default | in recipes | meaning |\n|---|---|---|---|"
        meanings = _attribute_docstrings(settings)
        for item in dataclasses.fields(settings):
            others = [
                f"{name} `{values[part][item.name]}`"
                for name, values in recipes.items()
                if values[part][item.name] != item.default
            ]
            cells = f"`{item.default}`", ", ".join(others), _cell(meanings[item.name])
            yield f"| `{part}.{item.name}` | {' | '.join(cells)} |"
        yield ""


def _attribute_docstrings(settings: type[Any]) -> dict[str, str]:
    """Return the text below each field of a dataclass, which Python itself does not keep."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(settings)))
    body = tree.body[0].body  # type: ignore[attr-defined]  # a class
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[field.target.id] = ast.literal_eval(text.value)  # type: ignore[union-attr]  # a name
    return found


def _python() -> Iterator[str]:
    yield "## Python\n\n`import missrec_t4r as mr`; torch and tritonclient are enough for the model and the client.\n"
    yield "| name | what it is |\n|---|---|"
    for name in missrec_t4r.__all__:
        thing = getattr(missrec_t4r, name)
        if name != "__version__":
            first = inspect.getdoc(thing) or ""
            file = inspect.getsourcefile(thing) or ""
            place = Path(file).relative_to(PAGE.parents[1]).as_posix()
            yield f"| [`mr.{name}`](../{place}) | {_cell(first.partition(chr(10) * 2)[0])} |"
    yield ""


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\b", "")).strip()


def _cell(text: str) -> str:
    return _plain(text).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"{PAGE}: {len(reference().splitlines())} lines")
