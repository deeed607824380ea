"""``missrec etl --engine memory``: NVTabular on all events in one frame of pandas.

The steps serve a frame of cuDF as well (`gpu/run.py`), which is read and written in another way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from nvtabular import Workflow

from missrec_t4r.data.session_files import take_prefixes
from missrec_t4r.etl import inputs, item_table, outputs, splits
from missrec_t4r.etl.dataframe import Frame, PandasFrames
from missrec_t4r.etl.event_settings import first_with_events, weighted_events
from missrec_t4r.etl.nvt import workflows
from missrec_t4r.etl.nvt.data_folder import Events, count_items, write_folder
from missrec_t4r.etl.nvt.workflow_file import EventColumns, WorkflowFile, refuse_uneven_lists
from missrec_t4r.etl.task import Task
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.progress import track
from missrec_t4r.schema import ITEM_LIST, LIST_SUFFIX, SPLITS, TIMESTAMP

log = logging.getLogger(__name__)

_EVENTS_PER_PARTITION = 5_000_000
_SESSIONS_PER_FILE = 250_000


def run_in_memory(task: Task, out: Path, partitions: int | None) -> dict[str, Any]:
    """Build the data folder on all events at once; return its report.

    Parameters
    ----------
    task : Task
    out : Path
        Data folder.
    partitions : int, optional
        Of the workflow; by default chosen by size.
    """
    log.info("reading the tables")
    events, items = inputs.read_tables(task, PandasFrames())
    count = partitions or 1 + len(events.frame) // _EVENTS_PER_PARTITION
    return write_whole(task, out, events, items, lambda frame: Whole(frame, task.settings, count))


def write_whole(
    task: Task, out: Path, events: inputs.Events, items: pa.Table, whole: Callable[[Frame], Events]
) -> dict[str, Any]:
    """Clean the events and write the data folder; return its report.

    Parameters
    ----------
    task : Task
    out : Path
        Data folder.
    events, items : Events, pyarrow.Table
        With normal types.
    whole : callable
        Clean events -> what a workflow makes sessions of.
    """
    vectors = item_table.read_modalities(task.modality_files, items.num_rows)
    frame, summary = inputs.clean_inputs(events, items, vectors, task.settings, task.findings)
    with atomic_write_dir(out, outputs.REPORT_FILE) as folder:
        return write_folder(summary, whole(frame), task, folder)


class Whole:
    """All clean events in one frame.

    Parameters
    ----------
    events : Frame
    settings : dict
        Of the run; completed by the boundaries of a time split.
    partitions : int
        Of the workflow.
    """

    def __init__(self, events: Frame, settings: dict[str, Any], partitions: int = 1) -> None:
        self.events, self.settings, self.partitions = events, settings, partitions
        self.weighted = weighted_events(events, settings)

    def fit(self, workflow: Workflow) -> None:
        """Fit the built-in workflow."""
        workflows.fit(workflow, first_with_events([self.weighted]))

    def fit_file(self, file: WorkflowFile, columns: EventColumns) -> Workflow:
        """Return a team's workflow, fitted on all events."""
        return file.fit(columns, self.events, self.partitions)

    def write(self, workflow: Workflow, folder: Path, n_rows: int) -> outputs.Written:
        """Write the rows of every split."""
        splits.set_boundaries(self.settings, self.events[TIMESTAMP].to_numpy)
        sessions = workflows.transform_events(workflow, self.weighted, self.partitions)
        return _write_splits(sessions, self.settings, folder, n_rows)


def _write_splits(sessions: pa.Table, settings: Mapping[str, Any], folder: Path, n_rows: int) -> outputs.Written:
    """Write the rows of every split; `gpu.write.write_splits` has the parameters."""
    sizes = {name: pc.list_value_length(sessions[name]) for name in sessions.column_names if name.endswith(LIST_SUFFIX)}
    refuse_uneven_lists([name for name, size in sizes.items() if not size.equals(sizes[ITEM_LIST])])
    offsets, lengths = splits.split_lengths(sessions, settings)
    rows = {name: take_prefixes(sessions, offsets, lengths[name]) for name in SPLITS}
    for name in track(SPLITS, "writing the splits"):
        (folder / name).mkdir(exist_ok=True)
        for part, start in enumerate(range(0, rows[name].num_rows, _SESSIONS_PER_FILE)):
            pq.write_table(rows[name].slice(start, _SESSIONS_PER_FILE), folder / name / f"part_{part}.parquet")
    return outputs.Written(
        {name: table.num_rows for name, table in rows.items()},
        int(np.diff(offsets).max()),
        count_items(rows["train"], n_rows),
    )
