"""Checks of settings: known names, right types, no contradictions; all errors of a section are reported together."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from missrec_t4r.config.option_names import option
from missrec_t4r.errors import ConfigError

_LIMITS: Final[Mapping[str, Callable[[float], bool]]] = {
    "is below 1": lambda value: value >= 1,
    "is negative": lambda value: value >= 0,
    "is not positive": lambda value: value > 0,
    "is outside [0, 1)": lambda value: 0 <= value < 1,
    "is outside [0, 1]": lambda value: 0 <= value <= 1,
    "is outside (0, 1]": lambda value: 0 < value <= 1,
}
"""What is said of a value that is beyond a limit, and the limit."""


def field_names(config: type[Any]) -> list[str]:
    """Return the names of a dataclass's settings."""
    return [field.name for field in dataclasses.fields(config)]


def refuse_unknown(given: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse a name that is not known, and suggest the nearest one that is; ``what`` stands before it in the error.

    Raises
    ------
    ConfigError
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown {what}{name}", f"one of {', '.join(known)}", cure)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in which settings two recipes, as mappings, differ.

    Examples
    --------
    >>> changed_settings({"name": "a", "train": {"epochs": 3}}, {"name": "b", "train": {"epochs": 5}})
    ['train.epochs 3 -> 5']
    """
    return [
        f"{section}.{name} {old} -> {value}"
        for section, settings in now.items()
        if isinstance(settings, Mapping)
        for name, value in settings.items()
        if (old := before.get(section, {}).get(name)) != value
    ]


def type_errors(config: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the types of these settings, one sentence each."""
    hints = get_type_hints(config)
    return [error for name, value in values.items() if (error := _type_error(name, value, hints[name]))]


def check_types(settings: Any) -> None:
    """Refuse settings of wrong types.

    Raises
    ------
    ConfigError
    """
    refuse(type_errors(type(settings), vars(settings)))


def check_limits(
    settings: Any, section: str, limits: Mapping[str, Sequence[str]], contradictions: Sequence[tuple[bool, str]] = ()
) -> None:
    """Refuse settings beyond their limits, or that contradict each other.

    Parameters
    ----------
    settings : dataclass
        Of the right types.
    section : str
        Of the recipe, for the errors: ``"model"``.
    limits : mapping of str to sequence of str
        What is said of a value beyond its limit, a key of `_LIMITS`, to the names of the settings.
    contradictions : sequence of (bool, str)
        Whether there is one, and the error.

    Raises
    ------
    ConfigError
    """
    values = [(words, name, getattr(settings, name)) for words, names in limits.items() for name in names]
    errors = [f"{section}.{name} {value} {words}" for words, name, value in values if not _LIMITS[words](value)]
    refuse(errors + [error for is_wrong, error in contradictions if is_wrong])


def refuse(errors: list[str], cure: str = "correct the recipe or the --set options") -> None:
    """Raise one `ConfigError` that lists all errors; return if there are none."""
    if errors:
        raise ConfigError("; ".join(errors), "", cure)


def require_at_least(least: float, **options: Any) -> None:
    """Refuse numbers that are too small, or none (NaN); None stands for an option that was not given.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> require_at_least(1, top_k=10, max_events=None)
    """
    for name, value in options.items():
        if isinstance(value, str):  # from Python; the command line converts
            raise ConfigError(f"{option(name)} {value!r}", f"a number of at least {least:g}")
        if value is not None and not value >= least:
            raise ConfigError(f"{option(name)} {value:g}", f"at least {least:g}")


def require_positive(**options: float | None) -> None:
    """Refuse zero, negative numbers and NaN; None stands for an option that was not given.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> require_positive(minutes=0.5)
    """
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{option(name)} {value:g}", "a positive number")


def require_choices(**options: tuple[str, Collection[str]]) -> None:
    """Refuse a value, the first of each pair, that is none of its choices.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> require_choices(split=("test", ("valid", "test")))
    """
    for name, (value, choices) in options.items():
        if value not in choices:
            *others, last = choices
            raise ConfigError(f"{option(name)} {value!r}", f"{', '.join(others)} or {last}")


def _type_error(name: str, value: Any, hint: Any) -> str:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return "" if value in choices else f"{name} is {value!r}, one of {', '.join(map(repr, choices))} is expected"
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return "" if is_number else f"{name} is {value!r}, a number is expected"
    return "" if type(value) is hint else f"{name} is {value!r}, {hint.__name__} is expected"
