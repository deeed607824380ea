"""Tensors larger than memory in one safetensors file: written piece by piece, and mapped when they are read.

Processes that map the same file share its pages, and the system may drop those that nobody reads. What is looked up
here and there is mapped in small pages: a single row would otherwise bring two megabytes with it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

_NAMES = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.bool: "BOOL"}
_NAMES |= {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64
"""What vector instructions read at once."""
_MADV_RANDOM, _MADV_DONTNEED, _MADV_NOHUGEPAGE = 1, 4, 15

Shape = tuple[torch.dtype, tuple[int, ...]]


class TensorFile:
    """A safetensors file whose tensors are written in any order, a few rows at a time.

    Parameters
    ----------
    file : Path
        Written from the start; complete when the ``with`` block has written every row.
    shapes : mapping of str to (torch.dtype, tuple of int)
        Every tensor of the file, in its order.
    aligned : int
        Bytes that every tensor's place is a multiple of, which the format leaves to the writer: torch's 8-bit products
        end the process at odd addresses. ``filling.*`` lie between.
    """

    def __init__(self, file: Path, shapes: Mapping[str, Shape], aligned: int = ALIGNED) -> None:
        self._file, self._shapes = file, shapes
        self._starts: dict[str, int] = {}
        described, at = {}, 0
        for name, (dtype, shape) in shapes.items():
            size = dtype.itemsize * math.prod(shape)
            described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            self._starts[name], at = at, at + size
            if rest := -at % aligned:
                filling = {"dtype": "I8", "shape": [rest], "data_offsets": [at, at + rest]}
                described[f"filling.{name}"], at = filling, at + rest
        header = json.dumps(described).encode()
        header += b" " * (-(len(header) + 8) % ALIGNED)
        self._header, self._size = len(header).to_bytes(8, "little") + header, at

    def __enter__(self) -> TensorFile:
        self._descriptor = os.open(self._file, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        os.truncate(self._descriptor, len(self._header) + self._size)
        _write(self._descriptor, memoryview(self._header), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    def write(self, name: str, part: Tensor, row: int = 0) -> None:
        """Write some rows of a tensor, from ``row`` on; a scalar is written whole."""
        dtype, shape = self._shapes[name]
        if part.dtype != dtype or part.shape[1:] != shape[1:] or (shape and row + len(part) > shape[0]):
            raise ValueError(f"{name}: {part.dtype} {tuple(part.shape)} at {row} does not fit {dtype} {shape}")
        place = len(self._header) + self._starts[name] + row * dtype.itemsize * math.prod(shape[1:])
        raw = part.contiguous().reshape(-1).view(torch.uint8)
        _write(self._descriptor, raw.numpy().data, place)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that may be mapped themselves, without a second copy of them in memory."""
    ordered = sorted(tensors.items(), key=lambda one: -one[1].itemsize)  # so that each stands at a multiple of its own
    with TensorFile(file, {name: (one.dtype, tuple(one.shape)) for name, one in ordered}, aligned=1) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)


def look_here_and_there(tensors: Iterable[Tensor]) -> None:
    """Tell the system that rows of mapped tensors are read at random; harmless where it does not know how."""
    for tensor in tensors:
        for advice in (_MADV_RANDOM, _MADV_NOHUGEPAGE):
            _advise(tensor, advice)


class StoredRows:
    """Rows of a tensor read from its file, for look-ups of a few: mapping one would bring all of its neighbours.

    Parameters
    ----------
    file : Path
        A safetensors file.
    name : str
        A matrix of float32 in it.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._stream = file.open("rb")
        length = int.from_bytes(self._stream.read(8), "little")
        entry = json.loads(self._stream.read(length))[name]
        self._start, self.width = 8 + length + entry["data_offsets"][0], int(entry["shape"][1])

    def take(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (any shape) of the matrix, [..., width]."""
        wanted, size = rows.flatten().tolist(), 4 * self.width
        taken = torch.empty(len(wanted), self.width)
        target, descriptor = taken.view(torch.uint8).flatten().numpy().data, self._stream.fileno()
        for line, row in enumerate(wanted):
            os.preadv(descriptor, [target[line * size : (line + 1) * size]], self._start + row * size)
        return taken.view(*rows.shape, self.width)


class Lent:
    """Tensors mapped from files whose pages go back after some look-ups; those that are not mapped are left alone.

    Parameters
    ----------
    tensors : iterable of Tensor
    every : int
        Look-ups after which they go back.
    """

    def __init__(self, tensors: Iterable[Tensor], every: int) -> None:
        self._tensors, self._every, self._used = _mapped(tensors), every, 0

    def used(self, times: int) -> None:
        """Say that so many look-ups were made."""
        self._used += times
        if self._tensors and self._used >= self._every:
            self._used = 0
            for tensor in self._tensors:
                _advise(tensor, _MADV_DONTNEED)


def let_go(tensors: Iterable[Tensor]) -> None:
    """Give back the pages of tensors that are mapped from a file and unchanged; they are read again when needed."""
    for tensor in _mapped(tensors):
        _advise(tensor, _MADV_DONTNEED)


def _mapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    try:
        regions = _unchanged_regions()
    except OSError:  # no /proc: nothing is given back
        return []
    spans = [(one, one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors]
    return [one for one, start, end in spans if any(first <= start and end <= last for first, last in regions)]


def _unchanged_regions() -> list[tuple[int, int]]:
    """Return where files are mapped of which no page was written to: what is given back there is not lost."""
    regions: list[tuple[int, int]] = []
    mapped = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            first, last = (int(one, 16) for one in words[0].split("-"))
            mapped = (first, last) if words[4] != "0" else (0, 0)
        elif words[0] == "Anonymous:" and words[1] == "0" and mapped != (0, 0):
            joins = regions and regions[-1][1] == mapped[0]  # advice cuts a mapping into several
            regions.append((regions.pop()[0] if joins else mapped[0], mapped[1]))
    return regions


def _advise(tensor: Tensor, advice: int) -> None:
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def not_finite(file: Path, names: Iterable[str]) -> tuple[str, int] | None:
    """Return the first float32 tensor and row of a safetensors file that holds NaN or infinity, read in pieces."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name in names:
            n_rows, width = header[name]["shape"]
            stream.seek(8 + length + header[name]["data_offsets"][0])
            at_once = max((1 << 22) // max(width, 1), 1)
            for row in range(0, n_rows, at_once):
                rows = min(at_once, n_rows - row)
                part = np.frombuffer(stream.read(4 * rows * width), np.float32).reshape(rows, width)
                finite = np.isfinite(part).all(1)
                if not finite.all():
                    return name, row + int(np.argmin(finite))
    return None


def _write(descriptor: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written
