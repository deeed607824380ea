"""JSON files: written atomically, NumPy and torch scalars as plain numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from missrec_t4r.errors import DataError
from missrec_t4r.io.atomic import write_text


class JSONFileError(DataError, ValueError):
    """A file that is not JSON, or holds no object; its cause is the reason. A ``ValueError``, too, as json raises."""


def to_plain(value: Any) -> Any:
    """Return a NumPy or torch scalar as a Python number and any other object as its text.

    The ``default`` of ``json.dumps`` for everything that JSON cannot hold, such as paths.

    Examples
    --------
    >>> json.dumps({"folder": Path("data")}, default=to_plain)
    '{"folder": "data"}'
    """
    return value.item() if hasattr(value, "item") else str(value)


def write_json(file: Path, content: Any, *, indent: int | None = 2, allow_nan: bool = True) -> None:
    """Write a JSON file atomically: readers find the old file or the new one, whole.

    Parameters
    ----------
    file : Path
        Replaced if it exists; its folder is created.
    content : JSON-able value
    indent : int or None
        Spaces per level; None writes one line.
    allow_nan : bool
        False raises ``ValueError`` for NaN and infinity, which are not JSON.

    Raises
    ------
    DataError
        The disk is full or read-only.
    """
    write_text(file, json.dumps(content, indent=indent, allow_nan=allow_nan, default=to_plain) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises
    ------
    JSONFileError
        It is damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # editors of Windows begin it with a mark
        if not isinstance(content, dict):
            raise TypeError(f"its content is of type {type(content).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        cure = "copy it again, or repeat the command that wrote it"
        raise JSONFileError(f"{file} cannot be read ({error})", "a JSON object", cure) from error
    return content
