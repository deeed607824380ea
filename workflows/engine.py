"""Where the work is done: Dask threads, Dask processes on this machine, or a Dask cluster that runs already.

Tasks are functions of small arguments that read and write files; they return small answers. A task whose worker died
is run again elsewhere; a task that had finished finds its own result and returns it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import dask

from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.progress import Progress

_RETRIES = 3


class Engine(Protocol):
    """What runs tasks."""

    @property
    def workers(self) -> int:
        """Return how many tasks run at a time."""

    def run(
        self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], progress: Progress, description: str
    ) -> list[Any]:
        """Return the answers in the order of the arguments."""


class Threads:
    """Dask's threads in this process; numpy and Arrow let go of the interpreter while they work."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(
        self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], progress: Progress, description: str
    ) -> list[Any]:
        """Run a handful at a time, so that the progress shows and little work is lost."""
        answers: list[Any] = []
        step = 2 * self.workers
        groups = [arguments[start : start + step] for start in range(0, len(arguments), step)]
        for group in progress.track(groups, description):
            delayed = [dask.delayed(task, pure=False)(*given) for given in group]
            answers += dask.compute(*delayed, scheduler="threads", num_workers=self.workers)
        return answers


class Cluster:
    """Workers of dask.distributed, here or elsewhere; they must see the same files."""

    def __init__(self, client: Any) -> None:
        self.client = client

    @property
    def workers(self) -> int:
        """Return the number of threads of all workers."""
        return max(sum(self.client.nthreads().values()), 1)

    def run(
        self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], progress: Progress, description: str
    ) -> list[Any]:
        """Submit all; the scheduler repeats what a dead worker had."""
        from distributed import as_completed

        futures = [self.client.submit(task, *given, pure=False, retries=_RETRIES) for given in arguments]
        for _ in progress.track(as_completed(futures, loop=self.client.loop), description, len(futures)):
            continue
        answers: list[Any] = self.client.gather(futures)
        return answers


@contextmanager
def engine(where: str = "threads", workers: int | None = None) -> Iterator[Engine]:
    """Yield the engine that ``--dask-scheduler`` names, and stop what was started for it.

    Parameters
    ----------
    where : str
        ``threads``, ``processes`` (a ``LocalCluster``), or the address of a scheduler, ``tcp://host:8786``.
    workers : int, optional
        Threads or processes; by default the cores of this machine. A running cluster has its own number.

    Raises
    ------
    ConfigError
        Neither a name nor an address.
    DataError
        The scheduler does not answer.
    """
    count = workers or len(os.sched_getaffinity(0))
    if where == "threads":
        yield Threads(count)
    elif where == "processes":
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None, scheduler_port=0) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield Cluster(client)
    elif "://" in where:
        with _connected(where) as client:
            yield Cluster(client)
    else:
        raise ConfigError(f"--dask-scheduler {where!r}", "threads, processes or tcp://host:port")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(address, set_as_default=False, timeout="5s")
    except (OSError, ValueError) as error:
        raise DataError(
            f"no Dask scheduler answers at {address} ({error})",
            "a running one",
            "start one with `dask scheduler` and workers with `dask worker`, or leave --dask-scheduler out",
        ) from error
    with client:
        yield client
