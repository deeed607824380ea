"""Command-line options from a function's signature: the annotation gives the type, the docstring the help text.

| annotation | option |
|---|---|
| ``bool = False`` / ``bool = True`` | ``--name`` / ``--name/--no-name`` |
| ``int``, ``float``, ``str``, ``str | Path``, ``Literal[...]`` | ``--name VALUE`` |
| ``Sequence[...]`` | ``--name VALUE``, repeatable; with `Option.comma` one value such as ``a,b`` |
| ``Mapping[str, str | Path]`` | ``--name NAME=VALUE``, repeatable |
| any other mapping | ``--name JSON``; with `Option.yaml` ``--name KEY=VALUE``, repeatable, values read as YAML |

A parameter without a default is required unless its annotation admits None. Values of ``Literal`` are checked by the
function, so that Python and the command line give the same three-part error.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer
import yaml

from missrec_t4r.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """How a parameter is spelled on the command line where its name and type do not determine it."""

    flags: tuple[str, ...] = ()
    """Names in place of ``--parameter-name``, older ones last; a boolean whose default is True is negated."""
    comma: bool = False
    """A sequence is one comma-separated value."""
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
    members = _members(hint)
    default = parameter.default
    required = default is parameter.empty and type(None) not in members
    if option.required is not None:
        required = option.required
    if default is parameter.empty:
        default = None
    flags = option.flags or (f"--{parameter.name.replace('_', '-')}",)
    annotation, shown, metavar, convert = _kind(members, default, flags[0], option)
    if isinstance(default, bool) and annotation is bool and not option.flags and default:
        flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
    described = (
        typer.Argument(help=text, metavar=parameter.name.upper())
        if option.argument
        else typer.Option(*flags, help=text, metavar=metavar)
    )
    return Bound(
        parameter.name,
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else shown,
            annotation=Annotated[annotation, described],
        ),
        convert,
    )


def _kind(
    members: list[Any], default: Any, flag: str, option: Option
) -> tuple[Any, Any, str | None, Callable[[Any], Any]]:
    """Return the annotation for typer, the default that it shows, the name of the value, and the conversion."""

    def either(kind: Any) -> Any:
        return kind | None if default is None else kind

    origins = [typing.get_origin(member) or member for member in members]
    sequence = any(isinstance(kind, type) and issubclass(kind, AbstractSequence) for kind in origins if kind is not str)
    mapping = next((member for member, kind in zip(members, origins) if kind in (Mapping, dict)), None)
    if sequence and option.comma:
        shown = ",".join(default or ()) or None
        return str | None, shown, "A,B,...", lambda given: default if given is None else listed(given)
    if bool in members:
        if option.flags and default is True and "/" not in option.flags[0]:  # --restart stands for resume=False
            return bool, False, None, lambda given: not given
        return either(bool), default, None, _same
    if sequence and (Path in members or str not in members):
        return list[str], list(default or ()), None, list
    if mapping is not None and str not in members:
        if option.yaml:
            return list[str], [], "KEY=VALUE", lambda given: _read(pairs(given, flag))
        if set(_members(typing.get_args(mapping)[1])) <= {str, Path}:
            return list[str], [], "NAME=VALUE", lambda given: pairs(given, flag)
        return either(str), None, "JSON", lambda given: _json(given, flag)
    if Path in members and not option.text:
        return either(Path), None if default is None else Path(default), None, _same
    literal = next((member for member in members if typing.get_origin(member) is Literal), None)
    if literal is not None:
        return either(str), default, "|".join(map(str, typing.get_args(literal))), _same
    for kind in (str, int, float):
        if kind in members:
            return either(kind), default, None, _same
    raise TypeError(f"{flag}: no option can be made of {members}")


def _members(hint: Any) -> list[Any]:
    """Return the parts of a union, and ``hint`` alone where it is none."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [part for member in typing.get_args(hint) for part in _members(member)]
    return [hint]


def _read(given: Mapping[str, str]) -> dict[str, Any]:
    return {key: yaml.safe_load(value) for key, value in given.items()}


def _json(given: str | None, flag: str) -> dict[str, Any] | None:
    from missrec_t4r.serving.client.protocol import json_option

    return json_option(given, flag)


def _same(given: Any) -> Any:
    return given
