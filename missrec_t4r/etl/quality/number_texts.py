"""Numbers that a file holds as text: with decimal commas, thousands separators, or words such as "n/a" for no value.

One such word makes a csv reader return a whole column as text, and a text column becomes a category with one value per
number. A column is read as numbers if every text is a number in one notation or stands for a missing value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.io.arrow_files import one_array, with_column

MISSING: Final = frozenset({"", "n/a", "na", "#n/a", "n.a.", "k.a.", "nan", "null", "none", "nil", "-", "--", "?"})
"""Texts that stand for no value, in lower case."""
_SIGN = r"[+-]?"
_NOTATIONS: Final = {
    "point": re.compile(_SIGN + r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"),
    "comma": re.compile(_SIGN + r"(\d+|\d{1,3}(\.\d{3})+)(,\d+)?"),
    "thousands": re.compile(_SIGN + r"\d{1,3}(,\d{3})+(\.\d+)?|" + _SIGN + r"\d+(\.\d+)?"),
}
"""12.5 and 1e3; 12,5 and 1.234,5; 1,234.5. The first that fits all texts is taken."""
_AMBIGUOUS: Final = re.compile(_SIGN + r"[1-9]\d{0,2},\d{3}")
"""1,234 alone: with a decimal comma or with a thousands separator."""
_INTEGER: Final = re.compile(_SIGN + r"\d+")


class Notations:
    """The notations that all texts of a column have in common; texts are added batch by batch.

    Examples
    --------
    >>> Notations(["12,50", "n/a", "7"]).chosen
    'comma'
    """

    def __init__(self, texts: Iterable[str | None] = ()) -> None:
        self.possible = list(_NOTATIONS)
        self.has_number = self.has_missing = self.has_fraction = False
        self.is_ambiguous = True
        self.add(texts)

    def add(self, texts: Iterable[str | None]) -> None:
        """Add distinct texts."""
        for text in texts:
            if text is None:
                continue
            word = text.strip().lower()
            if word in MISSING:
                self.has_missing |= word != ""
                continue
            self.has_number = True
            self.has_fraction |= _INTEGER.fullmatch(word) is None
            self.possible = [name for name in self.possible if _NOTATIONS[name].fullmatch(word)]
            if not self.possible:
                return
            if "," in word and not _AMBIGUOUS.fullmatch(word):
                self.is_ambiguous = False

    @property
    def chosen(self) -> str | None:
        """The notation; None for a text column, such as one of whole numbers without any other text: those are codes.

        Where 1,234 is all there is, it can be 1.234 as well as 1234: the column stays text.
        """
        if not self.has_number or not (self.has_missing or self.has_fraction) or not self.possible:
            return None
        first = self.possible[0]
        return None if first != "point" and self.is_ambiguous else first


def parse_numbers(column: pa.ChunkedArray | pa.Array, notation: str) -> pa.Array:
    """Return the numbers of a text column, double; null for words and for what is not a number in this notation."""
    encoded = one_array(column.dictionary_encode())
    numbers = pa.array([_number(text, notation) for text in encoded.dictionary.to_pylist()], pa.float64())
    return numbers.take(encoded.indices)


def _number(text: str, notation: str) -> float | None:
    word = text.strip().lower()
    if word in MISSING or not _NOTATIONS[notation].fullmatch(word):
        return None
    if notation == "comma":
        word = word.replace(".", "").replace(",", ".")
    elif notation == "thousands":
        word = word.replace(",", "")
    value = float(word)
    return value if np.isfinite(value) else None


def read_numbers(
    table: pa.Table, features: Sequence[str], categorical_columns: Sequence[str], findings: Findings
) -> pa.Table:
    """Return the table with numbers in place of the event columns whose texts are numbers."""
    for name in features:
        column = table[name]
        if not pa.types.is_string(column.type) or name in categorical_columns:
            continue
        if notation := Notations(pc.unique(column).to_pylist()).chosen:
            note(findings, name, len(column) - column.null_count, notation)
            table = with_column(table, name, parse_numbers(column, notation))
    return table


def note(findings: Findings, name: str, count: int, notation: str) -> None:
    """Add the finding about a text column that is read as numbers."""
    how = {"point": "", "comma": " with a decimal comma", "thousands": " with thousands separators"}[notation]
    words = f"texts of event column {name!r} are numbers{how} and are read as numbers, words such as n/a as null"
    findings.add("number_as_text", count, f"{words}; --categorical-column {name} makes them a category")
