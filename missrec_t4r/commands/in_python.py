"""Errors of commands in the words of Python: the options that a message names are arguments of the function there."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

from missrec_t4r.errors import MISSRecError

P = ParamSpec("P")
T = TypeVar("T")

SPELLED_OTHERWISE = {
    "set": "settings",
    "from": "start_from",
    "continue": "warm_start",
    "drop-column": "drop_columns",
    "categorical-column": "categorical_columns",
    "no-baselines": "alone=True",
    "restart": "resume=False",
    "first-only": "keep_repeats=False",
    "titled-only": "keep_untitled=False",
}
"""Option -> parameter, or argument, where another spelling was chosen for the command line."""
_TEXT = re.compile(
    r"`[^`]*`|\bmissrec [a-z]+(?: [a-z]+)?(?: --[a-z-]+)*"  # whole command lines stay
    r"|(?<![\w-])--(?P<option>[a-z][a-z0-9-]*)(?: (?P<value>'[^']*'|[^\s,;:()]*[\w=/%…]))?"
)


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
    parameters, hints = inspect.signature(function).parameters, get_type_hints(function)

    def argument(match: re.Match[str]) -> str:
        option, value = match["option"], match["value"]
        if option is None:
            return match[0]
        name, _, constant = SPELLED_OTHERWISE.get(option, option.replace("-", "_")).partition("=")
        if name not in parameters and name.startswith("no_"):
            name, constant = name.removeprefix("no_"), "False"
        if name not in parameters:
            return match[0]
        parameter, rest = parameters[name], "" if value is None else f" {value}"
        name = names.get(name, name)
        if constant or isinstance(parameter.default, bool):
            return f"{name}={constant or True}{rest}"
        shown = None if value is None else _shown(value, hints.get(parameter.name))
        return f"`{name}`{rest}" if shown is None else f"{name}={shown}"

    return _TEXT.sub(argument, text)


def _shown(value: str, hint: Any) -> str | None:
    """Return a value as Python writes it; None for a word that is not one."""
    key, equals, rest = value.partition("=")
    if equals and not value.startswith("'"):
        return repr({key: rest})
    if value.startswith("'") or re.fullmatch(r"-?[\d.]+", value):
        return value
    literals = [word for one in (hint, *get_args(hint)) for word in get_args(one)]
    return repr(value) if value in literals or re.search(r"[\d/%.]", value) else None
