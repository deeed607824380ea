"""The part ``etl`` of `gpu_check.py`, which runs without torch: in an environment with cuDF that has nothing else.

    python -m benchmarks.gpu_etl --record FILE [--tiny]

What is found is added to FILE, line by line.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed.etl import generate, sessions_of


class Sizes(NamedTuple):
    """What is measured, by default and with ``--tiny``."""

    events: Sequence[int]
    tables: Sequence[int]
    users: int
    """Of the sessions of MovieLens' shape."""
    items: Sequence[int]
    """Of the served catalogues: a bundle of a million is not written and read four times in the time of the part."""
    seconds: float
    """Of one latency measurement."""


FULL = Sizes((10_000_000, 40_000_000, 100_000_000), (1_000_000, 10_000_000), 6040, (4_000, 200_000), 4.0)
POOL = 4 << 30
"""Bytes of GPU memory for the largest number of events, measured once more."""
TINY = Sizes((2_000,), (2_000,), 30, (100,), 0.1)


class Record:
    """A part's findings, written line by line, so that they outlive the process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, **found: Any) -> None:
        """Append one line."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)

    @contextmanager
    def step(self, name: str) -> Any:
        """An error within it is recorded, and what follows still runs."""
        try:
            yield
        except Exception as error:
            self.add(failed=f"{name}: {type(error).__name__}: {str(error)[:300]}{_line_of(error)}")

    def equal(self, name: str, difference: float, bound: float) -> None:
        """Record a comparison with the CPU."""
        self.add(compared=name, difference=difference, bound=bound, equal=bool(difference <= bound))


def _line_of(error: BaseException) -> str:
    """Return the package's line in which an error was raised, in brackets; empty where it was raised elsewhere."""
    line = own_line(traceback.extract_tb(error.__traceback__))
    return line and f" ({line})"


def own_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return the last line of the package among frames, ``missrec_t4r/…:123``; empty if there is none."""
    spec = importlib.util.find_spec("missrec_t4r")
    folder = str(Path(spec.origin).parent.parent) if spec is not None and spec.origin else ""
    own = [one for one in frames if one.filename.startswith(f"{folder}/missrec_t4r/")]
    return f"{own[-1].filename.removeprefix(folder + '/')}:{own[-1].lineno}" if own else ""


def etl(record: Record, sizes: Sizes, work: Path) -> None:
    """``missrec etl --engine gpu``, parquet to a whole data folder, against the out-of-core engine of the CPU.

    At once, in partitions that a pool of memory demands, and, where dask-cuda is installed, in a process per GPU.
    Without a GPU the in-memory engine of the CPU is measured in its place.
    """
    from missrec_t4r.etl.gpu import device as gpu
    from missrec_t4r.etl.pipeline import etl as run

    here = "gpu" if (why := gpu.obstacle()) is None else "memory"
    record.add(at=["etl_engine"], value=here if why is None else f"{here}: {why}")
    if importlib.util.find_spec("cudf") is not None:
        record.add(at=["rapids"], value=importlib.import_module("cudf").__version__)
    if why is not None and sizes is not TINY:
        record.add(failed=f"etl: {why}, so nothing would run on the GPU: not measured")
        return
    folder = work / "check"
    generate(2_000 if sizes is TINY else 50_000, folder)
    few = folder / "events.parquet", folder / "items.parquet"
    run(*few, work / "disk", engine="disk")
    expected = sessions_of("ours", work / "disk")

    def check(name: str, **options: Any) -> None:
        run(*few, work / "checked", engine=here, **options)
        found = sessions_of("ours", work / "checked")
        record.equal(name, float(sum(found[split] != expected[split] for split in expected)), 0.0)

    with record.step("etl/equal"):
        check("etl")
    with record.step("etl/partitions"):
        check("etl/partitions", partitions=3)
    if why is None and importlib.util.find_spec("dask_cuda") is not None:
        with record.step("etl/processes"):
            check("etl/processes", dask_scheduler="processes")
    for rows in sizes.events:
        with record.step(f"etl/{rows}"):
            generate(rows, work / "events")
            record.add(at=["etl", str(rows)], value=_seconds(work / "events", work / str(rows), here))
    if why is None:
        with record.step("etl/pool"), _pool():  # of the last, largest ones
            found = _seconds(work / "events", work / "pool", here)
            record.add(at=["etl", f"{sizes.events[-1]}/pool"], value=found)


def _seconds(events: Path, out: Path, engine: str, **options: Any) -> float:
    """Return the seconds from parquet to a whole data folder."""
    from missrec_t4r.etl.pipeline import etl as run

    started = time.perf_counter()
    run(events / "events.parquet", events / "items.parquet", out, engine=engine, **options)
    return round(time.perf_counter() - started, 3)


@contextmanager
def _pool() -> Any:
    """All memory of the GPU is RMM's pool of `POOL` bytes."""
    rmm = importlib.import_module("rmm")
    rmm.reinitialize(pool_allocator=True, initial_pool_size=POOL, maximum_pool_size=POOL)
    try:
        yield
    finally:
        rmm.reinitialize(pool_allocator=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the part."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--record", type=Path, required=True, help="file of the findings")
    options.add_argument("--tiny", action="store_true", help="the smallest size, to see that it runs")
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        etl(Record(chosen.record), TINY if chosen.tiny else FULL, Path(work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
