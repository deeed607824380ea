"""Every error that we raise on purpose, worded in three parts: what was found, what was expected, what to do.

`MISSRecError` is the only class that the command line catches: it prints the words and exits with its code, which is 2
or, where a gate refuses data that could be used, 3. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MISSRecError(Exception):
    """Something that the caller can cure.

    Parameters
    ----------
    found : str
        What was met, with the offending value ("modality 'image' has 4,384 rows").
    expected : str
        What would have been right ("the catalogue has 4,385 items").
    cure : str
        What to do about it, as a command or a setting where there is one.

    Examples
    --------
    >>> print(ModalityError("modality 'image' has 3 rows", "the item table has 4", "re-run the image encoder"))
    modality 'image' has 3 rows; expected: the item table has 4. re-run the image encoder.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", cure: str = "") -> None:
        self.found, self.expected, self.cure = found, expected, cure
        words = found + (f"; expected: {expected}" if expected else "") + "."
        super().__init__(f"{words} {cure}." if cure else words)

    def __reduce__(self) -> tuple[type[MISSRecError], tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.cure)  # survives a process boundary with its parts


class DataError(MISSRecError):
    """An interaction or item table cannot be used as it is."""


class GateError(MISSRecError):
    """Data are usable, but not as the gate wants them; ``result`` is what the command would have answered."""

    exit_code = 3

    def __init__(self, found: str, expected: str = "", cure: str = "", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(found, expected, cure)
        self.result = dict(result or {})


class SchemaError(MISSRecError):
    """A column is missing, of the wrong type, or not tagged as needed."""


class ModalityError(MISSRecError):
    """Modality vectors do not fit the items, the model, or arithmetic (NaN)."""


class ConfigError(MISSRecError):
    """A setting is unknown, out of range, or contradicts another one."""


class CheckpointError(MISSRecError):
    """Weights or trainer state do not fit the model."""


class BundleError(MISSRecError):
    """A serving bundle is incomplete, damaged, or of another format version."""


class ParityError(MISSRecError):
    """Offline and served answers differ, so the export is refused."""


class ServingError(MISSRecError):
    """The inference server cannot be started, reached, or understood."""


class UnavailableError(ServingError):
    """The inference server is not there right now: asking again later is safe, and may help."""
