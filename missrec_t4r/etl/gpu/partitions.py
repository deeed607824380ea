"""Events that exceed the memory of a GPU, or several GPUs: partitions of the users, one at a time on each.

`prepare` shuffles the events to partitions and puts together what all have in common: findings, the items of the
catalogue, the values of categories. `Partitioned` then fits the workflow and writes the splits, partition by partition
(`tasks.py`), so that the folder is that of the engine in memory but for the order of its rows.

The number of partitions follows from the memory of the GPU, or from a limit that RMM was given. It is a guess of how
much the steps need: where it was too low, the run begins again with twice as many (`run.run_on_gpu`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from nvtabular import Workflow

from missrec_t4r.errors import DataError
from missrec_t4r.etl import item_table, splits
from missrec_t4r.etl.engine.executor import Executor
from missrec_t4r.etl.engine.job import MAX_PARTITIONS
from missrec_t4r.etl.engine.reduce import keep_frequent
from missrec_t4r.etl.engine.shuffle import cut_chunks
from missrec_t4r.etl.engine.workdir import OUTPUT_FOLDER, SPLIT_FOLDER, open_planned_job, partition_path, write_item_ids
from missrec_t4r.etl.event_settings import first_with_events
from missrec_t4r.etl.gpu import tasks
from missrec_t4r.etl.gpu.read import Columns, Seen, all_seen, plan_columns, refuse_number_texts
from missrec_t4r.etl.inputs import Summary, read_items, with_normal_ids
from missrec_t4r.etl.nvt import workflows
from missrec_t4r.etl.nvt.serialization import save_workflow
from missrec_t4r.etl.nvt.workflow_file import EventColumns, WorkflowFile
from missrec_t4r.etl.outputs import Written
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.task import Task
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID

log = logging.getLogger(__name__)

COPIES = 12
"""How often the columns of the events are in memory at the peak of a step: assumed, not measured."""
FEWEST_EVENTS = 100_000
"""Smaller partitions are not tried."""
_BYTES, _BYTES_OF_TEXT = 8, 32
"""Assumed for one value of a column."""


def partitions_that_fit(files: Sequence[Path], free: int) -> int:
    """Return the number of partitions of parquet files of which each fits into ``free`` bytes with its copies."""
    kinds = pq.read_schema(files[0]).types
    width = sum(_BYTES if pa.types.is_primitive(kind) else _BYTES_OF_TEXT for kind in kinds)
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    return min(max(1, -(-rows * width * COPIES // max(free, 1))), MAX_PARTITIONS)  # rounded up


class Partitioned:
    """Clean events in partitions: fits the session workflow and writes the splits.

    Parameters
    ----------
    work : Path
        Working folder of `prepare`.
    numbers : sequence of int
        Partitions with events.
    executor : Executor
        Runs the tasks, one at a time per GPU.
    settings : dict
        Of the run; completed by the boundaries of a time split.
    """

    def __init__(self, work: Path, numbers: Sequence[int], executor: Executor, settings: dict[str, Any]) -> None:
        self.work, self.numbers, self.executor, self.settings = work, list(numbers), executor, settings
        self.folder = work / OUTPUT_FOLDER
        """The data folder that is being written."""

    def fit(self, workflow: Workflow) -> None:
        """Fit the built-in workflow: only types are read, from the first partition with events."""
        frames = (tasks.clean_events(str(self.work), number) for number in self.numbers)
        workflows.fit(workflow, first_with_events(frames))

    def fit_file(self, file: WorkflowFile, columns: EventColumns) -> Workflow:
        """Return a team's workflow, fitted on all events, one partition after the other."""
        first = tasks.clean_events(str(self.work), self.numbers[0]).head(1)
        read = partial(tasks.clean_events, str(self.work))
        return file.fit(columns, dd.from_map(read, self.numbers, meta=first.iloc[:0]))

    def write(self, workflow: Workflow, folder: Path, n_rows: int) -> Written:
        """Write the rows of every split into the data folder."""
        assert folder == self.folder, "tasks know the working folder alone"
        save_workflow(workflow, self.work / tasks.FITTED_FOLDER)
        files = [partition_path(self.work, tasks.TIMES_FOLDER, number, "npy") for number in self.numbers]
        splits.set_boundaries(self.settings, lambda: np.concatenate([np.load(file) for file in files]))
        write_json(self.work / tasks.SPLIT_FILE, self.settings | {"rows": n_rows})
        arguments = [(str(self.work), number) for number in self.numbers]
        parts = self.executor.run(tasks.write_splits, arguments, "writing the splits")
        train_items = (np.load(partition_path(self.work, SPLIT_FOLDER, number, "npy")) for number in self.numbers)
        return Written.of_parts(parts, train_items, n_rows)


def prepare(task: Task, work: Path, partitions: int, executor: Executor) -> tuple[Summary, Partitioned]:
    """Shuffle the events to partitions; return what all have in common, and the partitions.

    Parameters
    ----------
    task : Task
        Of parquet files; its findings are in the order of the engine in memory.
    work : Path
        Working directory, where a killed run with the same input continues.
    partitions : int
    executor : Executor

    Raises
    ------
    NotPlainError
        The CPU has to read these files: other formats or types, texts that are numbers or no UTF-8.
    DataError, SchemaError
        The input cannot give a right result.
    """
    settings, findings, item_findings, repeated = task.settings, task.findings, checks.Findings(), checks.Findings()
    items = read_items(task.items, settings["catalogue_item_column"], item_findings)
    columns = plan_columns(task, items, findings)
    log.info(f"on the GPU in {partitions} partitions")
    vectors: item_table.Vectors = item_table.read_modalities(task.modality_files, items.num_rows)
    items, vectors = item_table.unique_items(with_normal_ids(items), vectors, repeated)
    rows = sum(pq.read_metadata(file).num_rows for file in task.files)
    chunks = cut_chunks(task.files, 2 * -(-rows // partitions))  # twice: a chunk ends where it has half of them
    plan = {
        "columns": columns,
        "partitions": partitions,
        "chunks": [(chunk.file, chunk.row_groups) for chunk in chunks],
        "items": items.num_rows,
        "settings": settings,
    }
    folder = open_planned_job(work, plan, task.files, items)
    arguments = [(str(folder), chunk) for chunk in range(len(chunks))]
    shuffled = executor.run(tasks.shuffle_chunk, arguments, "reading events")
    refuse_number_texts({name: [part["texts"][name] for part in shuffled] for name in shuffled[0]["texts"]})
    seen = all_seen(Seen(*part["seen"]) for part in shuffled)
    checks.note_incomplete(findings, seen.nulls)
    findings.found += item_findings.found
    numbers = np.flatnonzero(np.sum([part["sizes"] for part in shuffled], axis=0)).tolist()
    checks.require_events(len(numbers))
    unknown = pa.array([value for part in shuffled for value in part["unknown"]], items[ITEM_ID].type).unique()
    if settings["unknown_items"] == "append":
        items, vectors = item_table.append_items(items, vectors, unknown)
        write_item_ids(items, folder)
    write_json(folder / tasks.SURVEY_FILE, {"seen": seen})
    arguments = [(str(folder), number) for number in numbers]
    surveyed = executor.run(tasks.survey_events, arguments, "checking events")
    checks.note_times(findings, surveyed)
    checks.note_users(findings, surveyed, drop_duplicates=settings["drop_duplicates"])
    findings.found += repeated.found
    unknown_events, events = (sum(part[name] for part in surveyed) for name in ("unknown_item_events", "events"))
    item_table.note_unknown_items(findings, settings, len(unknown), unknown_events, events)
    if item_table.filters_rare(settings):
        rows = np.flatnonzero(keep_frequent(folder, partitions, settings)[FIRST_ITEM_ROW:])
        items, vectors = item_table.take_items(items, vectors, rows)
    counted = executor.run(tasks.count_events, arguments, "counting values")
    left = {number: part for number, part in zip(numbers, counted, strict=True) if part["events"]}
    if not left:
        raise DataError("no event is on an item of the item table", "matching ids", "check both id columns")
    summary = _summary(list(left.values()), columns, items, vectors, findings)
    return summary, Partitioned(folder, [*left], executor, settings)


def _summary(
    parts: Sequence[dict[str, Any]],
    columns: Columns,
    items: pa.Table,
    vectors: item_table.Vectors,
    findings: checks.Findings,
) -> Summary:
    """Return the summary of all partitions with events; add the findings of nulls."""
    for name in columns.features:
        nulls = sum(part["nulls"][name] for part in parts)
        checks.note_nulls(findings, name, nulls, text=name in columns.texts)
    values = {
        name: pd.concat([part["values"][name] for part in parts]).groupby(level=0).sum() for name in parts[0]["values"]
    }
    return Summary(
        items=items,
        vectors=vectors,
        features=tuple(columns.features),
        texts=tuple(name for name in columns.features if name in columns.texts),
        categories={name: checks.by_frequency(counts) for name, counts in values.items()},
        events=sum(part["events"] for part in parts),
        users=sum(part["users"] for part in parts),
        newest=max(part["newest"] for part in parts),
    )
