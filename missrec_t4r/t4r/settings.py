"""Settings of the T4R parts: one `MISSRecConfig` for inputs, block and task, given as a whole or by keyword.

Each part accepts ``config=`` and any setting of `MISSRecConfig` as a keyword argument. A `Head` joins the parts, and
`merged` makes one configuration of them: the given config (by default that of the recipe ``default``), then the
keyword arguments of all parts. Two parts that contradict each other are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.config.checks import field_names, refuse, refuse_unknown, type_errors
from missrec_t4r.config.renamed import current_settings
from missrec_t4r.errors import ConfigError

_DEFAULT = MISSRecConfig()


class PartSettings:
    """What one part was given.

    Parameters
    ----------
    part : str
        Its class, for errors.
    config : MISSRecConfig or None
        None: whatever the other parts have.
    overrides : mapping of str to value
        Settings by name; old names are accepted (`missrec_t4r.config.renamed`).

    Raises
    ------
    ConfigError
        An unknown setting (the nearest known one is named) or a wrong type.
    """

    def __init__(self, part: str, config: MISSRecConfig | None, overrides: Mapping[str, Any]) -> None:
        if config is not None and not isinstance(config, MISSRecConfig):
            raise ConfigError(
                f"{part}(config={config!r})",
                "a MISSRecConfig",
                "write single settings as keyword arguments: d_model=300",
            )
        self.part, self.config = part, config
        self.overrides = current_settings(overrides, part)
        refuse_unknown(self.overrides, field_names(MISSRecConfig), f"setting {part}.")
        refuse(type_errors(MISSRecConfig, self.overrides), f"correct the arguments of {part}")
        self.used: dict[str, Any] = {}
        """Settings that the part has already built something with."""

    def __getitem__(self, name: str) -> Any:
        """Return the part's own value of a setting, and remember that it is in use."""
        base = _DEFAULT if self.config is None else self.config
        self.used[name] = self.overrides.get(name, getattr(base, name))
        return self.used[name]


def merged(parts: Sequence[PartSettings]) -> MISSRecConfig:
    """Return the one configuration of a model's parts.

    Raises
    ------
    ConfigError
        Different configs, different values of one setting, or settings that contradict each other.
    """
    given = [part for part in parts if part.config is not None]
    base = _DEFAULT if not given or given[0].config is None else given[0].config
    overrides: dict[str, Any] = {}
    for part in parts:
        if part.config is not None and part.config != base:
            _contradiction(part, given[0], _difference(part.config, base))
        for name, value in part.overrides.items():
            if overrides.setdefault(name, value) != value:
                other = next(other for other in parts if name in other.overrides)
                _contradiction(part, other, f"{name} {value!r} and {overrides[name]!r}")
    config = dataclasses.replace(base, **overrides)
    for part in parts:
        for name, value in part.used.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"{part.part} was built with {name}={value!r}, the other parts have {getattr(config, name)!r}",
                    "one configuration of a model",
                    f"pass {name}={getattr(config, name)!r} to {part.part} too, or the same config= to all parts",
                )
    return config


def _contradiction(part: PartSettings, other: PartSettings, words: str) -> None:
    raise ConfigError(
        f"{part.part} and {other.part} have {words}", "one configuration of a model", "give each setting one value"
    )


def _difference(config: MISSRecConfig, other: MISSRecConfig) -> str:
    values, others = vars(config), vars(other)
    return ", ".join(f"{name} {values[name]!r} and {others[name]!r}" for name in values if values[name] != others[name])
