"""Memory of the device that a training runs on: what there is, the most that was used so far, and when it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import clear_frames

import torch

from missrec_t4r.errors import ConfigError

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which a container finds its limit, of versions 2 and 1."""

_CURE = "double train.accumulate, which keeps the batch, halve train.batch_size, or set train.softmax=chunked"


class TooLargeError(ConfigError):
    """A training that a GPU has no memory for."""


def total_memory(device: torch.device) -> int:
    """Return the bytes of a GPU, or those that this process may use on a CPU: the machine's or the container's limit.

    Used memory does not count, so that the same machine gives the same number whatever else runs on it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        text = Path(name).read_text(encoding="ascii").strip() if Path(name).is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use so far: the tensors of a GPU, or the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release_freed_memory() -> None:
    """Give memory that is free inside this process back to the system, where its C library is glibc.

    Steps of many lengths leave holes in its heap: on MovieLens 1M a process had grown to 3.7 GB after 26 epochs.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def translate_out_of_memory(cure: str = _CURE) -> Iterator[None]:
    """Raise `TooLargeError` where a GPU has no memory left, and free what failed steps held of it.

    Parameters
    ----------
    cure : str
        Which settings of the trainer need less.

    Raises
    ------
    TooLargeError
        Says how much was asked for, and which settings need less.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        clear_frames(error.__traceback__)
        message = str(error).strip().splitlines() or ["no memory left"]
        raise TooLargeError(
            f"a training that does not fit into the GPU's memory ({message[0][:300]})",
            "smaller steps, or a GPU that no other process uses",
            f"{cure}; add --restart if the run folder holds a checkpoint of other settings",
        ) from error
