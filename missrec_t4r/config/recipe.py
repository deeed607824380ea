"""Recipes: named settings of model and training, read from YAML.

A recipe states what differs from the recipe that it extends::

    extends: paper               # a shipped recipe, or a file beside this one; without it: default
    model: {d_model: 128}
    train: {epochs: 20}

Values are merged setting by setting: ``--set`` wins over the recipe, the recipe over what it extends. A recipe's name
and the name of its file have no influence on its settings.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from missrec_t4r.config.checks import field_names, refuse_unknown
from missrec_t4r.config.model import MISSRecConfig
from missrec_t4r.config.renamed import current_name, current_settings
from missrec_t4r.config.training import PretrainConfig, TrainConfig
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.errors import ConfigError

SECTIONS: Final[Mapping[str, type[Any]]] = {"model": MISSRecConfig, "train": TrainConfig, "pretrain": PretrainConfig}
"""Sections of a recipe and the settings that each of them holds."""

_UNRECORDED = {"model": {"rare_item_cost": 0.0}, "train": {"id_init": "random", "precision": "fp32"}}
"""Settings that the first versions did not write to ``recipe.json``, with the only value that they had."""

AUTO: Final = "auto"
"""Name of the recipe that is chosen for a data folder: `missrec_t4r.training.auto`."""
_SUFFIXES: Final = {".yaml", ".yml", ".json"}
"""Of recipe files: those that people write, and a run's ``recipe.json``."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named configuration: the model and how it is trained."""

    name: str = "default"
    """Shown in tables and written to the run."""
    model: MISSRecConfig = field(default_factory=MISSRecConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Used by `missrec pretrain` alone."""

    @classmethod
    def load(cls, recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a shipped recipe by name, or a YAML file by path.

        Parameters
        ----------
        recipe : str, Path or Recipe
            ``"default"``, ``"paper"``, … or a path that ends in ``.yaml``, or that of a run's ``recipe.json``; or a
            recipe as it is.
        overrides : mapping, optional
            ``{"model.d_model": 128, "train.epochs": 3}``; they win over the recipe.

        Raises
        ------
        ConfigError
            Unknown recipe or setting (the nearest known one is named), wrong type, contradictory settings, or recipes
            that extend each other.
        """
        if isinstance(recipe, Recipe):
            return recipe.changed(overrides or {})
        file = _find(str(recipe), Path())
        sections = _resolve(file)
        return _build(str(file.content.get("name", file.name)), _overridden(sections, overrides or {}))

    def changed(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other settings, named as in `load`."""
        sections = {section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS}
        return _build(self.name, _overridden(sections, overrides))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Build from a mapping as in a recipe's file, or as `to_dict` returns it."""
        file = _File("recipe", "", Path(), dict(content))
        return _build(str(content.get("name", "default")), _resolve(file))

    @classmethod
    def from_stored(cls, content: Mapping[str, Any]) -> Recipe:
        """Build from the settings that a run or a bundle stored, of this version or an earlier one.

        A setting that an earlier version did not record gets the value that this version used, not today's default.
        """
        published = cls.load("paper").to_dict() if content.get("name") == "paper" else {}  # a name with own defaults
        sections = {
            section: published.get(section, {}) | _UNRECORDED.get(section, {}) | _section(content, section)
            for section in SECTIONS
        }
        return cls.from_dict({**content, **sections})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON or YAML."""
        return dataclasses.asdict(self)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = importlib.resources.files("missrec_t4r.recipes")
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


class _File(NamedTuple):
    """A recipe as it was written."""

    name: str
    key: str
    """Identifies a recipe: the resolved path, or the name of a shipped recipe."""
    folder: Path
    """Where the files that it extends are looked up."""
    content: dict[str, Any]


def _find(name_or_path: str, folder: Path) -> _File:
    """Read a shipped recipe by name, or a file by its path relative to a folder."""
    path = folder / name_or_path
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"recipe file {path} does not exist", "a YAML file", "check the path")
        return _File(path.stem, str(path.resolve()), path.parent, _parse(path.read_bytes(), str(path)))
    if name_or_path == AUTO:
        raise ConfigError(
            f"recipe {AUTO!r} has no values of its own: `missrec train` chooses them for its data folder",
            "a recipe with fixed values",
            f"`missrec train --recipe {AUTO} --dry-run` prints what it chooses; a run's recipe.json holds it",
        )
    if name_or_path not in shipped_recipes():
        known = ", ".join(shipped_recipes())
        raise ConfigError(f"recipe {name_or_path!r} is unknown", f"one of {known}, or a path to a .yaml file")
    file = importlib.resources.files("missrec_t4r.recipes") / f"{name_or_path}.yaml"
    return _File(name_or_path, name_or_path, folder, _parse(file.read_bytes(), name_or_path))


def _parse(text: bytes, name: str) -> dict[str, Any]:
    try:  # in YAML no tab may stand before JSON's values
        content = json.loads(text) if name.endswith(".json") else parse_yaml(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {name} is not YAML ({reason})", "a mapping with model: and train:") from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {name} holds {type(content).__name__}", "a mapping with model: and train:")
    return content


def _resolve(file: _File, extended_by: tuple[_File, ...] = ()) -> dict[str, dict[str, Any]]:
    """Return a recipe's sections, those of the recipe that it extends filled in."""
    refuse_unknown(file.content, ["name", "extends", *SECTIONS], "setting recipe.")
    chain = (*extended_by, file)
    base: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    if (extends := file.content.get("extends")) is not None:
        parent = _parent(extends, file)
        if parent.key in [recipe.key for recipe in chain]:
            path = " -> ".join(recipe.name for recipe in (*chain, parent))
            raise ConfigError(
                f"the recipes {path} extend each other", "a chain that ends", "remove one of the extends: lines"
            )
        base = _resolve(parent, chain)
    return {section: base[section] | _section(file.content, section) for section in SECTIONS}


def _parent(extends: Any, file: _File) -> _File:
    try:
        return _find(extends if isinstance(extends, str) else repr(extends), file.folder)
    except ConfigError as error:
        cure = error.cure or f"correct extends: in {file.name}"
        raise ConfigError(f"{file.name} extends {extends!r}: {error.found}", error.expected, cure) from error


def _section(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    settings = content.get(section) or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{section}: is {settings!r}", "a mapping of settings", f"write {section}: {{setting: value}}"
        )
    settings = current_settings(settings, section)
    refuse_unknown(settings, field_names(SECTIONS[section]), f"setting {section}.")
    return settings


def _overridden(sections: dict[str, dict[str, Any]], overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in overrides.items():
        section, _, setting = key.partition(".")
        if not setting:
            name = current_name(key)
            homes = [f"{where}.{name}" for where, config in SECTIONS.items() if name in field_names(config)]
            cure = f"try {' or '.join(homes or [f'model.{key}', f'train.{key}'])}"
            raise ConfigError(f"setting {key!r}", "model.NAME, train.NAME or pretrain.NAME", cure)
        refuse_unknown([section], list(SECTIONS), "setting recipe.")
        given[section][setting] = value
    return {section: values | _section(given, section) for section, values in sections.items()}


def _build(name: str, sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
    return Recipe(name=name, **{section: SECTIONS[section](**values) for section, values in sections.items()})
