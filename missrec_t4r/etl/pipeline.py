"""``missrec etl``: interactions and an item table in, a data folder of sessions, catalogue and workflows out.

Three engines make the same rows. In memory: read -> check -> filter -> catalogue -> NVTabular workflow -> split ->
write. On the GPU (package `gpu`): the same on frames of cuDF, in partitions of the users where the events exceed its
memory. Out of core (`engine/build.py`): the same steps on partitions of the users, in bounded memory, for parquet of
any size, and without NVTabular.

The data folder is written to a temporary folder and replaces the output in one rename, so a failed run leaves nothing
behind, and the same input gives the same sessions.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.session_files import take_prefixes
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl import inputs, item_table, outputs, splits
from missrec_t4r.etl.dataframe import Frame, PandasFrames
from missrec_t4r.etl.engine import append, workdir
from missrec_t4r.etl.engine import compact as compaction
from missrec_t4r.etl.engine.build import build
from missrec_t4r.etl.engine.executor import Executor, open_executor
from missrec_t4r.etl.engine.job import Job
from missrec_t4r.etl.engine.shuffle import cut_chunks
from missrec_t4r.etl.event_settings import (
    CLOCK,
    EventSettings,
    parse_seconds,
    parse_time,
    parse_time_features,
    parse_weights,
)
from missrec_t4r.etl.installed import has_cudf, has_nvtabular, require_nvtabular
from missrec_t4r.etl.outputs import REPORT_FILE, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import (
    PARQUET_SUFFIXES,
    Paths,
    expand,
    parquet_rows,
    read_table,
    require_event_columns,
)
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.io.atomic import atomic_write_dir, refuse_unmanaged
from missrec_t4r.io.json_files import write_json
from missrec_t4r.progress import track
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    ITEM_ID,
    ITEM_LIST,
    SESSION_TRANSFORM_FILE,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)

if TYPE_CHECKING:
    from nvtabular import Workflow

    from missrec_t4r.etl.gpu.device import Device
    from missrec_t4r.etl.nvt.workflow_file import EventColumns, WorkflowFile

log = logging.getLogger(__name__)

Split = Literal["leave_one_out", "time"]
ENGINES = ("auto", "memory", "disk", "gpu")
GPU_EVENTS = 1_000_000
"""Events of parquet input from which ``engine="auto"`` uses the GPU: below, the CPU is as fast."""
OUT_OF_CORE_EVENTS = 300_000
"""Events of parquet input from which ``engine="auto"`` uses the out-of-core engine."""
_EVENTS_PER_PARTITION = 5_000_000
_SESSIONS_PER_FILE = 250_000


def etl(
    interactions: Paths,
    items: str | Path | None,
    out: str | Path,
    *,
    update: bool = False,
    delta: bool = False,
    compact: bool = False,
    user_column: str = USER_ID,
    item_column: str = ITEM_ID,
    time_column: str = TIMESTAMP,
    time_format: str | None = None,
    catalogue_item_column: str | None = None,
    drop_columns: Sequence[str] = ("split",),
    categorical_columns: Sequence[str] = (),
    k_core: int = 0,
    min_item_count: int = 0,
    unknown_items: item_table.UnknownItems = "append",
    drop_duplicates: bool = False,
    split: Split = "leave_one_out",
    valid_from: str | float | None = None,
    test_from: str | float | None = None,
    modality: Mapping[str, str | Path] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    max_sequence_length: int = 50,
    max_events: int | None = None,
    session_gap: str | float | None = None,
    event_weights: str | Mapping[str, float] | None = None,
    event_type_column: str = "event_type",
    time_features: str | Sequence[str] | None = None,
    workflow: str | Path | None = None,
    engine: Literal["auto", "memory", "disk", "gpu"] = "auto",
    dask_scheduler: str = "threads",
    workers: int | None = None,
    partitions: int | None = None,
    save_nvtabular_workflow: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Build a data folder of sessions, schema and catalogue from raw tables (NVTabular), or add events to one.

    Parameters
    ----------
    interactions : path, pattern, folder, or a sequence of them
        Events, one per row: a parquet or csv file, a folder or a pattern; repeatable.
    items : path, optional
        Item table, parquet or csv, one item per row, in the order that the catalogue gets; optional with --update.
    out : path
        Data folder to write; an older one is replaced as a whole.
    update : bool
        Add new events and items to the data folder.
    delta : bool
        With --update: write the sessions of affected users to a delta file; the splits' parquet files stay.
    compact : bool
        Rewrite the splits' parquet files with all delta files applied.
    user_column : str
        Column of the user or session id (string or integer) in the events.
    item_column : str
        Column of the item id (string or integer) in the events.
    time_column : str
        Column of the event's time: unix seconds or dates.
    time_format : str, optional
        Format of text dates that are not ISO 8601, such as %d/%m/%Y or "%d.%m.%Y %H:%M"; read as UTC without a zone.
    catalogue_item_column : str, optional
        Column of the id in the item table; by default --item-column, or item_id where that is absent; with --update
        that of the first run.
    drop_columns : sequence of str
        Event column that must not become a feature; by default split, which would leak the target.
    categorical_columns : sequence of str
        Event column of integers, or of numbers as text, to treat as a category; other text columns always are.
    k_core : int
        Drop users and items with fewer events, repeatedly until all have as many; 0 is off.
    min_item_count : int
        Drop items with fewer events, once; 0 is off.
    unknown_items : {"append", "drop"}
        Treatment of items that occur in events but not in the item table.
    drop_duplicates : bool
        Drop repeated events of the same user, item and time.
    split : {"leave_one_out", "time"}
        leave_one_out: the last item of a session is its test target, the one before its validation target. time: by
        --valid-from and --test-from; without them, the last 20 and 10 per cent of the events.
    valid_from : str or float, optional
        Time split: start of validation, as a date such as 2026-03-01 (UTC), or in the unit of the time column.
    test_from : str or float, optional
        Time split: start of the test period, likewise.
    modality : mapping of str to path
        Precomputed vectors as NAME=FILE.npy, rows as in the item table; an all-zero row means "missing"; repeatable.
    fingerprint : mapping of str to str
        Name of the encoder of those vectors as NAME=TEXT; pre-training joins data sets with equal names; repeatable.
    max_sequence_length : int
        Number of most recent items of a request that the model sees.
    max_events : int, optional
        Cut sessions to their last events; by default they stay whole.
    session_gap : str or float, optional
        Inactivity that ends a session, such as 30m (or seconds); one row per session, with a session_id.
    event_weights : str or mapping, optional
        TYPE=WEIGHT,... such as view=1,purchase=3, stored as the list column weight; types of weight 0 are dropped.
    event_type_column : str
        Column of the event type.
    time_features : str or sequence of str, optional
        all, or some of gap,hour,weekday,recency: list columns derived from event times.
    workflow : path, optional
        Python file that defines session_workflow(columns), an NVTabular workflow to use instead of the built-in one, in
        memory. The file is executed. Start from workflows/session_features.py.
    engine : {"auto", "memory", "disk", "gpu"}
        memory: NVTabular transforms everything at once, on the CPU. gpu: the same on a GPU with cuDF, in partitions
        where its memory does not hold all. disk: out-of-core, in bounded memory, without NVTabular. auto: gpu for a
        million events and more in parquet, where cuDF sees a GPU; disk for large parquet, and where NVTabular is not
        installed.
    dask_scheduler : str
        Where partitions are processed: threads, processes, or tcp://host:port. With --engine gpu threads are one GPU,
        processes all GPUs of this machine.
    workers : int, optional
        Threads or processes; by default one per core, with --engine gpu one per GPU.
    partitions : int, optional
        Number of partitions; by default chosen by size. The resulting rows do not depend on it.
    save_nvtabular_workflow : bool
        Also write NVTabular's own workflow format, a pickle, which runs code when it is loaded.
    dry_run : bool
        Check settings and columns and print what would be read and written; write nothing.

    Returns
    -------
    dict
        Counts, findings, settings and seconds; also written to etl.json.

    Raises
    ------
    DataError, SchemaError, ModalityError, ConfigError
        The input cannot give a right result. Nothing is left behind.
    """
    options = dict(locals())  # as they were given: an update accepts few of them
    started, out, findings = time.perf_counter(), Path(out), checks.Findings()
    files = {name: Path(file) for name, file in (modality or {}).items()}
    if update or compact:
        return _change(interactions, None if items is None else Path(items), out, files, options)
    if delta:
        raise ConfigError("--delta without --update", "both", "add --update")
    if items is None:
        raise ConfigError("no item table", "--items items.parquet", "only --update goes without")
    items = Path(items)
    valid_from, test_from = parse_time(valid_from, "--valid-from"), parse_time(test_from, "--test-from")
    options |= {"valid_from": valid_from, "test_from": test_from}
    _check_settings(split, valid_from, test_from, max_sequence_length, max_events)
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r}", "auto, memory, disk or gpu", "choose one with --engine")
    derive = EventSettings(
        parse_weights(event_weights),
        event_type_column,
        session_gap=parse_seconds(session_gap, "--session-gap"),
        time_features=parse_time_features(time_features),
    )
    for option, asked in {
        "--engine memory": engine == "memory",
        "--save-nvtabular-workflow": save_nvtabular_workflow,
    }.items():
        if asked:
            require_nvtabular(option, "leave it out")
    workflow_file = None if workflow is None else _read_workflow_file(workflow, derive, max_events, engine)
    item_table.check_fingerprints(fingerprint or {}, files)
    names = {user_column: USER_ID, item_column: ITEM_ID, time_column: TIMESTAMP}
    if len(names) < 3:
        raise ConfigError(f"columns {list(names)} for user, item and time", "three different columns")
    events = expand(interactions, "interactions")
    chosen = engine if engine != "auto" else _choose_engine(events, workflow_file, dask_scheduler)
    device = _open_device() if chosen == "gpu" else None
    task = _Task(
        files=events,
        items=items,
        catalogue_item=catalogue_item_column or item_column,
        names=names,
        settings=_settings_of(options, derive, workflow_file),
        modality_files=files,
        derive=derive,
        findings=findings,
        workflow=workflow_file,
    )
    if dry_run:
        return _describe_run(task, out, chosen)
    counts = None
    if device is not None:
        machines = dask_scheduler, workers
        may_go_on = engine == "auto" and workflow_file is None
        counts = _run_on_gpu(task, out, started, device, machines, partitions, may_go_on=may_go_on)
    elif chosen == "memory":
        counts = _run_in_memory(task, out, partitions, started)
    if counts is None:
        counts = _run_out_of_core(task, out, partitions, dask_scheduler, workers, started)
    for finding in findings.found:
        log.info(f"{finding.check}: {finding.count:,} ({finding.message})")
    rows = ", ".join(f"{count:,} {name}" for name, count in counts["sessions"].items())
    log.info(f"{out}: {rows} sessions in {counts['seconds']:.1f} s")
    return {"data": str(out), **counts}


def _change(
    interactions: Paths, items: Path | None, out: Path, modality: Mapping[str, Path], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Add to a data folder (--update), or rewrite its splits with all deltas applied (--compact)."""
    machine = _machine_options(options)
    if options["update"] and not options["compact"]:
        told = {name: options[name] for name in ("delta", "catalogue_item_column")}
        return append.update(interactions, out, items=items, modality=modality, **told, **machine)
    if options["update"] or interactions or items or options["catalogue_item_column"] or modality:
        cure = "run missrec etl --update first, then --compact"
        raise ConfigError("--compact with new events or items", "a data folder alone", cure)
    return compaction.compact(out, **machine)


_MACHINE_OPTIONS = ("dask_scheduler", "workers", "dry_run")
"""What an update may choose; everything else is as in the first run of the folder."""
_OWN_OPTIONS = ("interactions", "items", "catalogue_item_column", "out", "modality", "update", "delta", "compact")


def _machine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that an update accepts; refuse those that were chosen in the first run."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(etl).parameters.items()}
    changed = [
        name
        for name, value in options.items()
        if name not in (*_MACHINE_OPTIONS, *_OWN_OPTIONS) and _comparable(value) != _comparable(defaults[name])
    ]
    if changed:
        option = "--update" if options["update"] else "--compact"
        cure = "leave them out, or run missrec etl on all events"
        raise ConfigError(f"{option} with {', '.join(sorted(changed))}", "the settings of the first run", cure)
    return {name: options[name] for name in _MACHINE_OPTIONS}


def _comparable(value: Any) -> Any:
    """Return empty mappings and sequences as None, and others as tuples, so that a list equals a default tuple."""
    return (tuple(value) if isinstance(value, list | tuple | dict) else value) or None


def _check_settings(
    split: str, valid_from: float | None, test_from: float | None, max_sequence_length: int, max_events: int | None
) -> None:
    if split not in ("leave_one_out", "time"):
        raise ConfigError(f"split {split!r}", "leave_one_out or time", "choose one with --split")
    if (valid_from is None) != (test_from is None):
        raise ConfigError(
            "only one boundary of the time split is set", "both or none", "set --valid-from and --test-from"
        )
    if valid_from is not None and split != "time":
        raise ConfigError("boundaries are set for a leave-one-out split", "--split time", "add it or leave them out")
    if max_sequence_length < 1 or (max_events is not None and max_events < 1):
        raise ConfigError("a session length below 1", "max_sequence_length and max_events of at least 1")


_AS_GIVEN = (
    *("split", "valid_from", "test_from", "k_core", "min_item_count", "unknown_items", "drop_duplicates"),
    *("max_sequence_length", "max_events", "time_format", "event_type_column", "save_nvtabular_workflow"),
)


def _settings_of(options: Mapping[str, Any], derive: EventSettings, workflow: WorkflowFile | None) -> dict[str, Any]:
    """Return the settings as ``etl.json`` holds them; the run completes them."""
    columns = {USER_ID: "user_column", ITEM_ID: "item_column", TIMESTAMP: "time_column"}
    return {name: options[name] for name in _AS_GIVEN} | {
        "columns": {name: options[option] for name, option in columns.items()},
        "catalogue_item_column": options["catalogue_item_column"] or options["item_column"],
        "drop_columns": list(options["drop_columns"]),
        "categorical_columns": list(options["categorical_columns"]),
        "fingerprints": dict(options["fingerprint"] or {}),
        "session_gap": derive.session_gap,
        "event_weights": dict(derive.weights),
        "time_features": list(derive.time_features),
        "workflow": None if workflow is None else {"file": workflow.file.name, "sha256": workflow.sha256},
    }


def _read_workflow_file(
    workflow: str | Path, derive: EventSettings, max_events: int | None, engine: str
) -> WorkflowFile:
    """Return the file of ``--workflow``; refuse options that it replaces.

    Raises
    ------
    ConfigError, DataError
        The file cannot be used, or is combined with an option that it replaces or with the out-of-core engine.
    """
    options = {
        "--event-weights": derive.weights,
        "--session-gap": derive.session_gap,
        "--time-features": derive.time_features,
        "--max-events": max_events,
    }
    if replaced := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"--workflow with {', '.join(replaced)}",
            "one or the other: these options change the built-in workflow",
            "write EventWeights, SessionGap, TimeFeatures or SessionSlice into the file",
        )
    if engine == "disk":
        raise ConfigError(
            "--workflow with --engine disk",
            "--engine memory or gpu: the out-of-core engine does not run NVTabular operators",
            "leave --engine out",
        )
    require_nvtabular("--workflow", "leave it out")
    from missrec_t4r.etl.nvt.workflow_file import WorkflowFile

    return WorkflowFile(workflow)


@dataclass
class _Task:
    """Input and settings of one run, for every engine."""

    files: list[Path]
    items: Path
    catalogue_item: str
    names: dict[str, str]
    settings: dict[str, Any]
    modality_files: dict[str, Path]
    derive: EventSettings
    findings: checks.Findings
    workflow: WorkflowFile | None = None

    def write_report(self, counts: dict[str, Any], folder: Path, started: float) -> dict[str, Any]:
        """Write ``etl.json`` and return its content."""
        report = counts | {"findings": self.findings.to_list(), "settings": self.settings, "format": 1}
        report["seconds"] = round(time.perf_counter() - started, 3)
        write_json(folder / REPORT_FILE, report)
        return report


# Dry run and choice of the engine


def _choose_engine(files: Sequence[Path], workflow: WorkflowFile | None, scheduler: str) -> str:
    """Return the engine of ``--engine auto``."""
    rows = parquet_rows(files)
    if has_nvtabular() and has_cudf() and scheduler == "threads":
        from missrec_t4r.etl.gpu import device as gpu

        if gpu.obstacle() is None and rows >= GPU_EVENTS:
            return "gpu"
        log.info(f"{gpu.obstacle() or f'fewer than {GPU_EVENTS:,} events in parquet'}: on the CPU")
    return "disk" if workflow is None and (rows >= OUT_OF_CORE_EVENTS or not has_nvtabular()) else "memory"


def _open_device() -> Device:
    """Return the GPU.

    Raises
    ------
    ConfigError
        NVTabular or cuDF is not installed, or there is no CUDA device.
    """
    require_nvtabular("--engine gpu", "leave --engine out")
    from missrec_t4r.etl.gpu import device as gpu

    return gpu.open_device()


def _describe_run(task: _Task, out: Path, engine: str) -> dict[str, Any]:
    """Return what a run would read and write (``--dry-run``).

    Raises
    ------
    DataError, SchemaError
        The output exists and is no data folder, or a table cannot be read or lacks a column.
    """
    refuse_unmanaged(out, REPORT_FILE)
    tables = [_describe_table(file) for file in task.files]
    for table in tables:
        require_event_columns(table["columns"], task.names, table["file"])
    n_items = inputs.read_items(task.items, task.catalogue_item, checks.Findings()).num_rows
    parquet = [file for file in task.files if file.name.endswith(PARQUET_SUFFIXES)]
    return {
        "dry_run": True,
        "engine": engine,
        "events": sum(table["rows"] for table in tables),
        "items": n_items,
        "files": tables,
        "tasks": len(cut_chunks(parquet)) if engine == "disk" else 1,
        "would_write": [
            str(out / name)
            for name in (
                *(*SPLITS, CATALOGUE_FOLDER, SESSION_TRANSFORM_FILE),
                *((WORKFLOW_FOLDER, REQUEST_FOLDER) if has_nvtabular() else ()),
            )
        ],
        "would_replace": out.exists(),
        "settings": dict(task.settings),
    }


def _describe_table(file: Path) -> dict[str, Any]:
    """Return rows and columns of a table; of parquet only the metadata is read."""
    if file.name.endswith(PARQUET_SUFFIXES):
        try:
            parquet = pq.ParquetFile(file)
        except Exception as error:
            raise DataError(f"{file} cannot be read ({error})", "interactions as parquet", "write it again") from error
        return {"file": str(file), "rows": parquet.metadata.num_rows, "columns": parquet.schema_arrow.names}
    table = read_table(file, "interactions")
    return {"file": str(file), "rows": table.num_rows, "columns": table.column_names}


# Out of core


def _run_out_of_core(
    task: _Task,
    out: Path,
    partitions: int | None,
    scheduler: str,
    workers: int | None,
    started: float,
) -> dict[str, Any]:
    """Build the data folder on partitions, in bounded memory; return its report."""
    settings, copies = task.settings, workdir.copies_folder(out)
    user_column, item_column, _ = task.names
    with workdir.working_folder(out) as (work, finish), open_executor(scheduler, workers) as executor:
        files = workdir.as_parquet(task.files, copies, [user_column, item_column], task.findings)
        items, vectors = workdir.read_item_table(
            task.items, task.catalogue_item, files, item_column, task.modality_files, task.findings
        )
        job = Job(
            files=files,
            items=items,
            vectors=vectors,
            names=task.names,
            settings=settings,
            modality_files=task.modality_files,
            derive=task.derive,
            findings=task.findings,
            partitions=partitions,
        )
        folder, counts = build(job, work, executor)
        report = task.write_report(counts, folder, started)
        finish(folder)
    shutil.rmtree(copies, ignore_errors=True)
    return report


# On the GPU


def _run_on_gpu(
    task: _Task,
    out: Path,
    started: float,
    device: Device,
    machines: tuple[str, int | None],
    partitions: int | None,
    *,
    may_go_on: bool,
) -> dict[str, Any] | None:
    """Build the data folder on one or several GPUs; return its report, or None if the CPU has to do it.

    Parameters
    ----------
    device : Device
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
    from missrec_t4r.etl.gpu.partitions import FEWEST_EVENTS
    from missrec_t4r.etl.gpu.read import NotPlainError

    settings, rows = dict(task.settings), parquet_rows(task.files)
    other = "--engine disk" if task.workflow is None else "--engine memory"  # out of core, no workflow file is run
    with open_executor(*machines, gpu=True) as executor:
        several = machines[0] != "threads"
        count = partitions or _partitions_on_gpu(task, rows, executor, device, several=several)
        while True:
            try:
                if count == 1 and not several:
                    return _run_in_memory(task, out, None, started, device)
                return _run_in_partitions(task, out, count, started, executor)
            except MemoryError as error:
                reason = str(error) or "MemoryError"
            except NotPlainError as error:
                if not may_go_on:
                    raise DataError(
                        f"{error}, and only the CPU reads that",
                        "plain parquet where events are processed on a GPU in partitions",
                        f"add {other}",
                    ) from error
                log.info(f"{error}: on the CPU, out of core")
                task.findings.found, task.settings = [], settings
                return None
            task.findings.found, task.settings = [], dict(settings)
            if partitions is not None or rows // (2 * count) < FEWEST_EVENTS:
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


def _partitions_on_gpu(task: _Task, rows: int, executor: Executor, device: Device, *, several: bool) -> int:
    """Return the number of partitions that the memory of the GPUs demands, and one per GPU at least."""
    if not rows:  # no parquet: the CPU reads it
        return 1
    from missrec_t4r.etl.gpu import partitions, tasks

    free = executor.run(tasks.free_memory, [()], "asking for memory")[0] if several else device.free_memory()
    count = partitions.partitions_that_fit(task.files, free)
    return max(count, executor.workers) if several else count


def _run_in_partitions(task: _Task, out: Path, partitions: int, started: float, executor: Executor) -> dict[str, Any]:
    """Build the data folder on partitions of the users, one at a time on each GPU; return its report."""
    from missrec_t4r.etl.gpu import partitions as parts
    from missrec_t4r.etl.gpu.read import plan_columns

    settings, noted = task.settings, checks.Findings()
    items = inputs.read_items(task.items, task.catalogue_item, noted)
    columns = plan_columns(
        task.files,
        task.names,
        checks.normal_ids(items[ITEM_ID], ITEM_ID).type,
        task.findings,
        drop_columns=settings["drop_columns"],
        categorical_columns=settings["categorical_columns"],
    )
    log.info(f"on the GPU in {partitions} partitions")
    with workdir.working_folder(out) as (work, finish), tempfile.TemporaryDirectory() as storage:
        summary, sessions = parts.prepare(
            task.files,
            columns,
            inputs.with_normal_ids(items),
            item_table.read_modalities(task.modality_files, items.num_rows),
            settings,
            task.findings,
            noted,
            work=work,
            partitions=partitions,
            executor=executor,
        )
        folder = sessions.folder
        counts = _write_folder(summary, sessions, task, folder, Path(storage))
        report = task.write_report(counts, folder, started)
        finish(folder)
    return report


# In memory, of the CPU or of the GPU


class _Sessions(Protocol):
    """Clean events that a workflow makes sessions of: as a whole (`_Whole`) or in partitions (`gpu.partitions`)."""

    def fit(self, workflow: Workflow) -> None:
        """Fit the built-in workflow."""

    def fit_file(self, file: WorkflowFile, columns: EventColumns) -> Workflow:
        """Return a team's workflow, fitted on all events."""

    def write(self, workflow: Workflow, folder: Path, n_rows: int) -> outputs.Written:
        """Write the rows of every split."""


@dataclass
class _Whole:
    """All events in one frame, of pandas or, with a device, of cuDF."""

    events: Frame
    settings: dict[str, Any]
    partitions: int
    device: Device | None = None

    def fit(self, workflow: Workflow) -> None:
        """Fit the built-in workflow."""
        from missrec_t4r.etl.nvt import workflows

        workflows.fit(workflow, self.events)

    def fit_file(self, file: WorkflowFile, columns: EventColumns) -> Workflow:
        """Return a team's workflow, fitted on all events."""
        return file.fit(columns, self.events, self.partitions)

    def write(self, workflow: Workflow, folder: Path, n_rows: int) -> outputs.Written:
        """Write the rows of every split."""
        from missrec_t4r.etl.nvt import workflows

        times, settings = self.events[TIMESTAMP], self.settings
        if self.device is None:
            splits.set_boundaries(settings, times.to_numpy)
            sessions = workflows.transform_events(workflow, self.events, self.partitions)
            return _write_splits(sessions, settings, folder, n_rows)
        from missrec_t4r.etl.gpu.write import write_splits

        device = self.device
        splits.set_boundaries(settings, lambda: device.array(times), device.xp)
        frame = workflows.transform_dataset(workflow, self.events, 1, USER_ID)
        return write_splits(self.device, frame, settings, folder, n_rows)


def _run_in_memory(
    task: _Task, out: Path, partitions: int | None, started: float, device: Device | None = None
) -> dict[str, Any]:
    """Build the data folder with NVTabular on all events at once; return its report.

    Parameters
    ----------
    task : _Task
        Input and settings.
    out : Path
        Data folder.
    partitions : int, optional
        Of the workflow on the CPU.
    started : float
        For the seconds in the report.
    device : Device, optional
        The GPU's frames; by default pandas, with files read and written by Arrow.
    """
    settings = task.settings
    log.info("reading the tables")
    events, items = _read(task, device)
    clean = inputs.clean_inputs(
        events,
        items,
        item_table.read_modalities(task.modality_files, items.num_rows),
        task.findings,
        drop_duplicates=settings["drop_duplicates"],
        unknown_items=settings["unknown_items"],
        k_core=settings["k_core"],
        min_item_count=settings["min_item_count"],
    )
    summary = inputs.summarise(clean, settings["categorical_columns"])
    sessions = _Whole(clean.events, settings, partitions or 1 + summary.events // _EVENTS_PER_PARTITION, device)
    with atomic_write_dir(out, REPORT_FILE) as folder, tempfile.TemporaryDirectory() as storage:
        counts = _write_folder(summary, sessions, task, folder, Path(storage))
        return task.write_report(counts, folder, started)


def _read(task: _Task, device: Device | None) -> tuple[inputs.Events, pa.Table]:
    """Return the complete events and the item table, both with normal types."""
    chosen = {name: task.settings[name] for name in ("drop_columns", "categorical_columns")}
    if device is not None:
        from missrec_t4r.etl.gpu import read

        found, noted = checks.Findings(), checks.Findings()
        items = inputs.read_items(task.items, task.catalogue_item, noted)
        item_type = checks.normal_ids(items[ITEM_ID], ITEM_ID).type
        try:
            columns = read.plan_columns(task.files, task.names, item_type, found, **chosen)
            events = read.read_events(device, task.files, columns, found)
        except read.NotPlainError as reason:
            log.info(f"{reason}: the CPU reads the events")
        else:
            task.findings.found += found.found + noted.found
            return events, inputs.with_normal_ids(items)
    events_table, items = inputs.read_tables(
        task.files, task.items, task.names, task.catalogue_item, task.findings, task.settings["time_format"]
    )
    return inputs.to_events(events_table, device or PandasFrames(), task.findings, **chosen), items


def _write_folder(
    summary: inputs.Summary, sessions: _Sessions, task: _Task, folder: Path, storage: Path
) -> dict[str, Any]:
    """Write everything of a data folder but its report; return the counts."""
    from missrec_t4r.etl.nvt import saved
    from missrec_t4r.etl.nvt import workflows as nvt_workflows
    from missrec_t4r.etl.nvt.workflow_file import EventColumns, check_fitted

    settings = task.settings
    settings["event_features"] = list(summary.features)
    task.derive.check(summary.features, summary.texts)
    settings["newest"] = summary.newest
    task.derive.check_clock(summary.newest)
    task.derive = replace(task.derive, newest=summary.newest)
    if missing := [name for name in settings["categorical_columns"] if name not in summary.features]:
        raise SchemaError(f"categorical columns {missing} are no event columns", f"some of {list(summary.features)}")
    log.info(f"{summary.events:,} events on {summary.items.num_rows:,} items; grouping them into sessions")
    catalogue = item_table.build_catalogue(
        summary.items, summary.vectors, task.modality_files, settings["fingerprints"]
    )
    item_ids = catalogue.items[ITEM_ID].combine_chunks()
    categories = dict(summary.categories)
    numbers = [name for name in summary.features if name not in categories]
    clock = {name: values for name, values in CLOCK.items() if name in task.derive.time_features}
    features = outputs.feature_codes([*summary.features, *task.derive.columns], categories | clock)
    request_length = settings["max_sequence_length"]
    if task.workflow is None:
        workflow = nvt_workflows.build_session_workflow(
            item_ids,
            storage / "sessions",
            categories=categories,
            numbers=numbers,
            max_events=settings["max_events"],
            derive=task.derive,
        )
        sessions.fit(workflow)
    else:
        vocabularies = {ITEM_ID: nvt_workflows.as_series(item_ids), **categories}
        columns = EventColumns(vocabularies, numbers, settings["newest"], str(storage / "sessions"))
        workflow = sessions.fit_file(task.workflow, columns)
        features, max_events = check_fitted(workflow, item_ids, settings["split"])
        request_length = min(request_length, max_events or request_length)
    written = sessions.write(workflow, folder, catalogue.n_rows)
    splits.check_lengths({name: np.array([rows]) for name, rows in written.rows.items()})
    saved.write_schema(workflow, written.longest, folder)
    saved.write_workflow(workflow, folder, pickled=settings["save_nvtabular_workflow"])
    outputs.write_catalogue(catalogue, written.train_counts, folder)
    transform = saved.write_request(item_ids, folder, storage, request_length, features)
    outputs.write_request_transform(transform, folder)
    return outputs.data_counts(catalogue, written.train_counts, summary.events, summary.users, written.rows)


def _write_splits(sessions: pa.Table, settings: dict[str, Any], folder: Path, n_rows: int) -> outputs.Written:
    """Write the rows of every split; `gpu.write_splits` has the parameters."""
    from missrec_t4r.etl.nvt.workflow_file import check_lists

    check_lists(sessions)
    offsets, lengths = splits.split_lengths(sessions, settings)
    splits.check_lengths(lengths)
    rows = {name: take_prefixes(sessions, offsets, lengths[name]) for name in SPLITS}
    for name in track(SPLITS, "writing the splits"):
        (folder / name).mkdir(exist_ok=True)
        for part, start in enumerate(range(0, rows[name].num_rows, _SESSIONS_PER_FILE)):
            pq.write_table(rows[name].slice(start, _SESSIONS_PER_FILE), folder / name / f"part_{part}.parquet")
    train_items = one_array(rows["train"][ITEM_LIST]).flatten().to_numpy()
    return outputs.Written(
        {name: table.num_rows for name, table in rows.items()},
        int(np.diff(offsets).max()),
        np.bincount(train_items, minlength=n_rows),
    )
