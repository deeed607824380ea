"""Options of the command line and arguments in Python: how each is spelled, and errors that name Python arguments."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

from missrec_t4r.config.option_names import FLAGS, option
from missrec_t4r.errors import MISSRecError

P = ParamSpec("P")
T = TypeVar("T")

_TEXT = re.compile(
    r"`[^`]*`|\bmissrec [a-z]+(?: [a-z]+)?(?: --[a-z-]+)*"  # whole command lines stay
    r"|(?<![\w-])(?P<option>--[a-z][a-z0-9-]*)(?: (?P<value>'[^']*'|[^\s,;:()]*[\w=/%…]))?"
)


def flags_of(parameter: inspect.Parameter) -> tuple[str, ...]:
    """Return the options of a parameter; the one that makes a boolean False stands after a slash."""
    flag = option(parameter.name)
    return FLAGS.get(parameter.name, (f"{flag}/--no-{flag[2:]}" if parameter.default is True else flag,))


def _arguments(function: Callable[..., Any]) -> dict[str, tuple[str, bool | None]]:
    """Return option -> parameter of a function, and the value that an option without a value gives to it."""
    arguments: dict[str, tuple[str, bool | None]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        for flags in flags_of(parameter):
            flag, _, negation = flags.partition("/")
            constant = None
            if negation or isinstance(parameter.default, bool):
                constant = bool(negation) or not parameter.default
            arguments[flag] = name, constant
            if negation:
                arguments[negation] = name, False
    return arguments


def named_in_python(function: Callable[P, T], names: Mapping[str, str] | None = None) -> Callable[P, T]:
    """Return a function whose errors name its parameters in place of options of the command line.

    Parameters
    ----------
    function : callable
    names : mapping of str to str, optional
        Parameters that the caller knows by another name.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except MISSRecError as error:
            told = [in_python(part, function, names or {}) for part in (error.found, error.expected, error.cure)]
            MISSRecError.__init__(error, *told)  # the same error: its traceback, and the result of a gate, stay
            raise

    return call


def in_python(text: str, function: Callable[..., Any], names: Mapping[str, str]) -> str:
    """Return a text with the options of a function's command as its arguments; command lines stay.

    Examples
    --------
    >>> from typing import Literal
    >>> def etl(*, time_format=None, split: Literal["time"] | None = None, resume=True, update=False): ...
    >>> in_python("--split time, then --time-format, --update or --restart, or `missrec train --restart`", etl, {})
    "split='time', then `time_format`, update=True or resume=False, or `missrec train --restart`"
    """
    arguments, hints = _arguments(function), get_type_hints(function)

    def argument(match: re.Match[str]) -> str:
        value = match["value"]
        if match["option"] not in arguments:
            return match[0]
        parameter, constant = arguments[match["option"]]
        name, rest = names.get(parameter, parameter), "" if value is None else f" {value}"
        if constant is not None:
            return f"{name}={constant}{rest}"
        shown = None if value is None else _shown(value, hints.get(parameter))
        return f"`{name}`{rest}" if shown is None else f"{name}={shown}"

    return _TEXT.sub(argument, text)


def _shown(value: str, hint: Any) -> str | None:
    """Return a value as Python writes it; None for a word that is not one."""
    key, equals, rest = value.partition("=")
    if equals and not value.startswith("'"):
        return repr({key: rest})
    if value.startswith("'") or re.fullmatch(r"-?[\d.]+", value):
        return value
    literals = [word for member in (hint, *get_args(hint)) for word in get_args(member)]
    return repr(value) if value in literals or re.search(r"[\d/%.]", value) else None
