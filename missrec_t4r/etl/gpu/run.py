"""Run ``missrec etl`` on one or several GPUs: at once, or in as many partitions of the users as the memory demands."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from nvtabular import Workflow

from missrec_t4r.errors import DataError
from missrec_t4r.etl import inputs, outputs, splits
from missrec_t4r.etl.dataframe import Frame
from missrec_t4r.etl.engine.executor import Executor, open_executor
from missrec_t4r.etl.engine.workdir import working_folder
from missrec_t4r.etl.gpu import partitions as parts
from missrec_t4r.etl.gpu import read, tasks
from missrec_t4r.etl.gpu.device import CudfDevice
from missrec_t4r.etl.nvt import workflows
from missrec_t4r.etl.nvt.data_folder import Whole, write_folder, write_whole
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import parquet_rows
from missrec_t4r.etl.task import Task
from missrec_t4r.schema import TIMESTAMP, USER_ID

log = logging.getLogger(__name__)


def run_on_gpu(
    task: Task,
    out: Path,
    device: CudfDevice,
    machines: tuple[str, int | None],
    partitions: int | None,
    *,
    may_go_on: bool,
) -> dict[str, Any] | None:
    """Build the data folder on one or several GPUs; return its report, or None if the CPU has to do it.

    Parameters
    ----------
    task : Task
    out : Path
        Data folder.
    device : CudfDevice
        GPU of this process.
    machines : (str, int or None)
        Scheduler and workers, as in `engine.executor.open_executor`.
    partitions : int, optional
        Of the events; by default as many as the memory demands, one without any.
    may_go_on : bool
        Whether the out-of-core engine of the CPU may take over.

    Raises
    ------
    DataError
        The memory of the GPU does not suffice or the CPU has to read the events, and no other engine may take over.
    """
    settings, rows = dict(task.settings), parquet_rows(task.files)
    other = "--engine disk" if task.workflow is None else "--engine memory"  # out of core, no workflow file is run
    with open_executor(*machines, gpu=True) as executor:
        several = machines[0] != "threads"
        count = partitions or _partitions_that_fit(task, rows, executor, device, several=several)
        while True:
            try:
                if count == 1 and not several:
                    return _run_at_once(task, out, device)
                return _run_in_partitions(task, out, count, executor)
            except MemoryError as error:
                reason = str(error) or "MemoryError"
            except read.NotPlainError as error:
                if not may_go_on:
                    raise DataError(
                        f"{error}, and only the CPU reads that",
                        "plain parquet where events are processed on a GPU in partitions",
                        f"add {other}",
                    ) from error
                log.info(f"{error}: on the CPU, out of core")
                task.findings.found, task.settings = [], settings
                return None
            gc.collect()  # the error's frames and the error refer to each other: they would keep what filled the memory
            task.findings.found, task.settings = [], dict(settings)
            if partitions is not None or rows // (2 * count) < parts.FEWEST_EVENTS:
                break
            count *= 2
            log.warning(f"the memory of the GPU does not suffice ({reason}): beginning again in {count} partitions")
    if may_go_on:
        log.warning(f"the memory of the GPU does not suffice ({reason}): the CPU begins again, out of core")
        return None
    raise DataError(
        f"the memory of the GPU does not suffice ({reason})",
        "a GPU that holds a partition of the events several times",
        f"add {other}, which works on the CPU",
    )


def _partitions_that_fit(task: Task, rows: int, executor: Executor, device: CudfDevice, *, several: bool) -> int:
    """Return the number of partitions that the memory of the GPUs demands, and one per GPU at least."""
    if not rows:  # no parquet: the CPU reads it
        return 1
    free = executor.run(tasks.free_memory, [()], "asking for memory")[0] if several else device.free_memory()
    count = parts.partitions_that_fit(task.files, free)
    return max(count, executor.workers) if several else count


def _run_at_once(task: Task, out: Path, device: CudfDevice) -> dict[str, Any]:
    """Build the data folder on all events in one frame; return its report."""
    log.info("reading the tables")
    events, items = _read(task, device)
    return write_whole(task, out, events, items, lambda frame: _WholeOnDevice(frame, task.settings, device))


class _WholeOnDevice(Whole):
    """All clean events in one frame of the GPU."""

    def __init__(self, events: Frame, settings: dict[str, Any], device: CudfDevice) -> None:
        super().__init__(events, settings)
        self.device = device

    def write(self, workflow: Workflow, folder: Path, n_rows: int) -> outputs.Written:
        """Write the rows of every split."""
        times, device = self.events[TIMESTAMP], self.device
        splits.set_boundaries(self.settings, lambda: device.array(times), device.xp)
        sessions = workflows.transform_dataset(workflow, self.events, 1, USER_ID)
        return tasks.write_rows(device, sessions, self.settings, folder, n_rows)


def _read(task: Task, device: CudfDevice) -> tuple[inputs.Events, pa.Table]:
    """Return the complete events, read on the GPU where it understands them, and the item table, with normal types."""
    event_findings, item_findings = checks.Findings(), checks.Findings()
    items = inputs.read_items(task.items, task.settings["catalogue_item_column"], item_findings)
    try:
        columns = read.plan_columns(task, items, event_findings)
        events = read.read_events(device, task.files, columns, event_findings)
    except read.NotPlainError as reason:
        log.info(f"{reason}: the CPU reads the events")
        return inputs.read_tables(task, device)
    task.findings.found += event_findings.found + item_findings.found
    return events, inputs.with_normal_ids(items)


def _run_in_partitions(task: Task, out: Path, partitions: int, executor: Executor) -> dict[str, Any]:
    """Build the data folder on partitions of the users, one at a time on each GPU; return its report."""
    with working_folder(out) as (work, finish):
        summary, events = parts.prepare(task, work, partitions, executor)
        report = write_folder(summary, events, task, events.folder)
        finish(events.folder)
    return report
