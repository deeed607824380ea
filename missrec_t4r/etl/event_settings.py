"""What the ETL derives from events on request: weights of event types, sessions by inactivity, time features.

One description for the NVTabular workflow and for the fast path, which must make the same rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from missrec_t4r.errors import ConfigError, SchemaError
from missrec_t4r.etl.nvt.event_ops import TIME_FEATURES
from missrec_t4r.etl.quality.checks import refuse_milliseconds

SESSION_ID = "session_id"
WEIGHT = "weight"
CLOCK = {"hour": pd.Series(range(24)), "weekday": pd.Series(range(7))}
"""Vocabularies of the clock's columns: row 3 is midnight, or Monday."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True)
class EventSettings:
    """What is derived; nothing by default.

    Parameters
    ----------
    weights : mapping of str to float
        Weight per event type; 0 leaves its events out.
    weight_column : str
        Column of the event type.
    other_weight : float
        Weight of the types that are not named.
    session_gap : float
        Seconds without an event that end a session; 0 keeps a user's events together.
    time_features : sequence of str
        See `event_operators.TimeFeatures`.
    newest : float
        Where recency counts from, unix seconds.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    weight_column: str = "event_type"
    other_weight: float = 1.0
    session_gap: float = 0.0
    time_features: Sequence[str] = ()
    newest: float = 0.0

    @property
    def anything(self) -> bool:
        """Whether there is something to derive."""
        return bool(self.weights or self.session_gap or self.time_features)

    @property
    def columns(self) -> list[str]:
        """Return the new event columns."""
        return [*([WEIGHT] if self.weights else []), *self.time_features]

    def check_clock(self, newest: float) -> None:
        """Refuse times that are no seconds where sessions or time features are made of them.

        Raises
        ------
        DataError
            The newest time can only be milliseconds or finer.
        """
        options = {"--session-gap": self.session_gap, "--time-features": self.time_features}
        refuse_milliseconds(newest, " and ".join(name for name, given in options.items() if given))

    def check(self, features: Sequence[str], texts: Sequence[str]) -> None:
        """Refuse names that clash and event types that are not there.

        Parameters
        ----------
        features, texts : sequence of str
            Event columns, and those of them that hold text.

        Raises
        ------
        SchemaError
            A new column's name is taken, or the event type's column is missing or no text.
        """
        made = [*self.columns, *([SESSION_ID] if self.session_gap else [])]
        if taken := [name for name in made if name in features]:
            raise SchemaError(
                f"the events have columns {taken} already", "names that are free", "leave them out with --drop-column"
            )
        if self.weights and self.weight_column not in texts:
            raise SchemaError(
                f"there is no text column {self.weight_column!r} to take event weights from",
                f"one of {list(texts)}",
                "name the event type's column with --event-type-column",
            )


def parse_seconds(text: str | float | None, option: str) -> float:
    """Return a duration in seconds: ``30m``, ``1.5h``, ``2d``, ``90``.

    Examples
    --------
    >>> parse_seconds("30m", "--session-gap"), parse_seconds("90", "--session-gap"), parse_seconds(None, "")
    (1800.0, 90.0, 0.0)
    """
    if text is None:
        return 0.0
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(text))
    if not found or float(found[1]) <= 0:
        raise ConfigError(f"{option} {text!r}", "a positive duration such as 30m, 12h, 2d or seconds")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def parse_weights(text: str | Mapping[str, Any] | None) -> dict[str, float]:
    """Return event weights: ``view=1,purchase=3``.

    Examples
    --------
    >>> parse_weights("view=1, purchase=3")
    {'view': 1.0, 'purchase': 3.0}
    """
    pairs = (
        text.items() if isinstance(text, Mapping) else [part.partition("=")[::2] for part in (text or "").split(",")]
    )
    try:
        weights = {str(name).strip(): float(value) for name, value in pairs if str(name).strip() or value}
    except ValueError as error:
        raise ConfigError(f"--event-weights {text!r} ({error})", "TYPE=NUMBER,… such as view=1,purchase=3") from error
    if wrong := {name: value for name, value in weights.items() if not 0 <= value < float("inf")}:
        raise ConfigError(f"event weights {wrong}", "finite numbers of at least 0")
    return weights


def parse_time_features(text: str | Sequence[str] | None) -> list[str]:
    """Return names of time features: ``gap,hour``; ``all`` is every one.

    Examples
    --------
    >>> parse_time_features("gap, hour"), parse_time_features("all")
    (['gap', 'hour'], ['gap', 'hour', 'weekday', 'recency'])
    """
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text or ())
    if names == ["all"]:
        return list(TIME_FEATURES)
    if unknown := [name for name in names if name not in TIME_FEATURES]:
        raise ConfigError(f"--time-features {unknown}", f"all, or some of {','.join(TIME_FEATURES)}")
    return names
