"""Derived event columns (optional): weights of event types, sessions by inactivity, time features.

The same settings configure the NVTabular workflow and the out-of-core engine, which must give the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.arrow_columns import YEAR_FIRST
from missrec_t4r.etl.quality.checks import MILLISECONDS, Findings
from missrec_t4r.schema import SESSION_ID

TIME_FEATURES = ("gap", "hour", "weekday", "recency")
WEIGHT = "weight"
CLOCK = {"hour": pd.Series(range(24)), "weekday": pd.Series(range(7))}
"""Vocabularies of the time features that are categories: code 3 is the hour from midnight, or Monday."""
_MOST_TYPES = 20
"""Event types that a finding lists."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True)
class EventSettings:
    """Derived event columns; none by default.

    Parameters
    ----------
    weights : mapping of str to float
        Weight per event type; 0 leaves its events out, and types that are not named weigh 1.
    weight_column : str
        Column of the event type.
    session_gap : float
        Seconds of inactivity that end a session; 0: one session per user.
    time_features : sequence of str
        See `nvt.event_ops.TimeFeatures`.
    newest : float
        Time that recency counts from, unix seconds.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    weight_column: str = "event_type"
    session_gap: float = 0.0
    time_features: Sequence[str] = ()
    newest: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EventSettings:
        """Return the derived event columns that the settings of ``etl.json`` describe."""
        return cls(
            settings["event_weights"],
            settings["event_type_column"],
            settings["session_gap"],
            settings["time_features"],
            settings.get("newest", 0.0),  # known when the events were read
        )

    @property
    def columns(self) -> list[str]:
        """Return the names of the derived event columns."""
        return [*([WEIGHT] if self.weights else []), *self.time_features]

    @property
    def clock(self) -> dict[str, pd.Series]:
        """Return the vocabularies of the time features that are categories."""
        return {name: values for name, values in CLOCK.items() if name in self.time_features}

    def check_clock(self, newest: float) -> None:
        """Refuse times that are not in seconds if sessions or time features are computed from them.

        Raises
        ------
        DataError
            The newest time can only be in milliseconds or a finer unit.
        """
        options = {"--session-gap": self.session_gap, "--time-features": self.time_features}
        wanted = " and ".join(name for name, value in options.items() if value)
        if wanted and newest >= MILLISECONDS:
            raise DataError(
                f"the newest time is {newest:.0f}, which is milliseconds or finer, and {wanted} counts in seconds",
                "unix seconds or dates",
                "divide the times by 1000, or write them as dates",
            )

    def check(self, features: Sequence[str], texts: Sequence[str]) -> None:
        """Refuse derived columns whose name is taken, and weights without a column of event types.

        Parameters
        ----------
        features, texts : sequence of str
            Event columns, and those of them that hold text.

        Raises
        ------
        SchemaError
            A derived column's name is taken, or the event type's column is missing or not text.
        """
        derived = [*self.columns, *([SESSION_ID] if self.session_gap else [])]
        if taken := [name for name in derived if name in features]:
            raise SchemaError(
                f"the events have columns {taken} already", "names that are free", "leave them out with --drop-column"
            )
        if self.weights and self.weight_column not in texts:
            raise SchemaError(
                f"there is no text column {self.weight_column!r} to take event weights from",
                f"one of {list(texts)}",
                "name the event type's column with --event-type-column",
            )

    def note_types(self, findings: Findings, types: Iterable[Any]) -> None:
        """Add a finding if event weights name types that no event has: ``types`` are those of the events.

        The weights of a mistyped name would be 1, and its events would not be left out.
        """
        known = [str(kind) for kind in types]
        absent = [name for name in self.weights if name not in known]
        shown = ", ".join(known[:_MOST_TYPES]) + (", …" if len(known) > _MOST_TYPES else "")
        findings.add(
            "event_type_absent",
            len(absent),
            f"--event-weights names {', '.join(absent)}: no event is of such a type; there are {shown}",
        )


def weighted_events(events: Any, settings: Mapping[str, Any]) -> Any:
    """Return the events, a frame of pandas or cuDF, without those of types of weight 0; none may be left.

    The built-in workflow drops them as well, but NVTabular fails where an operator leaves no row of a frame.

    Parameters
    ----------
    events : Frame
    settings : mapping
        ``event_weights`` and ``event_type_column``, as in ``etl.json``.
    """
    unwanted = [kind for kind, weight in settings["event_weights"].items() if not weight]
    return events[~events[settings["event_type_column"]].isin(unwanted)].reset_index(drop=True) if unwanted else events


def first_with_events(frames: Iterable[Any]) -> Any:
    """Return the first frame of `weighted_events` that has a row.

    Raises
    ------
    DataError
        There is none.
    """
    for frame in frames:
        if len(frame):
            return frame
    raise no_weight()


def no_weight() -> DataError:
    """Return the error of events that are all of types of weight 0."""
    return DataError("all events are of types of weight 0", "some of another type", "raise a weight of --event-weights")


def parse_seconds(text: str | float | None, option: str) -> float:
    """Parse a duration in seconds: ``30m``, ``1.5h``, ``2d``, ``90``.

    Examples
    --------
    >>> parse_seconds("30m", "--session-gap"), parse_seconds("90", "--session-gap"), parse_seconds(None, "")
    (1800.0, 90.0, 0.0)
    """
    if text is None:
        return 0.0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(text))
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r}", "a positive duration such as 30m, 12h, 2d or seconds")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def parse_time(given: str | float | None, option: str) -> float | None:
    """Return a time as a number: a date is read as unix seconds, UTC where it names no zone.

    Examples
    --------
    >>> parse_time("1998-03-01", "--valid-from"), parse_time("888710400", "--valid-from"), parse_time(7, "")
    (888710400.0, 888710400.0, 7.0)
    """
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        is_clear = re.match(YEAR_FIRST, str(given).strip())
        date = pd.to_datetime(given, utc=True, errors="coerce") if is_clear else pd.NaT
    if pd.isna(date):
        raise ConfigError(
            f"{option} {given!r}", "a date such as 2026-03-01, or a number in the unit of the time column"
        )
    return float(date.timestamp())


def parse_weights(text: str | Mapping[str, Any] | None) -> dict[str, float]:
    """Parse event weights such as ``view=1,purchase=3``.

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
    """Parse names of time features such as ``gap,hour``; ``all`` is every one.

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
