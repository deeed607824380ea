"""The out-of-core engine of ``missrec etl``: a data folder from parquet of any size, in bounded memory.

    shuffle    per chunk      events encoded, sorted into the partition of their user's hash       `shuffle.py`
    reduce     once           unknown items, category codes, types, filters, findings              `reduce.py`
    sessionize per partition  events grouped by user and sorted by time: the user state            `sessionize.py`
    split      per partition  sessions cut, rows of train, valid and test written as parquet       `sessionize.py`
    finish     once           catalogue, schema, request transform, counts                         here

Where NVTabular is installed, its workflows are written too: they transform new events, and Merlin Systems needs them.

Every task leaves a file in the working folder that marks it as done; a killed run continues there if input and settings
are the same. The output appears in one rename. Its rows equal those of the fitted NVTabular workflow on the same events
(`tests/workflows/test_scale.py`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from missrec_t4r.arrays import AnyArray
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.etl import item_table, outputs, splits
from missrec_t4r.etl.engine import sessionize, workdir
from missrec_t4r.etl.engine.executor import Executor, open_executor
from missrec_t4r.etl.engine.job import Job, make_plan
from missrec_t4r.etl.engine.reduce import reduce_chunks
from missrec_t4r.etl.engine.shuffle import shuffle_chunk
from missrec_t4r.etl.engine.user_state import USER_HASH, link_state, list_columns, state_path, state_schema
from missrec_t4r.etl.engine.versions import write_inputs
from missrec_t4r.etl.engine.workdir import OUTPUT_FOLDER
from missrec_t4r.etl.event_settings import weighted_events
from missrec_t4r.etl.installed import has_nvtabular
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.task import Task
from missrec_t4r.io.arrow_files import read_arrow
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import ITEM_ID, LIST_SUFFIX, SESSION_TRANSFORM_FILE, TIMESTAMP, USER_ID

_WORK_FORMAT = 3
"""Changes with the files of the working folder, so that no run continues from those of another release."""


def run_out_of_core(task: Task, out: Path, partitions: int | None, machines: tuple[str, int | None]) -> dict[str, Any]:
    """Build the data folder on partitions, in bounded memory; return its report.

    Parameters
    ----------
    task : Task
    out : Path
        Data folder.
    partitions : int, optional
        By default chosen by size.
    machines : (str, int or None)
        Scheduler and workers, as in `executor.open_executor`.
    """
    copies = workdir.copies_folder(out)
    id_columns = [task.settings["columns"][name] for name in (USER_ID, ITEM_ID)]
    with workdir.working_folder(out) as (work, finish), open_executor(*machines) as executor:
        files = workdir.as_parquet(task.files, copies, id_columns, task.findings)
        items, vectors = workdir.read_item_table(task, files)
        folder, counts = build(Job(replace(task, files=files), items, vectors, partitions), work, executor)
        write_inputs(folder, task.files)
        report = task.write_report(counts, folder)
        finish(folder)
    shutil.rmtree(copies, ignore_errors=True)
    return report


def build(job: Job, work: Path, executor: Executor) -> tuple[Path, dict[str, Any]]:
    """Write a data folder, all but its report, into the working directory; return it and the counts.

    Raises
    ------
    DataError, SchemaError
        The input cannot give a right result.
    """
    plan = job.plan = make_plan(job)
    others = _WORK_FORMAT, job.run.settings, job.old, job.new_rows
    folder = job.folder = workdir.open_planned_job(work, asdict(plan), job.run.files, job.items, *others)
    tasks = [(str(folder), chunk) for chunk in range(len(plan.chunks))]
    chunks = executor.run(shuffle_chunk, tasks, "reading events")
    if not job.old:
        checks.require_events(sum(chunk["rows"] for chunk in chunks))
    common = reduce_chunks(job, chunks, executor)
    write_json(folder / sessionize.COMMON_FILE, common, indent=None)
    numbers = list(range(plan.partitions))
    if job.old:  # only partitions with new events
        numbers = np.flatnonzero(np.sum([chunk["sizes"] for chunk in chunks], axis=0)).tolist()
    tasks = [(str(folder), number) for number in numbers]
    grouped = executor.run(sessionize.group_by_user, tasks, "grouping events by user")
    checks.note_users(job.run.findings, grouped, drop_duplicates=common["drop_duplicates"])
    splits.set_boundaries(job.run.settings, lambda: _all_times(folder, plan.partitions))
    common |= {name: job.run.settings[name] for name in ("valid_from", "test_from")}
    write_json(folder / sessionize.SPLIT_FILE, common, indent=None)
    parts = executor.run(sessionize.write_splits, tasks, "writing the splits")
    counts = _finish(job, common, dict(zip(numbers, parts, strict=True)))
    return folder / OUTPUT_FOLDER, counts | ({"touched": {"partitions": numbers}} if job.old else {})


def _all_times(folder: Path, partitions: int) -> AnyArray:
    """Return the times of all events, [event]: 8 bytes of memory per event."""
    states = (read_arrow(state_path(folder, number)) for number in range(partitions))
    return np.concatenate([list_columns(state)[TIMESTAMP + LIST_SUFFIX].values.to_numpy().copy() for state in states])


def _finish(job: Job, common: dict[str, Any], written: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Write the catalogue, the workflows and the schema, link the user state into the output; return the counts.

    ``written`` are the results of `sessionize.write_splits`; an update leaves the other partitions as they were.
    """
    out, numbers, old = job.folder / OUTPUT_FOLDER, range(job.plan.partitions), job.old
    parts = [old.state["parts"][number] if old and number not in written else written[number] for number in numbers]
    sources = [old.folder if old and number not in written else job.folder for number in numbers]
    states = [read_json(state_path(sources[number], number, "json")) for number in numbers]
    if job.catalogue is None:
        catalogue = item_table.build_catalogue(
            job.items, job.vectors, job.run.modality_files, job.run.settings["fingerprints"]
        )
    else:
        catalogue = item_table.extend_catalogue(job.catalogue, job.items, job.vectors)
    train_items = (np.load(state_path(sources[number], number, "npy")) for number in numbers)
    total = outputs.Written.of_parts(parts, train_items, catalogue.n_rows)
    _write_encodings(job, common, catalogue, total.longest)
    outputs.write_catalogue(catalogue, total.train_counts, out)
    state = {name: common[name] for name in ("types", "categories", "valid_from", "test_from", "newest")}
    link_state(job.folder, out, state | {"partitions": len(numbers), "parts": parts})
    counts = {name: sum(part[name] for part in states) for name in ("events", "users")}
    return counts | outputs.data_counts(catalogue, total.train_counts, total.rows)


def _write_encodings(job: Job, common: Mapping[str, Any], catalogue: Catalogue, longest: int) -> None:
    """Write the schema and the request transform and, where NVTabular is installed, its workflows.

    The workflows are fitted on one event, which has all types: their vocabularies are given.
    """
    out, item_ids, settings = job.folder / OUTPUT_FOLDER, catalogue.items[ITEM_ID].combine_chunks(), job.run.settings
    categories = {name: pd.Series(values) for name, values in common["categories"].items()}
    derive, length = job.run.derive, settings["max_sequence_length"]
    typed = job.old.folder if job.old else out  # has rows, which the partitions of an update need not have
    outputs.write_session_schema(typed, out, {ITEM_ID: item_ids, **categories, **derive.clock}, longest)
    features = outputs.feature_codes([*job.plan.features, *derive.columns], categories | derive.clock)
    if not has_nvtabular():
        transform = outputs.request_transform(item_ids.type, len(item_ids), length, features)
        write_json(out / SESSION_TRANSFORM_FILE, transform)
        return
    from missrec_t4r.etl.nvt import workflows as nvt_workflows
    from missrec_t4r.etl.nvt.data_folder import write_request, write_workflow

    with tempfile.TemporaryDirectory() as storage:
        workflow = nvt_workflows.build_session_workflow(
            item_ids,
            Path(storage) / "sessions",
            categories=categories,
            numbers=[name for name, kind in job.plan.features.items() if kind == "number"],
            max_events=settings["max_events"],
            derive=derive,
        )
        state = state_schema(job.old.folder if job.old else job.folder)
        nvt_workflows.fit(workflow, _one_event(state, item_ids, categories, settings))
        write_workflow(workflow, out, pickled=settings["save_nvtabular_workflow"])
        write_request(item_ids, out, Path(storage), length, features)


def _one_event(
    state: pa.Schema, item_ids: pa.Array, categories: Mapping[str, pd.Series], settings: Mapping[str, Any]
) -> pd.DataFrame:
    """Return an event that has a weight: raw ids and values as the input has them, and the types of all events."""
    columns = {}
    for field in state:
        name = field.name.removesuffix(LIST_SUFFIX)
        if name == ITEM_ID:
            columns[name] = item_ids.slice(0, 1).to_pandas()
        elif name in categories:
            columns[name] = categories[name]
            if name == settings["event_type_column"]:
                columns[name] = weighted_events(categories[name].to_frame(name), settings)[name]
        elif name != USER_HASH:
            kind = field.type.value_type if pa.types.is_list(field.type) else field.type
            columns[name] = pa.array([0]).cast(kind).to_pandas()
    return pd.DataFrame({name: column.head(1) for name, column in columns.items()})
