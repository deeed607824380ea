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
from missrec_t4r.progress import track

_RETRIES = 3
_ANSWER = 20
"""Seconds within which a scheduler must answer."""
_PATIENCE = 30
"""Seconds without a worker before a run gives up; a scheduler may be restarting them."""


class Engine(Protocol):
    """What runs tasks."""

    @property
    def workers(self) -> int:
        """Return how many tasks run at a time."""

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], description: str) -> list[Any]:
        """Return the answers in the order of the arguments."""


class Threads:
    """Dask's threads in this process; numpy and Arrow let go of the interpreter while they work."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], description: str) -> list[Any]:
        """Run a handful at a time, so that the progress shows and little work is lost."""
        answers: list[Any] = []
        step = 2 * self.workers
        groups = [arguments[start : start + step] for start in range(0, len(arguments), step)]
        for group in track(groups, description):
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

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], description: str) -> list[Any]:
        """Submit all; the scheduler repeats what a dead worker had.

        Raises
        ------
        DataError
            No worker is left, one piece of work killed several, or workers lack the files or this package.
        """
        futures = [self.client.submit(task, *given, pure=False, retries=_RETRIES) for given in arguments]
        for _ in track(self._as_they_come(futures), description, len(futures)):
            continue
        with _translate_cluster_errors():
            answers: list[Any] = self.client.gather(futures)
        return answers

    def _as_they_come(self, futures: Sequence[Any]) -> Iterator[Any]:
        from distributed import TimeoutError as Late
        from distributed import wait

        left = set(futures)
        while left:
            try:
                with self.client.as_current():
                    done, left = wait(left, timeout=_PATIENCE, return_when="FIRST_COMPLETED")
            except Late:
                if not self.client.nthreads():
                    raise _alone(f"no worker was left for {_PATIENCE} seconds") from None
                continue
            yield from done


def _alone(found: str) -> DataError:
    return DataError(
        f"{found} at the Dask scheduler",
        "at least one worker",
        "start some with `dask worker`, then run the same command again: it continues",
    )


@contextmanager
def _translate_cluster_errors() -> Iterator[None]:
    """Say what a failure in a worker means."""
    from distributed import KilledWorker

    try:
        yield
    except KilledWorker as error:
        raise DataError(
            f"workers died over and over on one piece of work ({error})",
            "workers with memory for a partition",
            "give them more, or more --partitions; then the same command continues",
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"a worker does not find {error.filename}",
            "workers that see input and output under the same paths as this machine",
            "mount the same folder there, or use --dask-scheduler processes",
        ) from error
    except ModuleNotFoundError as error:
        raise DataError(
            f"a worker lacks the package {error.name}", "the same installation as here", "install it on the workers"
        ) from error


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
        The scheduler does not answer, or has no worker.
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
            _require_workers(client)
            yield Cluster(client)
    else:
        raise ConfigError(f"--dask-scheduler {where!r}", "threads, processes or tcp://host:port")


def _require_workers(client: Any) -> None:
    from distributed import TimeoutError as Late

    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except Late:
        raise _alone(f"no worker came within {_PATIENCE} seconds") from None


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(address, set_as_default=False, timeout=_ANSWER)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no Dask scheduler answers at {address} ({error})",
            "a running one",
            "start one with `dask scheduler` and workers with `dask worker`, or leave --dask-scheduler out",
        ) from error
    with client:
        yield client
