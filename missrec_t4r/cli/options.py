"""Command-line options from a function's signature: the annotation gives the type, the docstring the help text.

| annotation | option |
|---|---|
| ``bool = False`` / ``bool = True`` | ``--name`` / ``--name/--no-name`` |
| ``int``, ``float``, ``str``, ``str | Path``, ``Literal[...]`` | ``--name VALUE`` |
| ``Sequence[str]`` | ``--names A,B``; with a flag of its own in the singular ``--name VALUE``, repeatable |
| ``Sequence[Path]`` | ``--name VALUE``, repeatable |
| ``Mapping[str, str | Path]`` | ``--name NAME=VALUE``, repeatable |
| any other mapping | ``--name JSON``; with `Option.yaml` ``--name KEY=VALUE``, repeatable, values read as YAML |

An option is spelled like its parameter, or as `config.option_names.FLAGS` says. A parameter without a default
is required unless its annotation admits None. Values of ``Literal`` are checked by the function, so that Python and the
command line give the same three-part error.
"""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import typer
import yaml

from missrec_t4r.commands.in_python import flags_of
from missrec_t4r.config.option_names import FLAGS
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.errors import ConfigError

_Path = TypeVar("_Path", str, Path, None)


@dataclass(frozen=True)
class Option:
    """How a parameter is given on the command line where its type does not determine it."""

    yaml: bool = False
    """A mapping is given as KEY=VALUE, and each value is read as YAML."""
    text: bool = False
    """A ``str | Path`` is a name as often as a path."""
    required: bool | None = None
    argument: bool = False
    """Given without a flag, by its place."""


@dataclass(frozen=True)
class Bound:
    """One parameter as typer sees it, and how its value becomes the function's argument."""

    name: str
    parameter: inspect.Parameter
    convert: Callable[[Any], Any]


def options_of(
    function: Callable[..., Any], exceptions: Mapping[str, Option], left_out: Iterable[str] = ()
) -> list[Bound]:
    """Return the options of a function, in the order of its signature."""
    hints, helps = typing.get_type_hints(function), parameter_help(inspect.getdoc(function) or "")
    return [
        _bound(parameter, hints[name], helps.get(name, ""), exceptions.get(name, Option()))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in left_out
    ]


def parameter_help(docstring: str) -> dict[str, str]:
    """Return the text of every parameter in the numpydoc section Parameters, without markup."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n-{3,}$|\Z)", docstring, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for names, text in re.findall(
        r"^(\S[^\n]*)\n((?:[ \t]+[^\n]*\n?|\n)*)", section[1] if section else "", re.MULTILINE
    ):
        for name in names.partition(" :")[0].split(","):
            found[name.strip()] = plain(text)
    return found


def plain(text: str) -> str:
    """Return a docstring's text on one line, without the marks of code."""
    return re.sub(r"\s+", " ", text.replace("`", "")).strip()


def pairs(options: Iterable[str], name: str) -> dict[str, str]:
    """Return the KEY=VALUE options as a mapping."""
    for option in options:
        if "=" not in option:
            raise ConfigError(f"{name} {option!r}", f"{name} NAME=VALUE")
    return dict(option.partition("=")[::2] for option in options)


def listed(text: str | None) -> list[str]:
    """Return a comma-separated option as a list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _bound(parameter: inspect.Parameter, hint: Any, text: str, option: Option) -> Bound:
    members, flags = _members(hint), flags_of(parameter)
    default = None if parameter.default is parameter.empty else parameter.default
    required = option.required
    if required is None:
        required = parameter.default is parameter.empty and type(None) not in members
    value = _value(parameter.name, members, default, flags[0], option)
    described = (
        typer.Argument(help=text, metavar=parameter.name.upper())
        if option.argument
        else typer.Option(*flags, help=text, metavar=value.metavar)
    )
    typed = inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else value.default,
        annotation=Annotated[value.annotation, described],
    )
    return Bound(parameter.name, typed, value.convert)


class _Value(NamedTuple):
    """How the value of an option is typed, shown and converted."""

    annotation: Any
    """What typer reads."""
    default: Any
    metavar: str | None = None
    """What stands for the value in the help text; None: the name of its type."""
    convert: Callable[[Any], Any] = lambda value: value


def _value(name: str, members: list[Any], default: Any, flag: str, option: Option) -> _Value:
    """Return how a parameter is typed whose annotation is the union of ``members``."""
    kinds = [typing.get_origin(member) or member for member in members]
    if bool in kinds and default is True and "/" not in flag:  # --restart stands for resume=False
        return _Value(bool, False, convert=lambda negated: not negated)
    if Sequence in kinds and (Path in kinds or str not in kinds):
        elements = _members(typing.get_args(members[kinds.index(Sequence)])[0])
        if Path in elements or name in FLAGS or option.argument:
            if Path in elements:
                return _Value(list[str], list(default or ()), "<path>", lambda given: [*map(_at_home, given)])
            return _Value(list[str], list(default or ()), "<str>", convert=list)
        shown = ",".join(default or ()) or None
        return _Value(str | None, shown, "A,B,...", lambda text: default if text is None else listed(text))
    if Mapping in kinds and str not in kinds:
        return _mapping(members[kinds.index(Mapping)], flag, option)
    metavar = None
    if bool in kinds:
        kind: Any = bool
    elif Path in kinds and not option.text:
        kind = Path
    elif Literal in kinds:
        kind, metavar = str, "|".join(typing.get_args(members[kinds.index(Literal)]))
    else:
        kind = next(number_or_text for number_or_text in (str, int, float) if number_or_text in kinds)
    typed = kind | None if default is None else kind
    is_path = Path in kinds and kind in (Path, str)
    return _Value(typed, default, metavar, _at_home) if is_path else _Value(typed, default, metavar)


def _at_home(path: _Path) -> _Path:
    """Return a path with the home folder for ``~``, which shells leave as it is in ``--out=~/run`` and in quotes.

    As shells do, it leaves the ``~`` of a user who is unknown.
    """
    return path if path is None else type(path)(os.path.expanduser(path))


def _mapping(hint: Any, flag: str, option: Option) -> _Value:
    if option.yaml:
        return _Value(list[str], [], "KEY=VALUE", lambda given: _yaml_pairs(given, flag))
    if str in (of_values := _members(typing.get_args(hint)[1])):
        read = _at_home if Path in of_values else str
        return _Value(
            list[str], [], "NAME=VALUE", lambda given: {key: read(value) for key, value in pairs(given, flag).items()}
        )

    def from_json(text: str | None) -> dict[str, Any] | None:
        from missrec_t4r.serving.client.protocol import json_option

        return json_option(text, flag)

    return _Value(str | None, None, "JSON", from_json)


def _yaml_pairs(given: Sequence[str], flag: str) -> dict[str, Any]:
    try:
        return {key: parse_yaml(value) for key, value in pairs(given, flag).items()}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{flag}: a value is not YAML ({reason})", "KEY=VALUE", "put quotes around a text") from error


def _members(hint: Any) -> list[Any]:
    """Return the parts of a union, and ``hint`` alone where it is none."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [part for member in typing.get_args(hint) for part in _members(member)]
    return [hint]
