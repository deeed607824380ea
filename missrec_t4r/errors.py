"""Exception classes for errors that a caller can fix; messages have three parts: found, expected, what to do.

The command line catches `MISSRecError` alone: it prints the message and exits with ``exit_code``, which is 2 or, if a
quality gate fails, 3. Any other exception is a bug of the package and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MISSRecError(Exception):
    """An error that the caller can fix.

    Parameters
    ----------
    found : str
        What was found, with the offending value ("modality 'image' has 4,384 rows").
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
        stop = "" if cure.endswith("?") else "."
        super().__init__(f"{words} {cure}{stop}" if cure else words)

    def __reduce__(self) -> tuple[type[MISSRecError], tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.cure)  # survives a process boundary with its parts


class DataError(MISSRecError):
    """An interaction or item table cannot be used as it is."""


class GateError(MISSRecError):
    """A quality gate failed; ``result`` is the result that the command would have returned."""

    exit_code = 3

    def __init__(self, found: str, expected: str = "", cure: str = "", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(found, expected, cure)
        self.result = dict(result or {})


class SchemaError(MISSRecError):
    """A column is missing, of the wrong type, or not tagged as needed."""


class ModalityError(MISSRecError):
    """Modality vectors do not fit the items or the model, or hold NaN or infinity."""


class ConfigError(MISSRecError):
    """A setting is unknown, out of range, or contradicts another one."""


class CheckpointError(MISSRecError):
    """Weights or a checkpoint do not fit the model."""


class BundleError(MISSRecError):
    """A serving bundle is incomplete, damaged, or of another format version."""


class ParityError(MISSRecError):
    """Offline and served results differ, so nothing is exported."""


class ServingError(MISSRecError):
    """The inference server cannot be started, reached, or understood."""


class UnavailableError(ServingError):
    """The inference server is temporarily unavailable: retrying is safe and may succeed."""
