"""Reader of Merlin's schema.pbtxt without Merlin, for training machines that have torch alone.

The file is TensorFlow Metadata's ``Schema`` in protobuf's text format. Each feature's name, integer domain and tags are
read; everything else is skipped.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from missrec_t4r.errors import SchemaError

# A quote or bracket that is never closed reaches to the end: tried again at every further one, it would take hours.
_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|("(?:\\.|[^"\\])*(?:"|\Z)|'(?:\\.|[^'\\])*(?:'|\Z)|\[[^\]]*(?:\]|\Z)|[{}<>:;,]|[^\s{}<>:;,"']+)""",
    re.DOTALL,
)
_OPEN, _CLOSE = "{<", "}>"
_MOST_BYTES = 64 << 20
"""Schemas of wide tables have some hundred kilobytes."""


@dataclass(frozen=True)
class SchemaColumn:
    """Name, tags and integer domain of one feature of the schema."""

    name: str
    tags: frozenset[str]
    """Lower-case names of Merlin's tags."""
    highest: int | None
    """Largest value of the integer domain; None without a domain."""


def read_schema(file: str | Path) -> list[SchemaColumn]:
    """Return the features of a ``schema.pbtxt``, in file order.

    Raises
    ------
    SchemaError
        The file is missing or is not protobuf text.
    """
    try:
        if (size := Path(file).stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{size} bytes")
        message = parse_text_message(Path(file).read_text(encoding="utf-8"))
        return [_column(feature) for feature in message.get("feature", [])]
    except (OSError, ValueError, IndexError, KeyError, AttributeError, SyntaxError, RecursionError) as error:
        raise SchemaError(f"{file} cannot be read ({error})", "Merlin's schema.pbtxt", "re-run the ETL") from error


def parse_text_message(text: str) -> dict[str, list[Any]]:
    """Return protobuf text as a mapping of field name to the list of its values; nested messages are mappings too.

    Examples
    --------
    >>> parse_text_message('feature { name: "price-list" annotation { tag: "list" tag: "continuous" } }')
    {'feature': [{'name': ['price-list'], 'annotation': [{'tag': ['list', 'continuous']}]}]}
    """
    tokens = iter([match.group(1) for match in _TOKEN.finditer(text) if match.group(1)])
    return _message(tokens, top=True)


def _message(tokens: Iterator[str], *, top: bool = False) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    for name in tokens:
        if name in _CLOSE:
            return fields
        if name in ",;":
            continue
        token = next(tokens, "")
        if token == ":":
            token = next(tokens, "")
        if not token:
            raise ValueError(f"field {name!r} has no value")
        fields.setdefault(name, []).append(_message(tokens) if token in _OPEN else _scalar(token))
    if not top:
        raise ValueError("a message is not closed")
    return fields


def _scalar(token: str) -> Any:
    if token[0] in "\"'":
        return ast.literal_eval(token)
    try:
        return int(token)
    except ValueError:
        return token


def _column(feature: Mapping[str, list[Any]]) -> SchemaColumn:
    tags = [str(tag).lower() for note in feature.get("annotation", []) for tag in note.get("tag", [])]
    domains = feature.get("int_domain", [])
    highest = domains[0].get("max", [None])[0] if domains else None
    return SchemaColumn(str(feature["name"][0]), frozenset(tags), highest)
