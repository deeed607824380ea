"""Refuse a safetensors file that does not hold exactly the expected tensors, or a number that may not be in one.

No tensor is loaded. safetensors checks the header: every tensor must have exactly the bytes that its shape takes, and
together they must fill the file, without overlap and without a gap. It does not say where a tensor is, so the header is
then read here: its length (8 bytes), and a JSON object of name -> type, shape and place.

Shapes are compared before anything is allocated for them, numbers before anything is computed with them: an index of
item rows beyond the catalogue would answer with other items, or make torch allocate gigabytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from missrec_t4r.errors import BundleError

NO_LIMIT = (-math.inf, math.inf)
NOT_NEGATIVE = (0.0, math.inf)
_MOST_HEADER = 16 << 20
"""Most bytes of a header; those of exported files have some kilobytes."""
_CHUNK = 1 << 19
"""Numbers that are read at a time."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "BOOL": "u1"}
"""The types that this package writes, as NumPy reads them."""


class StoredTensor(NamedTuple):
    """Where a tensor is in its file."""

    dtype: str
    """safetensors' name of the type: ``F32``, ``I64``, …"""
    shape: tuple[int, ...]
    start: int
    """Position of its first byte in the file."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises
    ------
    ValueError
        The header is not one of safetensors, or does not describe exactly this file.
    """
    with file.open("rb") as stream:
        start = 8 + (length := int.from_bytes(stream.read(8), "little"))
        if length > _MOST_HEADER:
            raise ValueError(f"claims a header of {length} bytes, at most {_MOST_HEADER}")
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"is not a safetensors file ({error})") from error
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"has a tensor {name!r} of type {entry['dtype']}, one of {', '.join(_TYPES)} is expected")
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
    return tensors


def header_of(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a bundle's file by name, without the padding between them.

    Raises
    ------
    BundleError
        As `read_header` raises ValueError.
    """
    try:
        return {name: tensor for name, tensor in read_header(file).items() if not name.startswith("filling.")}
    except (OSError, ValueError) as error:
        raise refused(file, str(error), "a safetensors file") from error


def compare(
    file: Path, header: Mapping[str, StoredTensor], expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Raise `BundleError` unless a file holds exactly the expected tensors, of the expected types and shapes."""
    problems = [f"no {name}" for name in expected if name not in header]
    problems += [f"{name}, which is not expected" for name in header if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name in header and (header[name].dtype, header[name].shape) != (dtype, shape):
            stored = header[name]
            problems.append(f"{name} of {stored.dtype} {list(stored.shape)} instead of {dtype} {list(shape)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise refused(
            file, "holds " + "; ".join(problems[:4]) + more, "the tensors of the model that the bundle describes"
        )


def check_ranges(file: Path, header: Mapping[str, StoredTensor], limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise `BundleError` for the first number that is NaN, infinite or outside its tensor's limits."""
    for name, tensor in header.items():
        low, high = (0.0, 1.0) if tensor.dtype == "BOOL" else limits.get(name, NO_LIMIT)
        for first, numbers in _numbers(file, tensor):
            wrong = ~((numbers >= low) & (numbers <= high) & np.isfinite(numbers))
            if not wrong.any():
                continue
            position = int(np.argmax(wrong))
            number, row = float(numbers[position]), (first + position) // max(math.prod(tensor.shape[1:]), 1)
            if not math.isfinite(number):
                raise refused(file, f"holds NaN or infinity in {name}, row {row}", "finite numbers")
            expected = f"{low:.0f} to {high:.0f}" if math.isfinite(high) else "no negative number"
            raise refused(file, f"holds {number:.10g} in {name}, row {row}", expected)


def _numbers(file: Path, tensor: StoredTensor) -> Iterator[tuple[int, Any]]:
    """Yield the numbers of a tensor in chunks, each with the position of its first one.

    The file is read, not mapped: through a mapping all its pages would count as this process's memory.
    """
    size = math.prod(tensor.shape)
    with file.open("rb") as stream:
        stream.seek(tensor.start)
        for first in range(0, size, _CHUNK):
            numbers = np.fromfile(stream, _TYPES[tensor.dtype], min(_CHUNK, size - first))
            if tensor.dtype == "BF16":  # the upper half of a float32
                numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
            yield first, numbers


def refused(file: Path, found: str, expected: str) -> BundleError:
    """Return the error about a file of a bundle."""
    return BundleError(
        f"{file} {found}", expected, "export the bundle again, or copy it again from where it was written"
    )
