"""Side features: which event columns beside the item enter the model, of what kind, in what scale, by what codes.

A column is ``categorical`` (NVTabular's codes: 0 padding, 1 null, 2 unknown, values from 3 on), ``continuous`` (a
number, standardised by the training split, after log(1 + x) where that takes away a long tail) or ``pretrained`` (a
vector per event). What is chosen and measured here travels with the run and the bundle, so that serving scales and
encodes as training did.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from missrec_t4r.data.schema_pbtxt import ColumnFacts, read_schema
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.schema import LIST_SUFFIX, NULL_ROW, PADDING_ROW, SCHEMA_FILE, SESSION_TRANSFORM_FILE, UNKNOWN_ROW

Kind = Literal["categorical", "continuous", "pretrained"]

EventArrays = dict[str, npt.NDArray[Any]]
"""By column: codes or numbers [batch, seq], vectors [batch, seq, size]."""

AUTO: Final = "auto"
"""Every list column of the schema that is tagged as an input, except ids and targets; raw times are not tagged so."""
NONE: Final = "none"
"""No side feature."""

_KIND_OF_TAG: Final[Mapping[str, Kind]] = {
    "categorical": "categorical",
    "continuous": "continuous",
    "embedding": "pretrained",
}
_NEVER: Final = frozenset({"item_id", "user_id", "session_id", "target"})
_OWNERS: Final = frozenset({"item", "user", "session"})
"""Merlin writes ITEM_ID as the two tags ``id`` and ``item``."""
_LISTS: Final = frozenset({"list", "sequence"})
_SKEWED: Final = 0.5
"""Skewness from which a column of numbers without negatives is tried in the logarithm."""


@dataclass(frozen=True)
class EventColumn:
    """One side feature, complete with what training measured of it."""

    name: str
    """Without the ``-list`` suffix."""
    kind: Kind
    size: int = 1
    """Codes of a category (0 until `fit_event_columns` has seen them), numbers in a vector, else 1."""
    width: int = 32
    """Numbers that the model makes of it."""
    log: bool = False
    """Whether log(1 + x) is taken before the scaling."""
    mean: float = 0.0
    """Subtracted from numbers."""
    std: float = 1.0
    """Divides numbers; for vectors their root mean square length."""
    values: tuple[str | int, ...] = ()
    """Raw values of the codes from 3 on, as far as the data folder tells them."""

    def encode(self, raw: Sequence[Any]) -> npt.NDArray[Any]:
        """Return what the model reads for one session's raw values, one per event; None is absent.

        Parameters
        ----------
        raw : sequence
            Categories as the shop names them (codes, where the data folder does not tell the names), numbers, or
            vectors as sequences of numbers.

        Raises
        ------
        DataError
            A value is of another kind than the column.

        Examples
        --------
        >>> EventColumn("event", "categorical", 5, values=("view", "buy")).encode(["buy", None, "gift"]).tolist()
        [4, 0, 2]
        """
        try:
            if self.kind == "categorical":
                codes = self._codes
                known = [value if not codes else codes.get(value, UNKNOWN_ROW) for value in raw if value is not None]
                encoded = np.zeros(len(raw), np.int64)
                encoded[[value is not None for value in raw]] = np.array(known, np.int64)
                return encoded
            if self.kind == "continuous":
                return np.array([np.nan if value is None else float(value) for value in raw], np.float32)
            empty = np.zeros(self.size, np.float32)
            vectors = [empty if value is None else np.asarray(value, np.float32) for value in raw]
            return np.stack(vectors).reshape(len(raw), self.size) if vectors else np.zeros((0, self.size), np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"side feature {self.name!r} holds {str(list(raw))[:80]} ({error})",
                f"one {self.kind} value per event, or null",
                f"vectors have {self.size} numbers" if self.kind == "pretrained" else "",
            ) from error

    def decode(self, values: npt.NDArray[Any]) -> list[Any]:
        """Return raw values that `encode` turns into these: what a shop would send for a session of the data.

        Examples
        --------
        >>> EventColumn("event", "categorical", 5, values=("view", "buy")).decode(np.array([4, 0, 3]))
        ['buy', None, 'view']
        """
        if self.kind == "categorical":
            raw = dict(enumerate(self.values, start=UNKNOWN_ROW + 1)) | {UNKNOWN_ROW: self._unheard}
            return [None if code == 0 else raw[int(code)] if self.values else int(code) for code in values]
        if self.kind == "continuous":
            return [float(value) if np.isfinite(value) else None for value in values]
        return [vector.tolist() if vector.any() else None for vector in values]

    @functools.cached_property
    def _unheard(self) -> str | int:
        """A value that is not in the vocabulary."""
        texts = isinstance(next(iter(self.values), ""), str)
        tries: Iterator[str | int] = (f"?{number}" if texts else -1 - number for number in itertools.count())
        return next(value for value in tries if value not in self._codes)

    @functools.cached_property
    def _codes(self) -> dict[str | int, int]:
        return {value: code for code, value in enumerate(self.values, start=UNKNOWN_ROW + 1)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self) | {"values": list(self.values)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EventColumn:
        """Read what `to_dict` wrote."""
        return cls(**{**content, "values": tuple(content.get("values", ()))})


def event_columns(data: str | Path, setting: str, width: int) -> tuple[EventColumn, ...]:
    """Choose the side features of a data folder, not yet measured.

    Parameters
    ----------
    data : path
        Data folder; its ``schema.pbtxt`` names columns, tags and domains. Without the file ``auto`` finds nothing.
    setting : str
        ``"auto"``, ``"none"``, or names separated by commas, with or without ``-list``.
    width : int
        Numbers that the model makes of each.

    Raises
    ------
    SchemaError
        A named column is not in the schema, or is none that a model can read.
    """
    file = Path(data) / SCHEMA_FILE
    if setting == NONE or (setting == AUTO and not file.is_file()):
        return ()
    codes, found = encoded_values(data), {}
    for facts in read_schema(file):
        name = facts.name.removesuffix(LIST_SUFFIX)
        if (kind := _kind(facts)) is not None:
            size = 0 if kind != "categorical" or facts.highest is None else facts.highest + 1
            found[name] = EventColumn(
                name, kind, 1 if kind == "continuous" else size, width, values=codes.get(name, ())
            )
    if setting == AUTO:
        return tuple(found.values())
    wanted = [name.strip().removesuffix(LIST_SUFFIX) for name in setting.split(",") if name.strip()]
    for name in wanted:
        if name not in found:
            near = difflib.get_close_matches(name, found, 1) or sorted(found)
            raise SchemaError(
                f"side feature {name!r} is no input column of {file}",
                f"{', '.join(near) if near else 'no such column: the schema has none'}",
                "list columns tagged CATEGORICAL, CONTINUOUS or EMBEDDING can be used; ids, times and targets cannot",
            )
    return tuple(found[name] for name in dict.fromkeys(wanted))


def encoded_values(data: str | Path) -> dict[str, tuple[str | int, ...]]:
    """Return the raw values of the event categories that the ETL wrote beside the sessions, by column."""
    file = Path(data) / SESSION_TRANSFORM_FILE
    if not file.is_file():
        return {}
    features = json.loads(file.read_text(encoding="utf-8")).get("features", {})
    return {name: tuple(feature.get("values", ())) for name, feature in features.items()}


def load_sessions(data: str | Path, split: str, columns: Sequence[EventColumn] = ()) -> Sessions:
    """Read a split with the side features that a model uses, in that model's codes.

    Another ETL run may have numbered the categories otherwise; where the raw values are known they decide, and a value
    that the model has never seen becomes its unknown code.

    Raises
    ------
    SchemaError
        The split lacks a column.
    """
    sessions = Sessions.load(Path(data) / split, [column.name for column in columns])
    codes = encoded_values(data)
    features = dict(sessions.features)
    for column in columns:
        theirs = codes.get(column.name, ())
        if column.kind == "categorical" and column.values and theirs and theirs != column.values:
            features[column.name] = _recoding(theirs, column.values)[features[column.name]]
        if column.values and (features[column.name] == NULL_ROW).any():  # Categorify's null: nothing is known
            features[column.name] = np.where(features[column.name] == NULL_ROW, PADDING_ROW, features[column.name])
    return dataclasses.replace(sessions, features=features)


def compact_event_features(
    event_features: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[np.int64], max_length: int
) -> EventArrays:
    """Do to side features what serving does to rows: known events to the left, the last ``max_length`` of them.

    Parameters
    ----------
    event_features : mapping of str to ndarray [batch, seq] or [batch, seq, size]
        Aligned with ``rows``.
    rows : ndarray [batch, seq], int64
        Catalogue rows; null, unknown and padding are left out.

    Examples
    --------
    >>> compact_event_features({"price": np.array([[7.0, 9.0, 8.0]])}, np.array([[5, 2, 6]]), 50)["price"].tolist()
    [[7.0, 8.0]]
    """
    known = rows > UNKNOWN_ROW
    counts = known.sum(1, keepdims=True)
    kept = np.minimum(counts, max_length)
    steps = np.arange(max(int(kept.max(initial=0)), 1))
    real = steps < kept
    place = np.where(real, counts - kept + steps, 0)
    at = np.take_along_axis(np.argsort(~known, axis=1, kind="stable"), place, 1) if rows.shape[1] else place
    line = np.arange(len(rows))[:, None]
    return {
        name: np.where(real if values.ndim == 2 else real[..., None], values[line, at], values.dtype.type(0))
        for name, values in event_features.items()
    }


def fit_event_columns(columns: Sequence[EventColumn], train: Sessions) -> tuple[EventColumn, ...]:
    """Measure the columns on the training sessions: mean and deviation of numbers, length of vectors, missing sizes.

    Raises
    ------
    SchemaError
        A column holds something else than its tag says.
    """
    return tuple(_fitted(column, np.asarray(train.features[column.name])) for column in columns)


def _fitted(column: EventColumn, values: npt.NDArray[Any]) -> EventColumn:
    if (values.ndim == 2) != (column.kind == "pretrained") or (
        column.kind == "categorical" and values.dtype.kind != "i"
    ):
        raise SchemaError(
            f"side feature {column.name!r} holds {values.dtype} of shape {list(values.shape)}",
            f"what its tag says: a {column.kind} column",
            "correct the tag in the workflow, or leave the column out with --set model.event_features=…",
        )
    if column.kind == "categorical":
        return dataclasses.replace(column, size=column.size or max(int(values.max(initial=0)), UNKNOWN_ROW) + 1)
    if column.kind == "pretrained":
        lengths = np.linalg.norm(values, axis=1)
        real = lengths[(lengths > 0) & np.isfinite(lengths)]
        return dataclasses.replace(column, size=values.shape[1], std=_positive(np.sqrt(np.mean(real**2, dtype=float))))
    numbers = values[np.isfinite(values)].astype(np.float64)
    log = bool(
        numbers.min(initial=0) >= 0 and _skewness(numbers) > max(_SKEWED, abs(_skewness(np.log1p(abs(numbers)))))
    )
    scaled = np.log1p(numbers) if log else numbers
    mean = float(scaled.mean()) if len(scaled) else 0.0
    return dataclasses.replace(column, log=log, mean=mean, std=_positive(scaled.std() if len(scaled) else 1.0))


def _kind(facts: ColumnFacts) -> Kind | None:
    if facts.tags & _NEVER or ("id" in facts.tags and facts.tags & _OWNERS):
        return None
    if not (facts.tags & _LISTS or facts.name.endswith(LIST_SUFFIX)):
        return None
    return next((kind for tag, kind in _KIND_OF_TAG.items() if tag in facts.tags), None)


def _recoding(theirs: Sequence[str | int], ours: Sequence[str | int]) -> npt.NDArray[np.int32]:
    """Return the table from their codes to ours."""
    code = EventColumn("", "categorical", values=tuple(ours))._codes
    return np.array([*range(UNKNOWN_ROW + 1), *(code.get(value, UNKNOWN_ROW) for value in theirs)], np.int32)


def _skewness(values: npt.NDArray[np.float64]) -> float:
    if len(values) < 2 or values.std() == 0:
        return 0.0
    return float((((values - values.mean()) / values.std()) ** 3).mean())


def _positive(value: Any) -> float:
    return float(value) if np.isfinite(value) and value > 1e-8 else 1.0
