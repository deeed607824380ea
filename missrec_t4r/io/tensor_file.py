"""Safetensors files larger than memory: written a few rows at a time, read memory-mapped or row by row.

Processes that map the same file share its pages, and the system may drop pages that are not read. Tensors that are read
at random rows are mapped in small pages: with transparent huge pages one row would load two megabytes.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from missrec_t4r.io.tensor_checks import read_header

_NAMES = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.bool: "BOOL"}
_NAMES |= {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64
"""Alignment of tensors in bytes: the width of a vector register."""
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
        Every tensor starts at a multiple of so many bytes, with tensors ``filling.*`` as padding. The format leaves
        alignment to the writer; torch's 8-bit matrix products crash at odd addresses.
    """

    def __init__(self, file: Path, shapes: Mapping[str, Shape], aligned: int = ALIGNED) -> None:
        self._file, self._shapes = file, shapes
        self._starts: dict[str, int] = {}
        entries, offset = {}, 0
        for name, (dtype, shape) in shapes.items():
            size = dtype.itemsize * math.prod(shape)
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._starts[name], offset = offset, offset + size
            if rest := -offset % aligned:
                filling = {"dtype": "I8", "shape": [rest], "data_offsets": [offset, offset + rest]}
                entries[f"filling.{name}"], offset = filling, offset + rest
        header = json.dumps(entries).encode()
        header += b" " * (-(len(header) + 8) % ALIGNED)
        self._header, self._size = len(header).to_bytes(8, "little") + header, offset

    def __enter__(self) -> TensorFile:
        self._stream = self._file.open("wb")
        self._stream.write(self._header)
        self._stream.truncate(len(self._header) + self._size)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()

    def write(self, name: str, part: Tensor, row: int = 0) -> None:
        """Write some rows of a tensor, from ``row`` on; a scalar is written whole."""
        dtype, shape = self._shapes[name]
        if part.dtype != dtype or part.shape[1:] != shape[1:] or (shape and row + len(part) > shape[0]):
            raise ValueError(f"{name}: {part.dtype} {tuple(part.shape)} at {row} does not fit {dtype} {shape}")
        self._stream.seek(len(self._header) + self._starts[name] + row * dtype.itemsize * math.prod(shape[1:]))
        self._stream.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, memory-mapped ones among them, without a copy in memory."""
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].itemsize)  # aligns each to its own item size
    with TensorFile(file, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered}, aligned=1) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)


def advise_random_access(tensors: Iterable[Tensor]) -> None:
    """Advise the system (``madvise``) that rows of mapped tensors are read at random; no effect where unsupported."""
    for tensor in tensors:
        for advice in (_MADV_RANDOM, _MADV_NOHUGEPAGE):
            _advise(tensor, advice)


class StoredRows:
    """Rows of a tensor read from its file, for look-ups of a few rows: a mapped page holds many rows besides.

    Parameters
    ----------
    file : Path
        A safetensors file.
    name : str
        A matrix of float32 in it.
    """

    def __init__(self, file: Path, name: str) -> None:
        tensor = read_header(file)[name]
        self._stream, self._start, self.width = file.open("rb"), tensor.start, tensor.shape[1]

    def take(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (any shape) of the matrix, [..., width]."""
        indices, size = rows.flatten().tolist(), 4 * self.width  # bytes of a float32 row
        values = torch.empty(len(indices), self.width)
        buffer, descriptor = values.view(torch.uint8).flatten().numpy().data, self._stream.fileno()
        for index, row in enumerate(indices):
            os.preadv(descriptor, [buffer[index * size : (index + 1) * size]], self._start + row * size)
        return values.view(*rows.shape, self.width)


class PeriodicPageRelease:
    """Releases the pages of file-mapped tensors after every so many look-ups, so that memory does not grow with use.

    Parameters
    ----------
    tensors : iterable of Tensor
        Those that are not mapped from a file, or were written to, are ignored.
    every : int
        Look-ups between two releases.
    """

    def __init__(self, tensors: Iterable[Tensor], every: int) -> None:
        self._tensors, self._every, self._lookups = _unchanged_mapped(tensors), every, 0

    def count(self, lookups: int) -> None:
        """Count look-ups; release the pages when enough were made."""
        self._lookups += lookups
        if self._tensors and self._lookups >= self._every:
            self._lookups = 0
            for tensor in self._tensors:
                _advise(tensor, _MADV_DONTNEED)


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Release the pages of tensors that are mapped from a file and unchanged; the next access reads them again."""
    for tensor in _unchanged_mapped(tensors):
        _advise(tensor, _MADV_DONTNEED)


def _unchanged_mapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    try:
        regions = _unchanged_regions()
    except OSError:  # no /proc on this system: no page is released
        return []
    spans = [(tensor, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
    return [tensor for tensor, start, end in spans if any(first <= start and end <= last for first, last in regions)]


def _unchanged_regions() -> list[tuple[int, int]]:
    """Return the address ranges of file mappings without a written page: releasing those loses nothing."""
    regions: list[tuple[int, int]] = []
    mapped = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the header of a mapping: address range, flags, offset, device, inode, path
            first, last = (int(address, 16) for address in words[0].split("-"))
            mapped = (first, last) if words[4] != "0" else (0, 0)  # inode 0: not a file
        elif words[0] == "Anonymous:" and words[1] == "0" and mapped != (0, 0):
            joins = regions and regions[-1][1] == mapped[0]  # madvise splits a mapping into several
            regions.append((regions.pop()[0] if joins else mapped[0], mapped[1]))
    return regions


def _advise(tensor: Tensor, advice: int) -> None:
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
