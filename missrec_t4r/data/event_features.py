"""Event features: columns of an event beside its item that enter the model, with their kind, scale and codes.

A column is ``categorical`` (NVTabular's codes: 0 padding, 1 null, 2 unknown, values from 3 on), ``continuous`` (a
number, standardised by the training split, after log(1 + x) if that makes it less skewed) or ``pretrained`` (a vector
per event). The fitted columns are stored in the run and the bundle, so that serving scales and encodes as training did.
In requests the field is called ``side``, in recipes the setting ``model.event_features``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from missrec_t4r.arrays import AnyArray, Doubles, Ints
from missrec_t4r.data.number_steps import Step, apply_steps, as_steps, invert_steps
from missrec_t4r.data.schema_pbtxt import SchemaColumn, read_schema
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import LIST_SUFFIX, NULL_ROW, PADDING_ROW, SCHEMA_FILE, SESSION_TRANSFORM_FILE, UNKNOWN_ROW

Kind = Literal["categorical", "continuous", "pretrained"]

EventArrays = dict[str, AnyArray]
"""By column: codes or numbers [batch, seq], vectors [batch, seq, size]."""

AUTO: Final = "auto"
"""Setting: every list column that the schema tags as an input, except ids and targets; raw times have no such tag."""
NONE: Final = "none"
"""Setting: no event features."""

_KIND_OF_TAG: Final[Mapping[str, Kind]] = {
    "categorical": "categorical",
    "continuous": "continuous",
    "embedding": "pretrained",
}
_NEVER: Final = frozenset({"item_id", "user_id", "session_id", "target"})
_OWNERS: Final = frozenset({"item", "user", "session"})
"""Merlin stores the tag ITEM_ID as the two tags ``id`` and ``item``."""
_LISTS: Final = frozenset({"list", "sequence"})
_SKEWED: Final = 0.5
"""Skewness above which log(1 + x) is considered for a column without negative numbers."""


@dataclass(frozen=True)
class EventColumn:
    """One event feature with the statistics and codes that training fitted."""

    name: str
    """Without the ``-list`` suffix."""
    kind: Kind
    size: int = 1
    """Number of codes of a categorical column (0 before `fit_event_columns`), width of a vector, else 1."""
    width: int = 32
    """Width of its embedding in the model."""
    log: bool = False
    """Whether log(1 + x) is applied before standardising."""
    mean: float = 0.0
    """Mean of the numbers in training, subtracted."""
    std: float = 1.0
    """Standard deviation of the numbers in training, or root mean square length of the vectors; divides."""
    values: tuple[str | float, ...] = ()
    """Raw values of the codes from 3 on; empty if the data folder does not hold them."""
    steps: tuple[Step, ...] = ()
    """What the ETL's workflow computes of a raw number, before ``log``, ``mean`` and ``std``."""

    def encode(self, raw: Sequence[Any]) -> AnyArray:
        """Encode one session's raw values, one per event, as the model reads them; None marks a missing value.

        Parameters
        ----------
        raw : sequence
            Categories by their raw names (codes, if the data folder does not hold the names), numbers, or vectors as
            sequences of numbers.

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
                present = [value if not codes else codes.get(value, UNKNOWN_ROW) for value in raw if value is not None]
                encoded = np.zeros(len(raw), np.int64)
                encoded[[value is not None for value in raw]] = np.array(present, np.int64)
                return encoded
            if self.kind == "continuous":
                numbers = [np.nan if value is None else float(value) for value in raw]
                return apply_steps(self.steps, np.array(numbers, np.float64)).astype(np.float32)
            empty = np.zeros(self.size, np.float32)
            vectors = [empty if value is None else np.asarray(value, np.float32) for value in raw]
            return np.array(vectors, np.float32).reshape(len(raw), self.size)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"event feature {self.name!r} holds {str(list(raw))[:80]} ({error})",
                f"one {self.kind} value per event, or null",
                f"vectors have {self.size} numbers" if self.kind == "pretrained" else "",
            ) from error

    def decode(self, values: AnyArray) -> list[Any]:
        """Return raw values that `encode` maps to these, as a request would hold them.

        Examples
        --------
        >>> EventColumn("event", "categorical", 5, values=("view", "buy")).decode(np.array([4, 0, 3]))
        ['buy', None, 'view']
        """
        if self.kind == "categorical":
            raw = dict(enumerate(self.values, start=UNKNOWN_ROW + 1)) | {UNKNOWN_ROW: self._unknown_value}
            return [None if code == 0 else raw[int(code)] if self.values else int(code) for code in values]
        if self.kind == "continuous":
            numbers = invert_steps(self.steps, values.astype(np.float64))
            return [float(value) if np.isfinite(value) else None for value in numbers]
        return [vector.tolist() if vector.any() else None for vector in values]

    @functools.cached_property
    def _unknown_value(self) -> str | float:
        """A value that is not in the vocabulary."""
        texts = isinstance(next(iter(self.values), ""), str)
        candidates: Iterator[str | float] = (f"?{number}" if texts else -1 - number for number in itertools.count())
        return next(value for value in candidates if value not in self._codes)

    @functools.cached_property
    def _codes(self) -> dict[str | float, int]:
        return {value: code for code, value in enumerate(self.values, start=UNKNOWN_ROW + 1)}

    def to_dict(self) -> dict[str, Any]:
        """Return the column as JSON-able values."""
        return dataclasses.asdict(self) | {"values": list(self.values), "steps": [list(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EventColumn:
        """Return the column of `to_dict`'s values.

        Raises
        ------
        SchemaError
            A value is of another type or outside its range.
        """
        lists = {"values": tuple(content.get("values", ())), "steps": as_steps(content.get("steps", ()))}
        column = cls(**{**content, **lists})
        numbers = [column.mean, column.std, *(value for value in column.values if not isinstance(value, str))]
        right = (
            isinstance(column.name, str)
            and column.kind in get_args(Kind)
            and all(type(size) is int and size > 0 for size in (column.size, column.width))
            and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
            and column.std > 0
            and (not column.values or column.size > len(column.values) + UNKNOWN_ROW)
        )
        if not right:
            raise SchemaError(
                f"event feature {column.name!r} is stored as {str(dict(content))[:200]}",
                "a kind, sizes above 0, finite numbers, and a code for every value",
                "train and export again with the installed version",
            )
        return column


def event_columns(data: str | Path, setting: str, width: int) -> tuple[EventColumn, ...]:
    """Choose the event features of a data folder; `fit_event_columns` then fits them.

    Parameters
    ----------
    data : path
        Data folder; its ``schema.pbtxt`` holds columns, tags and domains. Without the file ``auto`` chooses none.
    setting : str
        ``"auto"``, ``"none"``, or names separated by commas, with or without ``-list``.
    width : int
        Width of each column's embedding.

    Raises
    ------
    SchemaError
        A named column is not in the schema, or is not an input column.
    """
    file = Path(data) / SCHEMA_FILE
    if setting == NONE or (setting == AUTO and not file.is_file()):
        return ()
    encodings, available = stored_encodings(data), {}
    for column in read_schema(file):
        name = column.name.removesuffix(LIST_SUFFIX)
        if (kind := _kind(column)) is not None:
            size = 1 if kind == "continuous" else 0
            if kind == "categorical" and column.highest is not None:
                size = column.highest + 1
            values, steps = encodings.get(name, ((), ()))
            available[name] = EventColumn(name, kind, size, width, values=values, steps=steps)
    if setting == AUTO:
        return tuple(available.values())
    names = [name.strip().removesuffix(LIST_SUFFIX) for name in setting.split(",") if name.strip()]
    for name in names:
        if name not in available:
            near = difflib.get_close_matches(name, available, 1) or sorted(available)
            raise SchemaError(
                f"event feature {name!r} is not an input column of {file}",
                f"{', '.join(near) if near else 'no such column: the schema has none'}",
                "list columns tagged CATEGORICAL, CONTINUOUS or EMBEDDING can be used; ids, times and targets cannot",
            )
    return tuple(available[name] for name in dict.fromkeys(names))


def encoded_values(data: str | Path) -> dict[str, tuple[str | float, ...]]:
    """Return the raw values of categorical event features that the ETL stored, by column."""
    return {name: values for name, (values, _) in stored_encodings(data).items()}


def stored_encodings(data: str | Path) -> dict[str, tuple[tuple[str | float, ...], tuple[Step, ...]]]:
    """Return the raw values of every column, and what the ETL's workflow computes of its raw numbers."""
    file = Path(data) / SESSION_TRANSFORM_FILE
    features = read_json(file).get("features", {}) if file.is_file() else {}
    return {
        name: (tuple(feature.get("values", ())), as_steps(feature.get("steps", ())))
        for name, feature in features.items()
    }


def load_sessions(data: str | Path, split: str, columns: Sequence[EventColumn] = ()) -> Sessions:
    """Read a split with the event features of a model, in that model's codes.

    Another ETL run may have numbered the categories differently: where the raw values are stored, codes are translated
    by value, and a value that the model has not seen becomes its unknown code.

    Raises
    ------
    SchemaError
        The split lacks a column.
    """
    sessions = Sessions.load(Path(data) / split, [column.name for column in columns])
    encodings, features = stored_encodings(data), {}
    for column in columns:
        values = sessions.features[column.name]
        data_values, data_steps = encodings.get(column.name, ((), ()))
        if column.kind == "continuous" and data_steps != column.steps:
            numbers = invert_steps(data_steps, values.astype(np.float64))
            values = apply_steps(column.steps, numbers).astype(np.float32)
        if column.kind == "categorical" and column.values and data_values and data_values != column.values:
            values = _code_table(data_values, column)[values]
        if column.values and (values == NULL_ROW).any():  # NVTabular's null: a missing value
            values = np.where(values == NULL_ROW, PADDING_ROW, values)
        features[column.name] = values
    return dataclasses.replace(sessions, features=features)


def compact_event_features(event_features: Mapping[str, AnyArray], rows: Ints, max_length: int) -> EventArrays:
    """Return the event features of the last ``max_length`` known items, left-aligned, as serving aligns the rows.

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
    counts = known.sum(1)
    kept = np.minimum(counts, max_length)
    place = np.cumsum(known, axis=1) - 1 - (counts - kept)[:, None]  # [batch, seq], of a known item among the kept ones
    taken = known & (place >= 0)
    shape, at = (len(rows), max(int(kept.max(initial=0)), 1)), (np.nonzero(taken)[0], place[taken])
    compacted: EventArrays = {}
    for name, values in event_features.items():
        compacted[name] = np.zeros((*shape, *values.shape[2:]), values.dtype)
        compacted[name][at] = values[taken]
    return compacted


def fit_event_columns(columns: Sequence[EventColumn], train: Sessions) -> tuple[EventColumn, ...]:
    """Fit the columns to the training sessions: mean and standard deviation of numbers, length of vectors, sizes.

    Raises
    ------
    SchemaError
        A column's values do not fit its tag.
    """
    return tuple(_fitted(column, np.asarray(train.features[column.name])) for column in columns)


def fit_event_features(data: str | Path, setting: str = AUTO, width: int = 32) -> tuple[EventColumn, ...]:
    """Choose the event features of a data folder and fit them to its training split, for a script of Transformers4Rec.

    Parameters
    ----------
    data, setting, width
        As in `event_columns`.
    """
    columns = event_columns(data, setting, width)
    return fit_event_columns(columns, load_sessions(data, "train", columns).known())


def _fitted(column: EventColumn, values: AnyArray) -> EventColumn:
    if (values.ndim == 2) != (column.kind == "pretrained") or (
        column.kind == "categorical" and values.dtype.kind != "i"
    ):
        raise SchemaError(
            f"event feature {column.name!r} holds {values.dtype} of shape {list(values.shape)}",
            f"a {column.kind} column, according to its tag",
            "correct the tag in the workflow, or leave the column out with --set model.event_features=…",
        )
    if column.kind == "categorical":
        return dataclasses.replace(column, size=column.size or max(int(values.max(initial=0)), UNKNOWN_ROW) + 1)
    if column.kind == "pretrained":
        lengths = np.linalg.norm(values, axis=1)
        present = lengths[(lengths > 0) & np.isfinite(lengths)]  # a missing vector is zero
        rms = np.sqrt(np.mean(present**2, dtype=float))
        return dataclasses.replace(column, size=values.shape[1], std=_positive_or_one(rms))
    numbers = values[np.isfinite(values)].astype(np.float64)
    log = bool(
        numbers.min(initial=0) >= 0 and _skewness(numbers) > max(_SKEWED, abs(_skewness(np.log1p(abs(numbers)))))
    )
    scaled = np.log1p(numbers) if log else numbers
    mean = float(scaled.mean()) if len(scaled) else 0.0
    return dataclasses.replace(column, log=log, mean=mean, std=_positive_or_one(scaled.std() if len(scaled) else 1.0))


def _kind(column: SchemaColumn) -> Kind | None:
    if column.tags & _NEVER or ("id" in column.tags and column.tags & _OWNERS):
        return None
    if not (column.tags & _LISTS or column.name.endswith(LIST_SUFFIX)):
        return None
    return next((kind for tag, kind in _KIND_OF_TAG.items() if tag in column.tags), None)


def _code_table(data_values: Sequence[str | float], column: EventColumn) -> npt.NDArray[np.int32]:
    """Return a table from the data folder's codes to those of the column, [code]."""
    codes = (column._codes.get(value, UNKNOWN_ROW) for value in data_values)
    return np.array([*range(UNKNOWN_ROW + 1), *codes], np.int32)


def _skewness(values: Doubles) -> float:
    if len(values) < 2 or values.std() == 0:
        return 0.0
    return float((((values - values.mean()) / values.std()) ** 3).mean())


def _positive_or_one(value: Any) -> float:
    return float(value) if np.isfinite(value) and value > 1e-8 else 1.0
