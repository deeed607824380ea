"""Write a data folder with NVTabular: sessions of clean events, in whatever pieces these are, schemas and workflows.

``missrec etl --engine memory`` has all events in one frame of pandas. Its steps serve a frame of cuDF as well
(`gpu/run.py`), which is read and written in another way.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from merlin.io.worker import clean_worker_cache
from merlin.schema import Schema
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata
from nvtabular import Workflow

from missrec_t4r.arrays import Ints
from missrec_t4r.errors import DataError
from missrec_t4r.etl import inputs, item_table, outputs, splits
from missrec_t4r.etl.dataframe import Frame, PandasFrames
from missrec_t4r.etl.event_settings import first_with_events, weighted_events
from missrec_t4r.etl.inputs import Summary
from missrec_t4r.etl.nvt import workflows
from missrec_t4r.etl.nvt.request_transform import compile_session_transform, request_vocabulary
from missrec_t4r.etl.nvt.serialization import save_workflow
from missrec_t4r.etl.nvt.workflow_file import EventColumns, WorkflowFile, check_fitted, refuse_uneven_lists
from missrec_t4r.etl.task import Task
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.io.json_files import write_json
from missrec_t4r.progress import track
from missrec_t4r.schema import ITEM_ID, ITEM_LIST, LIST_SUFFIX, SCHEMA_FILE, SESSION_TRANSFORM_FILE, SPLITS, TIMESTAMP

log = logging.getLogger(__name__)


_EVENTS_PER_PARTITION = 5_000_000
_SESSIONS_PER_FILE = 250_000


class Events(Protocol):
    """Clean events that a workflow makes sessions of: as a `Whole` or in partitions (`gpu`)."""

    def fit(self, workflow: Workflow) -> None:
        """Fit the built-in workflow."""

    def fit_file(self, file: WorkflowFile, columns: EventColumns) -> Workflow:
        """Return a team's workflow, fitted on all events."""

    def write(self, workflow: Workflow, folder: Path, n_rows: int) -> outputs.Written:
        """Write the rows of every split; ``n_rows``: item indices of the catalogue, reserved ones included."""


def write_folder(summary: Summary, events: Events, task: Task, folder: Path) -> dict[str, Any]:
    """Write a data folder; return its report.

    Parameters
    ----------
    summary : Summary
        Of the events.
    events : Events
    task : Task
        Its settings are completed.
    folder : Path
        Written to; renamed by the caller when it is complete.

    Raises
    ------
    DataError, SchemaError
        The events do not fit the settings or the team's workflow, or a split has no row.
    """
    settings = task.settings
    settings["newest"] = summary.newest
    task.set_features(summary.features, summary.texts)
    task.derive.check_clock(summary.newest)
    task.derive.note_types(task.findings, summary.categories.get(settings["event_type_column"], ()))
    log.info(f"{summary.events:,} events on {summary.items.num_rows:,} items; grouping them into sessions")
    catalogue = item_table.build_catalogue(
        summary.items, summary.vectors, task.modality_files, settings["fingerprints"]
    )
    item_ids = catalogue.items[ITEM_ID].combine_chunks()
    with tempfile.TemporaryDirectory() as temporary:
        storage = Path(temporary)
        workflow, features, request_length = _fitted(summary, events, task, item_ids, storage)
        written = events.write(workflow, folder, catalogue.n_rows)
        splits.check_rows(written.rows)
        write_schema(workflows.session_schema(workflow.output_schema, written.longest), folder)
        write_workflow(workflow, folder, pickled=settings["save_nvtabular_workflow"])
        outputs.write_catalogue(catalogue, written.train_counts, folder)
        write_request(item_ids, folder, storage, request_length, features)
    counts = {"events": summary.events, "users": summary.users}
    return task.write_report(counts | outputs.data_counts(catalogue, written.train_counts, written.rows), folder)


def _fitted(
    summary: Summary, events: Events, task: Task, item_ids: pa.Array, storage: Path
) -> tuple[Workflow, Mapping[str, Any], int]:
    """Return the fitted workflow, how it encodes event features of a request, and a request's number of items."""
    settings, categories = task.settings, dict(summary.categories)
    numbers = [name for name in summary.features if name not in categories]
    request_length = settings["max_sequence_length"]
    if task.workflow is None:
        workflow = workflows.build_session_workflow(
            item_ids,
            storage / "sessions",
            categories=categories,
            numbers=numbers,
            max_events=settings["max_events"],
            derive=task.derive,
        )
        events.fit(workflow)
        names = [*summary.features, *task.derive.columns]
        return workflow, outputs.feature_codes(names, categories | task.derive.clock), request_length
    vocabularies: dict[str, pd.Series] = {ITEM_ID: workflows.as_series(item_ids), **categories}
    columns = EventColumns(vocabularies, numbers, settings["newest"], str(storage / "sessions"))
    workflow = events.fit_file(task.workflow, columns)
    features, max_events = check_fitted(workflow, item_ids, settings["split"])
    return workflow, features, min(request_length, max_events or request_length)


def write_schema(schema: Schema, folder: Path) -> None:
    """Write ``schema.pbtxt``, which Transformers4Rec and the Merlin loader read, for a data folder and every split."""
    metadata = TensorflowMetadata.from_merlin_schema(schema)
    for feature in metadata.proto_schema.feature:
        feature.annotation.tag.sort()  # tags are a set: equal runs shall write equal files
    for target in (folder, *(folder / name for name in SPLITS)):
        target.mkdir(exist_ok=True)
        metadata.to_proto_text_file(str(target), SCHEMA_FILE)


def write_workflow(workflow: Workflow, folder: Path, *, pickled: bool = False) -> None:
    """Write the fitted session workflow; ``pickled``: in NVTabular's own format too."""
    save_workflow(workflow, folder / outputs.WORKFLOW_FOLDER)
    if pickled:
        workflow.save(str(folder / outputs.NVTABULAR_FOLDER))
    clean_worker_cache()  # NVTabular caches vocabularies by path, and this path may be written again


def write_request(
    item_ids: pa.Array, folder: Path, storage: Path, max_sequence_length: int, features: Mapping[str, Any]
) -> None:
    """Fit and write the request workflow, and what it does as plain data: ``session_transform.json``.

    Parameters
    ----------
    item_ids : array [item]
        Raw ids in catalogue order.
    folder, storage : Path
        Data folder, and a temporary folder for vocabulary files.
    max_sequence_length : int
        Number of last items of a request that the model reads.
    features : mapping
        From `outputs.feature_codes`.

    Raises
    ------
    DataError
        NVTabular numbers the items differently from the catalogue.
    """
    request = workflows.build_request_workflow(item_ids, storage / "request", max_sequence_length=max_sequence_length)
    workflows.fit(request, pd.DataFrame({ITEM_ID: [item_ids[:2].to_pylist(), item_ids[:1].to_pylist()]}))
    if not request_vocabulary(request).equals(item_ids):
        raise DataError(
            "NVTabular encodes the items in another order than the catalogue", "the order of the item table"
        )
    save_workflow(request, folder / outputs.REQUEST_FOLDER)
    transform = compile_session_transform(request) | {"features": dict(features)}
    write_json(folder / SESSION_TRANSFORM_FILE, transform)
    clean_worker_cache()


def count_items(sessions: pa.Table, n_rows: int) -> Ints:
    """Return the number of events per item, [item index]."""
    return np.bincount(one_array(sessions[ITEM_LIST]).flatten().to_numpy(), minlength=n_rows)


# All events in one frame


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
    """Write the rows of every split; `gpu.tasks.write_rows` has the parameters."""
    sizes = {name: pc.list_value_length(sessions[name]) for name in sessions.column_names if name.endswith(LIST_SUFFIX)}
    refuse_uneven_lists([name for name, size in sizes.items() if not size.equals(sizes[ITEM_LIST])])
    rows = splits.split_rows(sessions, settings)
    for name in track(SPLITS, "writing the splits"):
        (folder / name).mkdir(exist_ok=True)
        for part, start in enumerate(range(0, rows[name].num_rows, _SESSIONS_PER_FILE)):
            pq.write_table(rows[name].slice(start, _SESSIONS_PER_FILE), folder / name / f"part_{part}.parquet")
    return outputs.Written(
        {name: table.num_rows for name, table in rows.items()},
        int(pc.max(sizes[ITEM_LIST]).as_py()),
        count_items(rows["train"], n_rows),
    )
