"""The header of a safetensors file, read strictly, and a check of the numbers behind it; no tensor is loaded.

Length of the header (8 bytes), a JSON object of name -> type, shape and place, then the numbers. Every tensor must
have exactly the bytes that its shape takes, and together they must fill the file, without overlap and without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_HEADER = 16 << 20
"""Most bytes of a header; those of exported files have some kilobytes."""
_MOST_BRACKETS = 1_000_000
_MOST_DIMENSIONS = 8
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
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else -1
        if not 0 < length <= min(MOST_HEADER, size - 8):
            raise ValueError(f"claims a header of {length} bytes, at most {min(MOST_HEADER, max(size - 8, 0))}")
        written = stream.read(length)
    if written.count(b"[") + written.count(b"{") > _MOST_BRACKETS:
        raise ValueError(f"has a header of more than {_MOST_BRACKETS} parts")
    try:
        content = json.loads(written, object_pairs_hook=_without_repeated)
    except RecursionError as error:
        raise ValueError("has no safetensors header (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"has no safetensors header ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("has no safetensors header (no JSON object)")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that are no texts")
    tensors = {name: _stored(name, entry, 8 + length) for name, entry in content.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if tensor.start != end:
            raise ValueError(f"has the tensor {name!r} at byte {tensor.start}, the one before ends at {end}")
        end += tensor.n_bytes
    if end != size:
        raise ValueError(f"claims {end - 8 - length} bytes of tensors; it has {size - 8 - length}")
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


def _stored(name: str, entry: Any, base: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"has a tensor {name!r} without type, shape and place")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ValueError(f"has a tensor {name!r} of type {str(dtype)[:40]!r}, one of {', '.join(_TYPES)} is expected")
    whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not whole or len(shape) > _MOST_DIMENSIONS or not all(_is_size(one) for one in (*shape, *offsets)):
        raise ValueError(f"has a tensor {name!r} whose shape or place are no whole numbers")
    n_bytes = math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise ValueError(
            f"has a tensor {name!r} of {dtype} {shape}, which takes {n_bytes} bytes, at {offsets[0]} to {offsets[1]}"
        )
    return StoredTensor(dtype, tuple(shape), base + offsets[0], n_bytes)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _without_repeated(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands there twice")
    return content
