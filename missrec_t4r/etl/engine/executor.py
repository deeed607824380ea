"""Execution of tasks: threads of this process, Dask processes on this machine, or workers of a running Dask cluster.

Tasks are functions of small arguments that read and write files and return small results. A task whose worker died is
run again on another worker; a task that had finished finds its result file and returns it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.progress import track

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 20.0
"""Seconds within which a scheduler must answer."""
WORKER_TIMEOUT = 30.0
"""Seconds without a worker before a run stops; a cluster manager may be restarting workers."""
_HUSH_TIMEOUT = 5.0
"""Seconds in which workers answer before they are stopped."""
_SAME_PRESS = 1.0
"""Seconds between two Ctrl-C of one held key: keyboards repeat after at most .7 seconds, then faster."""
_RETRIES = 3


class WorkerError(DataError):
    """Workers failed, not the input: with others the same command continues."""


class ThreadExecutor:
    """Threads of this process; NumPy and Arrow release the interpreter lock while they compute."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], description: str) -> list[Any]:
        """Return the results in the order of the arguments; after an error no further task is started."""
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(task, *values) for values in arguments]
            try:
                return [future.result() for future in track(futures, description)]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class ClusterExecutor:
    """Workers of dask.distributed on this machine or others, which must see the same files; ``client``: connected."""

    def __init__(self, client: Any) -> None:
        self.client = client

    @property
    def workers(self) -> int:
        """Return the number of threads of all workers."""
        return max(sum(self.client.nthreads().values()), 1)

    def run(self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], description: str) -> list[Any]:
        """Submit all tasks; the scheduler repeats those of a dead worker. After an error no further one is started.

        Raises
        ------
        WorkerError
            No worker is left, one task killed several workers, or workers lack the files or this package.
        """
        futures = [self.client.submit(task, *values, pure=False, retries=_RETRIES) for values in arguments]
        try:
            with _translate_cluster_errors():
                for future in track(self._completed(futures), description, len(futures)):
                    if future.status == "error":
                        future.result()  # raises it
                results: list[Any] = self.client.gather(futures)
        except BaseException:
            with suppress(Exception):  # of a scheduler that is gone
                self.client.cancel(futures)
            raise
        return results

    def _completed(self, futures: Sequence[Any]) -> Iterator[Any]:
        """Yield futures as they complete; stop with an error when no worker is left."""
        from distributed import TimeoutError as DaskTimeout
        from distributed import wait

        pending = set(futures)
        while pending:
            try:
                with self.client.as_current():
                    done, pending = wait(pending, timeout=WORKER_TIMEOUT, return_when="FIRST_COMPLETED")
            except DaskTimeout:
                if not self.client.nthreads():
                    raise _no_worker(f"no worker was left for {WORKER_TIMEOUT:g} seconds") from None
                continue
            yield from done


Executor = ThreadExecutor | ClusterExecutor


@contextmanager
def open_executor(scheduler: str = "threads", workers: int | None = None, *, gpu: bool = False) -> Iterator[Executor]:
    """Yield the executor that ``--dask-scheduler`` names, and stop what was started for it.

    Parameters
    ----------
    scheduler : str
        ``threads``, ``processes`` (a ``LocalCluster``), or the address of a scheduler, ``tcp://host:8786``.
    workers : int, optional
        Threads or processes; by default one per core of this machine. A running cluster has its own number.
    gpu : bool
        One task at a time on each GPU: ``threads`` are a single one, ``processes`` one per GPU (dask-cuda's
        ``LocalCUDACluster``) or ``workers`` of them.

    Raises
    ------
    ConfigError
        ``scheduler`` is neither a name nor an address, ``workers`` is above the number of GPUs, or dask-cuda is not
        installed.
    DataError
        The scheduler does not answer, or has no worker.
    """
    count = workers or len(os.sched_getaffinity(0))
    if scheduler == "threads":
        if gpu and (workers or 1) > 1:
            log.info(f"--workers {workers} has no effect: threads use one GPU; --dask-scheduler processes uses all")
        yield ThreadExecutor(1 if gpu else count)
    elif scheduler == "processes":
        from distributed import Client, LocalCluster

        options: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": None, "scheduler_port": 0}
        with ExitStack() as stack:
            stack.callback(_hush, logging.getLogger("distributed").level)  # back to what it was
            stack.enter_context(_interrupted_once())
            try:
                with _not_interrupted():
                    cluster = _cuda_cluster(workers, **options) if gpu else LocalCluster(count, **options)
                    client = stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False))
                yield ClusterExecutor(client)
            except KeyboardInterrupt:
                _hush()
                with suppress(Exception):  # of workers that are gone, or do not answer in time
                    client.sync(client._run, _hush, callback_timeout=_HUSH_TIMEOUT)  # `Client.run` waits for ever
                raise
    elif "://" in scheduler:
        with _connect(scheduler) as client:
            yield ClusterExecutor(client)
    else:
        raise ConfigError(f"--dask-scheduler {scheduler!r}", "threads, processes or tcp://host:port")


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Keep Ctrl-C from the threads and processes that start in the block; this thread gets it at the end of the block.

    A terminal sends it to every process of a command, and the one that started the others stops them.
    """
    resource_tracker.ensure_running()  # where that is left to the block, it takes the mask away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Take Ctrl-C that comes again within `_SAME_PRESS` for the same one: its key is held, or bounced.

    Processes are being stopped by then. Pressed again it ends that as well, with Dask's traceback.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[float] = []

    def interrupt(*_: object) -> None:
        pressed.append(time.monotonic())
        if len(pressed) == 1:
            log.warning("interrupted: stopping the processes; Ctrl-C again waits for none of them")
        if len(pressed) == 1 or pressed[-1] - pressed[-2] > _SAME_PRESS:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hush(level: int = logging.CRITICAL) -> None:
    """Keep dask.distributed from warning of workers that are stopped in the middle of a task."""
    logging.getLogger("distributed").setLevel(level)


def _cuda_cluster(workers: int | None, **options: Any) -> Any:
    try:
        start = importlib.import_module("dask_cuda").LocalCUDACluster
    except ImportError as error:
        raise ConfigError(
            f"--engine gpu with --dask-scheduler processes, and dask-cuda does not import ({error})",
            "dask-cuda 24.12, which starts a process per GPU",
            "pip install dask-cuda==24.12.0, or leave --dask-scheduler out for one GPU",
        ) from error
    try:
        return start(n_workers=workers, **options)
    except ValueError as error:  # "Can not scale beyond visible devices"
        raise ConfigError(
            f"--workers {workers} with --dask-scheduler processes on GPUs ({error})",
            "at most one process per GPU",
            "leave --workers out for one per GPU that CUDA_VISIBLE_DEVICES names",
        ) from error


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Yield a client of a running cluster that has a worker."""
    from distributed import Client
    from distributed import TimeoutError as DaskTimeout

    try:
        client = Client(address, set_as_default=False, timeout=CONNECT_TIMEOUT)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no Dask scheduler answers at {address} ({error})",
            "a running one",
            "start one with `dask scheduler` and workers with `dask worker`, or leave --dask-scheduler out",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKER_TIMEOUT)
        except DaskTimeout:
            raise _no_worker(f"no worker came within {WORKER_TIMEOUT:g} seconds") from None
        yield client


def _no_worker(found: str) -> WorkerError:
    return WorkerError(
        f"{found} at the Dask scheduler",
        "at least one worker",
        "start some with `dask worker`, then run the same command again: it continues",
    )


@contextmanager
def _translate_cluster_errors() -> Iterator[None]:
    """Explain failures of workers: killed, without the files, without the package."""
    from distributed import KilledWorker

    try:
        yield
    except KilledWorker as error:
        raise WorkerError(
            f"several workers died on the same task ({error})",
            "workers with memory for a partition",
            "give them more, and the same command continues; or begin again with more --partitions",
        ) from error
    except FileNotFoundError as error:
        raise WorkerError(
            f"a worker does not find {error.filename}",
            "workers that see input and output under the same paths as this machine",
            "mount the same folder there, or use --dask-scheduler processes",
        ) from error
    except ModuleNotFoundError as error:
        raise WorkerError(
            f"a worker lacks the package {error.name}", "the same installation as here", "install it on the workers"
        ) from error
