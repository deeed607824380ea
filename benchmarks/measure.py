"""Facts that every benchmark records: hardware, versions, peak memory, matrix-product rate of the machine, command.

Benchmarks run from the checkout's root as modules (``python -m benchmarks.speed.large_catalogue``), so that they can
import this one. A result is one JSON file in ``benchmarks/results/`` and one JSON line on standard output.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from missrec_t4r.errors import DataError
from missrec_t4r.io.json_files import write_json
from missrec_t4r.progress import run_as_command
from missrec_t4r.runs.run_folder import versions

__all__ = [
    "gemm_rate", "gpu_peak_mib", "hardware", "peak_mib", "report", "require_files", "reset_peak", "run_as_command",
    "versions", "write_result",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
_STARTED = datetime.datetime.now(datetime.timezone.utc).date()
"""In the names of the results: a benchmark that writes several times and runs past midnight has one file."""


def hardware() -> dict[str, Any]:
    """Return the hardware: processor, cores and threads in use, memory, GPU, load at the start."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def gemm_rate(size: int = 1024, seconds: float = 1.0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Measure the rate of square matrix products, to compute the share of a measured time that is arithmetic.

    Parameters
    ----------
    size : int
        Rows and columns.
    seconds : float
        How long to measure, after one product to warm up.

    Returns
    -------
    float
        GFLOP/s, counting a multiplication and an addition as two.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    _synchronise(device)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.mm(left, right, out=out)
        products += 1
        if products % 16 == 0:
            _synchronise(device)
    _synchronise(device)
    return 2 * size**3 * products / (time.perf_counter() - started) / 1e9


def reset_peak() -> float:
    """Reset the peak memory, where the system can (Linux), and return the memory in use now, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_mib()
    return _status("VmRSS")


def peak_mib() -> float:
    """Return the peak memory of this process since its start or the last `reset_peak`, in MiB.

    Pages of memory-mapped files that were read count as long as the system keeps them for us.
    """
    peak = _status("VmHWM")
    if peak:
        return peak
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)


def gpu_peak_mib() -> float:
    """Return the peak memory of torch on the GPU since the last `reset_peak`, in MiB; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def require_files(folder: Path, names: Iterable[str], expected: str, cure: str = "") -> None:
    """Raise a `DataError` unless the folder holds the files; for what is read long after the start."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} holds no {', '.join(missing)}", expected, cure)


def write_result(name: str, payload: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<date>-<name>.json`` with the payload, command, commit, versions and hardware; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_STARTED}-{name}.json"
    facts = {
        "benchmark": name,
        "command": _command(),
        "commit": _commit(),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(path, {**facts, **payload})
    return path


def report(name: str, payload: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write the result and print it as one JSON line."""
    path = write_result(name, payload, folder)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(json.dumps({**payload, "result": str(shown)}, default=float))


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _status(field: str) -> float:
    """Return a size of ``/proc/self/status`` in MiB; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(sizes[0]) / 1024 if sizes else 0.0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command() -> str:
    """Return the command without the machine's own paths."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"
    return shlex.join([*program.split(), *map(_without_folder, sys.argv[1:])])


def _without_folder(word: str) -> str:
    """Return a path's last part, also of ``NAME=PATH``; any other word as it is.

    Examples
    --------
    >>> _without_folder("subset=/home/me/subset"), _without_folder("/home/me/subset"), _without_folder("--jobs")
    ('subset=subset', 'subset', '--jobs')
    """
    name, separator, path = word.rpartition("=")
    return f"{name}{separator}{Path(path).name}" if Path(path).is_absolute() else word


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        completed = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:  # there is no git, as in slim containers
        return "unknown"
    return completed.stdout.strip() or "unknown"
