"""Business rules of a request: filters over the catalogue's columns and diversity caps, strictly checked.

On the wire a session's rules are one JSON object::

    {"where": {"in_stock": true, "category": ["lamp", "desk"], "price": {"min": 5, "max": 20}}, "at_most": {"brand": 2}}

Filters act before the top-k, so that k items are returned whenever k items pass.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.errors import ServingError
from missrec_t4r.io.arrow_files import is_list, one_array
from missrec_t4r.schema import FIRST_ITEM_ROW

if TYPE_CHECKING:  # the server's first model reads rules, and starts without torch
    from torch import Tensor

Scalar = str | int | float | bool

MOST_CHARACTERS = 1 << 16
"""Longer rules are refused."""
_CACHED_BYTES = 1 << 26
"""Bytes of a cache of masks, with their keys: requests repeat the same few filters."""
_PER_ENTRY = 400
"""Bytes of a key and of the Python objects around its mask, at most."""
_EXAMPLE = '{"where": {"in_stock": true}, "at_most": {"brand": 2}}'


@dataclass(frozen=True)
class Span:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float


Condition = frozenset[Scalar] | Span
Where = tuple[tuple[str, Condition], ...]
"""Columns and what their values must be."""
Mask = TypeVar("Mask", Bools, "Tensor")
"""Which rows pass, [row], bool."""


@dataclass(frozen=True)
class Rules:
    """Filters and diversity caps of one session's list."""

    where: Where = ()
    """Column and what its value must be: one of a set, or within a span. All of them must hold."""
    at_most: tuple[tuple[str, int], ...] = ()
    """Column and how many items of the list may share a value of it."""

    @classmethod
    def parse(cls, text: str | bytes) -> Rules:
        """Read the wire's JSON; empty text is no rule.

        Raises
        ------
        ServingError
            It is not a JSON object of this form; the offending part is named.
        """
        if len(text) > MOST_CHARACTERS:
            raise ServingError(f"rules of {len(text)} characters", f"at most {MOST_CHARACTERS}")
        if not text.strip():
            return cls()
        try:
            content = json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_constant=_refused)
        except (ValueError, RecursionError) as error:
            raise ServingError(f"rules are not JSON ({error})", _EXAMPLE) from error
        return cls.of(content)

    @classmethod
    def of(cls, content: Any) -> Rules:
        """Check rules given as a mapping, as `parse` does."""
        if not isinstance(content, dict) or set(content) - {"where", "at_most"}:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ServingError(f"rules hold {found}", f"an object with where and at_most, such as {_EXAMPLE}")
        where, at_most = content.get("where", {}), content.get("at_most", {})
        if not isinstance(where, dict) or not isinstance(at_most, dict):
            raise ServingError("where or at_most is not an object", f"column names and values, such as {_EXAMPLE}")
        for column, cap in at_most.items():
            if type(cap) is not int or cap < 1:
                raise ServingError(f"at_most {column!r} is {cap!r}", "a whole number of at least 1")
        conditions = tuple((column, _condition(column, value)) for column, value in sorted(where.items()))
        return cls(conditions, tuple(sorted(at_most.items())))


NO_RULES = Rules()


def fingerprint(where: Where) -> bytes:
    """Return a digest that tells filters apart, also 1 from True; a list of values can be long."""
    conditions = [
        (column, sorted(condition, key=repr) if isinstance(condition, frozenset) else condition)
        for column, condition in where
    ]
    return blake2b(repr(conditions).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class MaskCache(Generic[Mask]):
    """The masks of a catalogue that were used last, under the digests of their filters."""

    def __init__(self) -> None:
        self._masks: OrderedDict[bytes, Mask] = OrderedDict()
        self._alone = threading.Lock()

    def get(self, key: bytes, make: Callable[[], Mask]) -> Mask:
        """Return a mask that is kept, or made now."""
        with self._alone:
            if key not in self._masks:
                self._masks[key] = make()
            self._masks.move_to_end(key)
            mask = self._masks[key]
            while len(self._masks) > max(_CACHED_BYTES // (mask.nbytes + _PER_ENTRY), 1):
                self._masks.popitem(last=False)
            return mask


class ItemColumns:
    """The catalogue's columns as filters and caps read them.

    Parameters
    ----------
    items : pyarrow.Table
        One line per item in row order, starting with row 3.
    """

    def __init__(self, items: pa.Table) -> None:
        self._items = items
        self._masks: MaskCache[Bools] = MaskCache()
        self._groups: dict[str, Ints] = {}

    def check(self, rules: Rules) -> None:
        """Raise a `ServingError` if the catalogue lacks what these rules need; masks and groups are cached."""
        if rules.where:
            self.passing(rules.where)
        for column, _ in rules.at_most:
            self.groups(column)

    def passing(self, where: Sequence[tuple[str, Condition]]) -> Bools:
        """Return which rows fulfil all conditions, [row]; the reserved rows and missing values never do.

        Raises
        ------
        ServingError
            A column does not exist or holds values of another type than the condition.
        """
        passed = np.ones(self._items.num_rows + FIRST_ITEM_ROW, bool)
        for column, condition in where:
            passed &= self._cached(column, condition)
        return passed

    def _cached(self, column: str, condition: Condition) -> Bools:
        return self._masks.get(fingerprint(((column, condition),)), lambda: self._mask(column, condition))

    def groups(self, column: str) -> Ints:
        """Return a number per row that items with the same value of ``column`` share, [row]; -1 for a missing value."""
        if column not in self._groups:
            values = self._column(column)
            if is_list(values.type):
                raise ServingError(f"column {column!r} holds lists", "one value per item", "cap by another column")
            codes = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
            self._groups[column] = np.concatenate([np.full(FIRST_ITEM_ROW, -1), codes.astype(np.int64)])
        return self._groups[column]

    def _column(self, name: str) -> pa.Array:
        if name not in self._items.column_names:
            known = ", ".join(self._items.column_names)
            raise ServingError(f"the catalogue has no column {name!r}", f"one of {known}", "see the bundle's items")
        values = one_array(self._items[name])
        if pa.types.is_dictionary(values.type):
            return values.dictionary_decode()
        if pa.types.is_decimal(values.type):
            return values.cast(pa.float64())
        if pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):  # unix seconds: JSON has no dates
            zone = getattr(values.type, "tz", None)
            return values.cast(pa.timestamp("s", zone), safe=False).cast(pa.int64())
        return values

    def _mask(self, name: str, condition: Condition) -> Bools:
        import pyarrow.compute as pc  # a tenth of a second, which only requests with filters need

        values, mask = self._column(name), np.zeros(self._items.num_rows + FIRST_ITEM_ROW, bool)
        owner = np.arange(len(values))
        if is_list(values.type):
            owner = pc.list_parent_indices(values).to_numpy()
            values = pc.list_flatten(values)
        if isinstance(condition, Span):
            if not _is_number(values.type):
                raise ServingError(f"column {name!r} holds {values.type}", "numbers, for min and max")
            numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
            met = (numbers >= condition.low) & (numbers <= condition.high)
        else:
            wanted = _typed(name, condition, values.type)
            met = pc.is_in(values, value_set=wanted, skip_nulls=True).to_numpy(zero_copy_only=False)
        mask[owner[met] + FIRST_ITEM_ROW] = True
        return mask


def capped(rows: Sequence[int], caps: Sequence[tuple[Ints, int]], k: int) -> list[int]:
    """Return the positions of the first k items that keep to all caps, in order.

    Parameters
    ----------
    rows : sequence of int
        Best first.
    caps : sequence of (groups [row], int)
        A missing value (-1) is in nobody's group.

    Examples
    --------
    >>> capped([5, 3, 4, 6], [(np.array([-1, -1, -1, 0, 0, 0, 1]), 2)], 3)
    [0, 1, 3]
    """
    taken: list[dict[int, int]] = [{} for _ in caps]
    kept: list[int] = []
    for place, row in enumerate(rows):
        values = [int(groups[row]) for groups, _ in caps]
        if any(count.get(value, 0) >= cap for count, value, (_, cap) in zip(taken, values, caps, strict=True)):
            continue
        kept.append(place)
        for count, value in zip(taken, values, strict=True):
            if value >= 0:
                count[value] = count.get(value, 0) + 1
        if len(kept) == k:
            break
    return kept


def _condition(column: str, value: Any) -> Condition:
    if isinstance(value, dict):
        low, high = value.get("min", -math.inf), value.get("max", math.inf)
        numbers = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high))
        if not value or set(value) - {"min", "max"} or not numbers or not low <= high:
            raise ServingError(f"where {column!r} is {value!r}", "min, max or both, numbers, min not above max")
        try:
            return Span(float(low), float(high))
        except OverflowError as error:
            raise ServingError(f"where {column!r} has a bound that is too large", "64-bit numbers") from error
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(scalar, (str, bool, int, float)) for scalar in values):
        raise ServingError(f"where {column!r} is {value!r}", "a value, a list of values, or an object of min and max")
    return frozenset(values)


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _typed(name: str, wanted: frozenset[Scalar], kind: pa.DataType) -> pa.Array:
    numbers = _is_number(kind) and all(isinstance(value, (int, float)) and type(value) is not bool for value in wanted)
    booleans = pa.types.is_boolean(kind) and all(isinstance(value, bool) for value in wanted)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    strings = is_text and all(isinstance(value, str) for value in wanted)
    if not (numbers or booleans or strings):
        raise ServingError(f"where {name!r} lists {sorted(map(repr, wanted))}", f"values of the column's type, {kind}")
    values: list[Any] = list(wanted)
    if pa.types.is_integer(kind):
        values = [int(value) for value in values if isinstance(value, int) or value.is_integer()]
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, OverflowError, UnicodeError) as error:
        raise ServingError(f"where {name!r} has a value that {kind} cannot hold ({error})", "other values") from error


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
