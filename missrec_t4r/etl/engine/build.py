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

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.etl import item_table, outputs, splits
from missrec_t4r.etl.engine import sessionize, workdir
from missrec_t4r.etl.engine.executor import Executor, open_executor
from missrec_t4r.etl.engine.job import Job, make_plan
from missrec_t4r.etl.engine.reduce import reduce_chunks
from missrec_t4r.etl.engine.shuffle import ITEMS_FILE, PLAN_FILE, Plan, partition_sizes, shuffle_chunk
from missrec_t4r.etl.engine.user_state import STATE_FOLDER, list_columns, move_state, state_path
from missrec_t4r.etl.engine.workdir import (
    FILTER_FOLDER,
    KEPT_FOLDER,
    OUTPUT_FOLDER,
    SHUFFLE_FOLDER,
    SPLIT_FOLDER,
    job_folder,
    partition_path,
)
from missrec_t4r.etl.event_settings import CLOCK, first_with_events, weighted_events
from missrec_t4r.etl.installed import has_nvtabular
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.session_schema import write_session_schema
from missrec_t4r.etl.task import Task
from missrec_t4r.io.arrow_files import read_arrow
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, LIST_SUFFIX, SPLITS, TIMESTAMP, USER_ID

_SAMPLE_USERS = 1000
_WORK_FORMAT = 2
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
    user_column, item_column, _ = task.names
    with workdir.working_folder(out) as (work, finish), open_executor(*machines) as executor:
        files = workdir.as_parquet(task.files, copies, [user_column, item_column], task.findings)
        items, vectors = workdir.read_item_table(
            task.items, task.settings["catalogue_item_column"], files, item_column, task.modality_files, task.findings
        )
        folder, counts = build(Job(replace(task, files=files), items, vectors, partitions), work, executor)
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
    plan = make_plan(job)
    folder = prepare_folder(work, plan, job)
    tasks = [(str(folder), chunk) for chunk in range(len(plan.chunks))]
    chunks = executor.run(shuffle_chunk, tasks, "reading events")
    if not job.old and not sum(chunk["rows"] for chunk in chunks):
        raise DataError("no event has user, item and time", "at least one complete row", "check the three columns")
    common = reduce_chunks(job, plan, chunks, folder, executor)
    write_json(folder / sessionize.COMMON_FILE, common, indent=None)
    numbers = list(range(plan.partitions))
    if job.old:  # only partitions with new events
        numbers = [int(number) for number in np.flatnonzero(partition_sizes(folder, plan.partitions))]
    tasks = [(str(folder), number) for number in numbers]
    grouped = executor.run(sessionize.group_by_user, tasks, "grouping events by user")
    checks.note_users(job.run.findings, grouped, drop_duplicates=common["drop_duplicates"])
    if common["split"] == "time" and common["valid_from"] is None:
        common["valid_from"], common["test_from"] = _default_boundaries(folder, plan.partitions)
        job.run.settings |= {name: common[name] for name in ("valid_from", "test_from")}
    write_json(folder / sessionize.SPLIT_FILE, common, indent=None)
    executor.run(sessionize.write_splits, tasks, "writing the splits")
    if job.old:
        _link_unchanged(job, folder, sorted(set(range(plan.partitions)) - set(numbers)))
    counts = _finish(job, plan, common, folder)
    return folder / OUTPUT_FOLDER, counts | ({"touched": {"partitions": numbers}} if job.old else {})


# Before the tasks


def prepare_folder(work: Path, plan: Plan, job: Job) -> Path:
    """Return the job's folder in the working directory: that of a killed run with equal input, or a new one."""
    files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in map(Path, job.run.files)]
    identity = json.dumps(
        [
            _WORK_FORMAT,
            files,
            plan.partitions,
            plan.names,
            plan.features,
            plan.number_texts,
            job.run.settings,
            job.old,
        ],
        default=str,
    )
    item_hashes = pd.util.hash_array(job.items[ITEM_ID].to_pandas().to_numpy())
    folder = job_folder(work, hashlib.sha256(identity.encode() + item_hashes.tobytes()).hexdigest()[:16])
    if not (folder / PLAN_FILE).is_file():
        for name in (SHUFFLE_FOLDER, FILTER_FOLDER, KEPT_FOLDER, SPLIT_FOLDER, STATE_FOLDER):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            (folder / OUTPUT_FOLDER / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(job.items.select([ITEM_ID]), folder / ITEMS_FILE)
        plan.save(folder)
    return folder


# After the tasks


def _default_boundaries(folder: Path, partitions: int) -> tuple[float, float]:
    """Return the boundaries of a time split from the times of all events (8 bytes of memory per event)."""
    times = []
    for number in range(partitions):
        state = read_arrow(state_path(folder, number))
        times.append(list_columns(state)[TIMESTAMP + LIST_SUFFIX].values.to_numpy().copy())
    return splits.default_boundaries(np.concatenate(times))


def _link_unchanged(job: Job, folder: Path, numbers: Sequence[int]) -> None:
    """Link the files of partitions without new events into the new version."""
    old = Path(job.old["folder"])
    for number in numbers:
        files = {state_path(old, number, kind): state_path(folder, number, kind) for kind in ("arrow", "json", "npy")}
        for split in SPLITS:
            name = f"part_{number:05}.parquet"
            files[old / split / name] = folder / OUTPUT_FOLDER / split / name
        for source, target in files.items():
            if source.is_file() and not target.exists():
                link_or_copy(source, target)
        write_json(partition_path(folder, SPLIT_FOLDER, number, "json"), job.old["parts"][number], indent=None)


def _finish(job: Job, plan: Plan, common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the catalogue, the workflows and the schema, move the user state into the output; return the counts."""
    out, numbers = folder / OUTPUT_FOLDER, range(plan.partitions)
    parts = [read_json(partition_path(folder, SPLIT_FOLDER, number, "json")) for number in numbers]
    states = [read_json(state_path(folder, number, "json")) for number in numbers]
    rows = {name: sum(part["sessions"][name] for part in parts) for name in SPLITS}
    splits.check_lengths({name: np.array([rows[name]]) for name in SPLITS})
    if job.catalogue is None:
        catalogue = item_table.build_catalogue(
            job.items, job.vectors, job.run.modality_files, job.run.settings["fingerprints"]
        )
    else:
        catalogue = item_table.extend_catalogue(job.catalogue, job.items, job.vectors)
    train_counts = np.zeros(catalogue.n_rows, np.int64)
    for number in numbers:
        part_counts = np.load(state_path(folder, number, "npy"))
        train_counts[: len(part_counts)] += part_counts
    _write_encodings(job, plan, common, folder, catalogue, max(part["longest"] for part in parts))
    outputs.write_catalogue(catalogue, train_counts, out)
    state = {name: common[name] for name in ("types", "categories", "valid_from", "test_from", "newest")}
    move_state(folder, out, state | {"partitions": plan.partitions, "parts": parts})
    events, users = (sum(part[name] for part in states) for name in ("events", "users"))
    return outputs.data_counts(catalogue, train_counts, events, users, rows)


def _write_encodings(
    job: Job, plan: Plan, common: Mapping[str, Any], folder: Path, catalogue: Catalogue, longest: int
) -> None:
    """Write the schema and the request transform and, where NVTabular is installed, its workflows."""
    out, item_ids = folder / OUTPUT_FOLDER, catalogue.items[ITEM_ID].combine_chunks()
    categories = {name: pd.Series(values) for name, values in common["categories"].items()}
    clock = {name: values for name, values in CLOCK.items() if name in common["time_features"]}
    write_session_schema(out, out, {ITEM_ID: item_ids, **categories, **clock}, longest)
    features = outputs.feature_codes([*plan.features, *job.run.derive.columns], categories | clock)
    length = job.run.settings["max_sequence_length"]
    outputs.write_request_transform(outputs.request_transform(item_ids.type, len(item_ids), length, features), out)
    if has_nvtabular():
        _write_workflows(job, plan, common, folder, item_ids, categories, features)


def _write_workflows(
    job: Job,
    plan: Plan,
    common: Mapping[str, Any],
    folder: Path,
    item_ids: pa.Array,
    categories: Mapping[str, pd.Series],
    features: Mapping[str, Any],
) -> None:
    """Fit the NVTabular workflows on a sample and write them: vocabularies are given, only types are learned."""
    from missrec_t4r.etl.nvt import workflows as nvt_workflows
    from missrec_t4r.etl.nvt.saved import write_request, write_workflow

    out = folder / OUTPUT_FOLDER
    with tempfile.TemporaryDirectory() as storage:
        workflow = nvt_workflows.build_session_workflow(
            item_ids,
            Path(storage) / "sessions",
            categories=categories,
            numbers=[name for name, kind in plan.features.items() if kind == "number"],
            max_events=common["max_events"],
            derive=replace(job.run.derive, newest=common["newest"]),
        )
        samples = (_sample_events(folder, number, item_ids, categories) for number in range(plan.partitions))
        nvt_workflows.fit(workflow, first_with_events(weighted_events(events, job.run.settings) for events in samples))
        write_workflow(workflow, out, pickled=job.run.settings["save_nvtabular_workflow"])
        write_request(item_ids, out, Path(storage), job.run.settings["max_sequence_length"], features)


def _sample_events(folder: Path, number: int, item_ids: pa.Array, categories: Mapping[str, pd.Series]) -> pd.DataFrame:
    """Return the events of some users of a partition as the input has them: raw ids and values, types of all events."""
    state = read_arrow(state_path(folder, number)).slice(0, _SAMPLE_USERS)
    lists = {name.removesuffix(LIST_SUFFIX): column for name, column in list_columns(state).items()}
    sizes = lists[ITEM_ID].value_lengths().to_numpy()  # [user]
    columns: dict[str, Any] = {USER_ID: np.repeat(state[USER_ID].to_pandas().to_numpy(), sizes)}
    for name, column in lists.items():
        values = column.flatten().to_numpy()  # [event]; values of codes begin at 3
        if name == ITEM_ID:
            columns[name] = item_ids.take(pa.array(values - FIRST_ITEM_ROW)).to_pandas().to_numpy()
        elif name in categories:
            columns[name] = categories[name].to_numpy()[values - FIRST_ITEM_ROW]
        else:
            columns[name] = values
    return pd.DataFrame(columns)
