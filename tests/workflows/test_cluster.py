"""A Dask cluster of real processes behind ``--dask-scheduler tcp://…``: a worker dies, the result is the same."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.errors import DataError
from missrec_t4r.etl.engine import executor, shuffle
from tests.workflows.tables import ITEMS, write

SLOWLY = """
import os, time
from pathlib import Path
from typing import Any
from missrec_t4r.etl.engine import sessionize, shuffle

for module, name in ((shuffle, "shuffle_chunk"), (sessionize, "group_by_user"), (sessionize, "write_splits")):
    def slow(work, index, task=getattr(module, name)):
        with open(Path({seen!r}), "a") as file:
            file.write(f"{{os.getpid()}} {{task.__name__}} {{index}}\\n")
        time.sleep(0.1)
        return task(work, index)
    slow.__module__, slow.__qualname__ = module.__name__, name
    setattr(module, name, slow)
"""
"""Loaded by the workers: every task says that it began, and takes its time."""


def _until(wanted: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not wanted():
        assert time.monotonic() < deadline, f"{what} took two minutes"
        time.sleep(0.02)


@contextmanager
def cluster(
    folder: Path, workers: int, preload: str | None = None
) -> Iterator[tuple[str, dict[int, subprocess.Popen[bytes]]]]:
    """Yield the address of a scheduler and its workers by process number; all are gone afterwards."""
    (folder / "slowly.py").write_text(preload or SLOWLY.format(seen=str(folder / "seen")))
    where, dask = folder / "scheduler.json", [sys.executable, "-W", "ignore", "-m", "dask"]
    where.unlink(missing_ok=True)
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    place = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    started = [subprocess.Popen([*dask, "scheduler", *place, "--scheduler-file", str(where)], **silent)]
    try:
        _until(where.is_file, "the scheduler")
        address = json.loads(where.read_text())["address"]
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--preload", str(folder / "slowly.py")]
        started += [subprocess.Popen([*dask, "worker", address, *options], **silent) for _ in range(workers)]
        yield address, {worker.pid: worker for worker in started[1:]}
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["shuffle_chunk", "write_splits"])
def test_a_worker_killed_in_the_middle_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(shuffle, "BATCH_ROWS", 400)
    chance = np.random.default_rng(3)
    events = pd.DataFrame(
        {
            "user_id": chance.integers(0, 200, 4000),
            "item_id": chance.choice([*ITEMS.item_id, "rug"], 4000),
            "timestamp": chance.integers(0, 10**6, 4000),
            "event_type": chance.choice(["view", "cart"], 4000),
        }
    )
    file, items = write(tmp_path / "raw", events)
    pq.write_table(pa.Table.from_pandas(events), file, row_group_size=200)
    arguments = ["etl", "--interactions", str(file), "--items", str(items), "--engine", "disk", "--partitions", "8"]

    def run(out: str, *options: str) -> None:
        ran = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / out), *options])
        assert ran.exit_code == 0, ran.output
        (answer,) = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        assert answer["events"] == 4000

    run("threads", "--workers", "1")
    seen = tmp_path / "seen"
    with cluster(tmp_path, 2) as (address, workers):
        killed: list[int] = []

        def kill() -> None:
            def busy() -> list[int]:
                lines = [line.split() for line in seen.read_text().splitlines()] if seen.is_file() else []
                return [int(pid) for pid, name, _ in lines if name == task]

            _until(lambda: len(set(busy())) == 2 and len(busy()) >= 4, "the beginning")
            killed.append(busy()[-1])
            os.kill(killed[0], signal.SIGKILL)

        with Client(address, set_as_default=False, timeout=60) as client:
            client.wait_for_workers(2, timeout=120)
        killer = threading.Thread(target=kill)
        killer.start()
        run("cluster", "--dask-scheduler", address)
        killer.join()
        assert workers[killed[0]].wait() == -signal.SIGKILL
        begun = [tuple(line.split()) for line in seen.read_text().splitlines()]
        survivor = next(str(pid) for pid in workers if pid != killed[0])
        last = next(index for pid, name, index in reversed(begun) if (pid, name) == (str(killed[0]), task))
        assert (survivor, task, last) in begun  # what the dead worker had begun was begun again
    for split in ("train", "valid", "test"):
        parts = [sorted((tmp_path / out / split).glob("*.parquet")) for out in ("threads", "cluster")]
        assert [part.name for part in parts[0]] == [part.name for part in parts[1]]
        for one, other in zip(*parts, strict=True):
            assert pq.read_table(one).equals(pq.read_table(other))


@pytest.mark.slow
def test_a_cluster_that_cannot_work_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a worker, with workers that see other files, and with a piece of work that kills every worker."""
    words = "no worker came within 2 seconds.*dask worker"
    monkeypatch.setattr(executor, "WORKER_TIMEOUT", 2)
    with (
        cluster(tmp_path, 0) as (address, _),
        pytest.raises(DataError, match=words),
        executor.open_executor(address),
    ):
        pass
    monkeypatch.setattr(executor, "WORKER_TIMEOUT", 60)
    with cluster(tmp_path, 1) as (address, workers), executor.open_executor(address) as machines:
        with pytest.raises(DataError, match="a worker does not find /nowhere/here"):
            machines.run(open, [("/nowhere/here",)], "")
        with pytest.raises(DataError, match="a worker lacks the package"):
            machines.run(importlib.import_module, [("no_such_package",)], "")
        monkeypatch.setattr(executor, "WORKER_TIMEOUT", 2)
        with pytest.raises(executor.WorkerError, match="no worker was left for 2 seconds"):
            machines.run(os.kill, [(next(iter(workers)), signal.SIGKILL)], "")
