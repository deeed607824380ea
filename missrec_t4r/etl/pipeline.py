"""``missrec etl``: interactions and an item table in, a data folder of sessions, catalogue and workflows out.

Three engines make the same rows. In memory (`nvt/data_folder.py`): read -> check -> filter -> catalogue -> NVTabular
workflow -> split -> write. On the GPU (`gpu/run.py`): the same on frames of cuDF, in partitions of the users where the
events exceed its memory. Out of core (`engine/build.py`): the same steps on partitions of the users, in bounded memory,
for parquet of any size, and without NVTabular.

The data folder is written to a temporary folder and replaces the output in one rename, so a failed run leaves nothing
behind, and the same input gives the same sessions.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from missrec_t4r.config.checks import require_at_least
from missrec_t4r.config.option_names import option
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl import inputs, item_table
from missrec_t4r.etl.engine import append
from missrec_t4r.etl.engine import compact as compaction
from missrec_t4r.etl.engine.build import run_out_of_core
from missrec_t4r.etl.engine.shuffle import cut_chunks
from missrec_t4r.etl.engine.workdir import remove_working_folder
from missrec_t4r.etl.installed import has_cudf, has_nvtabular, require_nvtabular
from missrec_t4r.etl.outputs import REPORT_FILE, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import (
    PARQUET_SUFFIXES,
    Paths,
    parquet_rows,
    read_table,
    require_event_columns,
    translate_parquet_errors,
)
from missrec_t4r.etl.task import ENGINES, Task, make_task
from missrec_t4r.io.atomic import refuse_unmanaged
from missrec_t4r.io.lock import locked
from missrec_t4r.schema import CATALOGUE_FOLDER, ITEM_ID, SESSION_TRANSFORM_FILE, SPLITS, TIMESTAMP, USER_ID

__all__ = ["ENGINES", "etl"]
log = logging.getLogger(__name__)

Split = Literal["leave_one_out", "time"]
GPU_EVENTS = 1_000_000
"""Events of parquet input from which ``engine="auto"`` uses the GPU: below, the CPU is as fast."""
OUT_OF_CORE_EVENTS = 300_000
"""Events of parquet input from which ``engine="auto"`` uses the out-of-core engine."""


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
        Events, one per row: a file (parquet, csv, tsv or JSON lines), a folder or a quoted pattern; repeatable.
    items : path, optional
        Item table, in the same formats, one item per row, in the order of the catalogue; optional with --update.
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
    require_at_least(0, k_core=k_core, min_item_count=min_item_count)
    require_at_least(1, max_sequence_length=max_sequence_length, max_events=max_events)
    require_at_least(1, workers=workers, partitions=partitions)
    out = Path(out)
    if update or compact:
        with nullcontext() if dry_run else locked(out):
            return _change(out, options)
    task = make_task(options)
    chosen = engine if engine != "auto" else _choose_engine(task, dask_scheduler)
    if chosen == "memory" and (workers or dask_scheduler != "threads"):
        log.warning("--dask-scheduler and --workers have no effect with --engine memory; --engine disk uses them")
    if chosen == "gpu":
        require_nvtabular("--engine gpu", "leave --engine out")
        from missrec_t4r.etl.gpu import device as gpu

        device = gpu.open_device()
    if dry_run:
        return _describe_run(task, out, chosen)
    report, machines = None, (dask_scheduler, workers)
    with locked(out):
        if chosen == "gpu":
            from missrec_t4r.etl.gpu.run import run_on_gpu

            may_go_on = engine == "auto" and task.workflow is None
            report = run_on_gpu(task, out, device, machines, partitions, may_go_on=may_go_on)
        elif chosen == "memory":
            from missrec_t4r.etl.nvt.data_folder import run_in_memory

            report = run_in_memory(task, out, partitions)
        if report is None:
            report = run_out_of_core(task, out, partitions, machines)
        else:
            remove_working_folder(out)
    for finding in task.findings.found:
        log.info(f"{finding.check}: {finding.count:,} ({finding.message})")
    rows = ", ".join(f"{count:,} {name}" for name, count in report["sessions"].items())
    log.info(f"{out}: {rows} sessions in {report['seconds']:.1f} s")
    return {"data": str(out), **report}


def _choose_engine(task: Task, scheduler: str) -> str:
    """Return the engine of ``--engine auto``."""
    rows = parquet_rows(task.files)
    if has_nvtabular() and has_cudf() and scheduler == "threads":
        from missrec_t4r.etl.gpu import device as gpu

        obstacle = gpu.obstacle()
        if obstacle is None and rows >= GPU_EVENTS:
            return "gpu"
        log.info(f"{obstacle or f'fewer than {GPU_EVENTS:,} events in parquet'}: on the CPU")
    return "disk" if task.workflow is None and (rows >= OUT_OF_CORE_EVENTS or not has_nvtabular()) else "memory"


def _describe_run(task: Task, out: Path, engine: str) -> dict[str, Any]:
    """Return what a run would read and write.

    Raises
    ------
    DataError, SchemaError
        The output exists and is not a data folder, or a table cannot be read or lacks a column.
    """
    refuse_unmanaged(out, REPORT_FILE)
    tables = [_describe_table(file) for file in task.files]
    for table in tables:
        require_event_columns(table["columns"], task.names, table["file"])
    n_items = inputs.read_items(task.items, task.settings["catalogue_item_column"], checks.Findings()).num_rows
    parquet = [file for file in task.files if file.name.endswith(PARQUET_SUFFIXES)]
    names = [*SPLITS, CATALOGUE_FOLDER, SESSION_TRANSFORM_FILE]
    names += [WORKFLOW_FOLDER, REQUEST_FOLDER] if has_nvtabular() else []
    return {
        "dry_run": True,
        "engine": engine,
        "events": sum(table["rows"] for table in tables),
        "items": n_items,
        "files": tables,
        "tasks": len(cut_chunks(parquet)) if engine == "disk" else 1,
        "would_write": [str(out / name) for name in names],
        "would_replace": out.exists(),
        "settings": dict(task.settings),
    }


def _describe_table(file: Path) -> dict[str, Any]:
    """Return rows and columns of a table; of parquet only the metadata is read."""
    if file.name.endswith(PARQUET_SUFFIXES):
        with translate_parquet_errors(file):
            parquet = pq.ParquetFile(file)
        return {"file": str(file), "rows": parquet.metadata.num_rows, "columns": parquet.schema_arrow.names}
    table = read_table(file, "interactions")
    return {"file": str(file), "rows": table.num_rows, "columns": table.column_names}


_MACHINE_OPTIONS = ("dask_scheduler", "workers", "dry_run")
_UPDATE_OPTIONS = ("interactions", "items", "catalogue_item_column", "out", "modality", "update", "delta", "compact")
"""What an update may choose beside the machine's; everything else is as in the first run of the folder."""


def _change(out: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a data folder (--update), or rewrite its splits with all deltas applied (--compact)."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(etl).parameters.items()}
    fixed = options.keys() - {*_MACHINE_OPTIONS, *_UPDATE_OPTIONS}
    changed = sorted(name for name in fixed if _comparable(options[name]) != _comparable(defaults[name]))
    if changed:
        found = f"{'--update' if options['update'] else '--compact'} with {', '.join(map(option, changed))}"
        cure = "leave them out, or run missrec etl on all events"
        raise ConfigError(found, "the settings of the first run", cure)
    machine, events = {name: options[name] for name in _MACHINE_OPTIONS}, options["interactions"]
    items = None if options["items"] is None else Path(options["items"])
    modality = item_table.modality_files(options["modality"])
    if not options["compact"]:
        told = {name: options[name] for name in ("delta", "catalogue_item_column")}
        return append.update(events, out, items=items, modality=modality, **told, **machine)
    if options["update"] or events or items or options["catalogue_item_column"] or modality:
        cure = "run missrec etl --update first, then --compact"
        raise ConfigError("--compact with new events or items", "a data folder alone", cure)
    return compaction.compact(out, **machine)


def _comparable(value: Any) -> Any:
    """Return empty mappings and sequences as None, and others as tuples, so that a list equals a default tuple."""
    return (tuple(value) if isinstance(value, list | tuple | dict) else value) or None
