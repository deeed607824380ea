"""The search space: ranges and choices of settings, by default those that mattered in our experiments.

In a file (YAML), a list is a choice and a mapping is a range, of integers where both ends are::

    model.dropout: {low: 0.1, high: 0.6}
    train.learning_rate: {low: 0.0003, high: 0.003, log: true}
    train.batch_size: [256, 512, 1024]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import yaml

from missrec_t4r.config import Recipe
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.errors import ConfigError

if TYPE_CHECKING:
    import optuna

_EXPECTED: Final = "SETTING: [a, b, ...] or SETTING: {low: a, high: b, log: false}"


class Range(NamedTuple):
    """A numeric setting between two bounds, both included."""

    low: float
    high: float
    log: bool = False
    """Draw the logarithm evenly: for step sizes and temperatures."""

    def draw(self, trial: optuna.Trial, name: str) -> Any:
        """Return a value that the trial suggests."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, float(self.low), float(self.high), log=self.log)

    def including(self, value: Any) -> Range:
        """Return the range, widened so that it holds the value, and of the value's type."""
        kind = type(value)
        return Range(kind(min(self.low, value)), kind(max(self.high, value)), self.log)

    def samples(self) -> list[Any]:
        """Return the values whose validity is checked: the ends."""
        return [self.low, self.high]


class Choices(NamedTuple):
    """A categorical setting."""

    values: tuple[Any, ...]

    def draw(self, trial: optuna.Trial, name: str) -> Any:
        """Return a value that the trial suggests."""
        return trial.suggest_categorical(name, self.values)

    def including(self, value: Any) -> Choices:
        """Return the choices, with the value among them."""
        return self if value in self.values else Choices((*self.values, value))

    def samples(self) -> list[Any]:
        """Return the values whose validity is checked: all."""
        return [*self.values]


Space = dict[str, Range | Choices]

DEFAULT: Final[Mapping[str, Range | Choices]] = {
    "model.d_model": Choices((128, 256, 300)),
    "model.n_decoder_layers": Choices((1, 2)),
    "model.dropout": Range(0.1, 0.6),
    "model.temperature": Range(0.03, 0.12, log=True),
    "model.modality_dropout": Range(0.0, 0.4),
    "model.id_dropout": Range(0.0, 0.3),
    "train.learning_rate": Range(0.0003, 0.003, log=True),
    "train.batch_size": Choices((256, 512, 1024, 2048)),
    "train.next_items": Choices((1, 2, 3)),
    "train.reverse_probability": Range(0.0, 0.5),
}


def space_around(recipe: Recipe, file: str | Path | None, given: Mapping[str, Any]) -> Space:
    """Return what is varied: a file's settings or the default ones, around a recipe, without those that are given.

    The recipe's own values are always among them, so that the search can start from it.

    Raises
    ------
    ConfigError
        An unknown setting, a value that the setting does not take, or nothing left to vary.
    """
    wanted = DEFAULT if file is None else _read(Path(file))
    space: Space = {}
    for name, values in wanted.items():
        if name in given:
            continue
        for value in values.samples():
            recipe.changed({name: value})  # refuses what the setting does not take
        section, _, setting = name.partition(".")
        space[name] = values.including(getattr(getattr(recipe, section), setting))
    if not space:
        raise ConfigError("no setting is left to vary", "at least one", "give fewer --set, or another --space FILE")
    return space


def values_of(recipe: Recipe, space: Space) -> dict[str, Any]:
    """Return the recipe's own values of the settings that are varied."""
    parts = {name: name.partition(".")[::2] for name in space}
    return {name: getattr(getattr(recipe, section), setting) for name, (section, setting) in parts.items()}


def _read(file: Path) -> Space:
    try:
        content = parse_yaml(file.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())})", _EXPECTED) from error
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{file} holds {type(content).__name__}", _EXPECTED)
    return {str(name): _parsed(str(name), values) for name, values in content.items()}


def _parsed(name: str, values: Any) -> Range | Choices:
    if isinstance(values, list) and len(values) > 1:
        return Choices(tuple(values))
    if isinstance(values, Mapping) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        low, high, log = values["low"], values["high"], values.get("log", False)
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
        if numbers and low < high and not (log and low <= 0):
            return Range(low, high, bool(log))
    cure = "write lists with two values or more, low below high, and a positive low for log: true"
    raise ConfigError(f"space of {name}: {values!r}", _EXPECTED, cure)
