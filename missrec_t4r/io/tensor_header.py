"""The places of the tensors in a safetensors file, and a check of the numbers behind them; no tensor is loaded.

safetensors checks the header: every tensor must have exactly the bytes that its shape takes, and together they must
fill the file, without overlap and without a gap. It does not say where a tensor is, so the header is then read here:
its length (8 bytes), and a JSON object of name -> type, shape and place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

MOST_HEADER = 16 << 20
"""Most bytes of a header; those of exported files have some kilobytes."""
_CHUNK = 1 << 22
"""Bytes that are read at a time."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "BOOL": "u1"}
"""The types that this package writes, as NumPy reads them."""


class StoredTensor(NamedTuple):
    """Where a tensor is in its file."""

    dtype: str
    """safetensors' name of the type: ``F32``, ``I64``, …"""
    shape: tuple[int, ...]
    start: int
    """Position of its first byte in the file."""
    n_bytes: int


class WrongNumber(NamedTuple):
    """The first number of a tensor that may not be there."""

    row: int
    """Index on the first axis; 0 in a scalar."""
    value: float


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises
    ------
    ValueError
        The header is no safetensors header, or does not describe exactly this file.
    """
    with file.open("rb") as stream:
        start = 8 + (length := int.from_bytes(stream.read(8), "little"))
        if length > MOST_HEADER:
            raise ValueError(f"claims a header of {length} bytes, at most {MOST_HEADER}")
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"is no safetensors file ({error})") from error
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"has a tensor {name!r} of type {entry['dtype']}, one of {', '.join(_TYPES)} is expected")
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), start + first, end - first)
    return tensors


def find_wrong_number(file: Path, tensor: StoredTensor, low: float, high: float) -> WrongNumber | None:
    """Return the first number of a tensor that is NaN, infinite, or outside ``low`` to ``high``; None if all are right.

    The file is read in chunks, not mapped: through a mapping all its pages would count as this process's memory.
    """
    kind = np.dtype(_TYPES[tensor.dtype])
    per_row = max(math.prod(tensor.shape[1:]), 1)
    for first, values in _numbers(file, tensor, kind):
        if tensor.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        wrong = ~((values >= low) & (values <= high) & np.isfinite(values))
        if wrong.any():
            place = int(np.argmax(wrong))
            return WrongNumber((first + place) // per_row, float(values[place]))
    return None


def _numbers(file: Path, tensor: StoredTensor, kind: np.dtype[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the numbers of a tensor in parts, each with the position of its first one."""
    with file.open("rb") as stream:
        stream.seek(tensor.start)
        for done in range(0, tensor.n_bytes, _CHUNK):
            part = stream.read(min(_CHUNK, tensor.n_bytes - done))
            yield done // kind.itemsize, np.frombuffer(part, kind)
