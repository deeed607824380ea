"""Settings that had other names or values: the old ones are accepted wherever settings are given by name.

That is in recipes, in ``--set``, in a run's ``recipe.json``, in a bundle's ``model.json``, and in the keyword arguments
of the T4R parts. `docs/migration.md` lists them for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from missrec_t4r.errors import ConfigError

RENAMED = {
    "newcomer_exposure": "cold_start_exposure",
    "n_lookalikes": "n_similar_items",
    "side_features": "event_features",
    "side_width": "event_feature_width",
    "side_dropout": "event_feature_dropout",
    "id_start": "id_init",
}
"""Old name of a setting to its present name."""

RENAMED_VALUES = {"id_init": {"tokens": "content"}}
"""Present name of a setting to its old values and their present names."""


def current_name(setting: str) -> str:
    """Return the present name of a setting."""
    return RENAMED.get(setting, setting)


def current_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings under their present names and values.

    Parameters
    ----------
    settings : mapping of str to value
    where : str
        Their section, for the error: ``"model"``.

    Raises
    ------
    ConfigError
        A setting is given under both names.

    Examples
    --------
    >>> current_settings({"id_start": "tokens"}, "train")
    {'id_init': 'content'}
    """
    current: dict[str, Any] = {}
    for given, value in settings.items():
        name = current_name(str(given))
        if name in current:
            raise ConfigError(
                f"{where}.{name} is given twice, once by its old name",
                "each setting once",
                f"remove {where}.{next(old for old, new in RENAMED.items() if new == name)}",
            )
        values = RENAMED_VALUES.get(name, {})
        current[name] = values.get(value, value) if isinstance(value, str) else value
    return current
