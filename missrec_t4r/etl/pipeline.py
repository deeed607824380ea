"""``missrec etl``: interactions and an item table in, a data folder of sessions, catalogue and workflows out.

read -> check -> filter -> catalogue -> NVTabular workflow -> split -> write. The folder is written aside and renamed,
so that a failed run leaves nothing and a finished one is whole; running again gives the same sessions.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl import item_table as catalogues
from missrec_t4r.etl import outputs, splits
from missrec_t4r.etl.engine import build as scale
from missrec_t4r.etl.engine import workdir as places
from missrec_t4r.etl.engine.executor import engine as running
from missrec_t4r.etl.engine.shuffle import cut_chunks
from missrec_t4r.etl.event_settings import CLOCK, EventSettings, parse_seconds, parse_time_features, parse_weights
from missrec_t4r.etl.inputs import Inputs, prepare, read_tables
from missrec_t4r.etl.nvt import workflows as sessions
from missrec_t4r.etl.nvt.workflow_file import EventColumns, WorkflowFile, check_fitted, check_lists
from missrec_t4r.etl.outputs import REPORT_FILE, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import Paths, expand, read_table
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.progress import track
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    ITEM_ID,
    ITEM_LIST,
    LIST_SUFFIX,
    SESSION_TRANSFORM_FILE,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)

log = logging.getLogger(__name__)

Split = Literal["leave_one_out", "time"]
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
    catalogue_item_column: str | None = None,
    drop_columns: Sequence[str] = ("split",),
    categorical_columns: Sequence[str] = (),
    k_core: int = 0,
    min_item_count: int = 0,
    unknown_items: catalogues.UnknownItems = "append",
    drop_duplicates: bool = False,
    split: Split = "leave_one_out",
    valid_from: float | None = None,
    test_from: float | None = None,
    modality: Mapping[str, str | Path] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    max_sequence_length: int = 50,
    max_events: int | None = None,
    session_gap: str | float | None = None,
    event_weights: str | Mapping[str, float] | None = None,
    event_type_column: str = "event_type",
    time_features: str | Sequence[str] | None = None,
    workflow: str | Path | None = None,
    engine: Literal["auto", "memory", "disk"] = "auto",
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
    catalogue_item_column : str, optional
        Column of the id in the item table; by default --item-column, or item_id where that is absent.
    drop_columns : sequence of str
        Event column that must not become a feature; by default split, which would leak the target.
    categorical_columns : sequence of str
        Integer event column to treat as a category; text columns always are.
    k_core : int
        Drop users and items with fewer events, repeatedly until none is left; 0 is off.
    min_item_count : int
        Drop items with fewer events, once; 0 is off.
    unknown_items : {"append", "drop"}
        Treatment of items that occur in events but not in the item table.
    drop_duplicates : bool
        Drop repeated events of the same user, item and time.
    split : {"leave_one_out", "time"}
        leave_one_out: the last item of a session is its test target, the one before its validation target. time: by
        --valid-from and --test-from.
    valid_from : float, optional
        Time split: start of validation, in the unit of the time column (unix seconds for dates).
    test_from : float, optional
        Time split: start of the test period, in the same unit.
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
    engine : {"auto", "memory", "disk"}
        memory: NVTabular transforms everything at once. disk: out-of-core, in bounded memory. auto: disk for large
        parquet.
    dask_scheduler : str
        Where the out-of-core engine runs: threads, processes, or tcp://host:port.
    workers : int, optional
        Threads or processes of the out-of-core engine; by default one per core.
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
    _check_settings(split, valid_from, test_from, max_sequence_length, max_events)
    if engine not in ("auto", "memory", "disk"):
        raise ConfigError(f"engine {engine!r}", "auto, memory or disk", "choose one with --engine")
    derive = EventSettings(
        parse_weights(event_weights),
        event_type_column,
        session_gap=parse_seconds(session_gap, "--session-gap"),
        time_features=parse_time_features(time_features),
    )
    file = None if workflow is None else _workflow_file(workflow, derive, max_events, engine)
    catalogues.check_fingerprints(fingerprint or {}, files)
    settings = {
        "split": split,
        "valid_from": valid_from,
        "test_from": test_from,
        "k_core": k_core,
        "min_item_count": min_item_count,
        "unknown_items": unknown_items,
        "drop_duplicates": drop_duplicates,
        "max_sequence_length": max_sequence_length,
        "max_events": max_events,
        "columns": {USER_ID: user_column, ITEM_ID: item_column, TIMESTAMP: time_column},
        "drop_columns": list(drop_columns),
        "categorical_columns": list(categorical_columns),
        "fingerprints": dict(fingerprint or {}),
        "session_gap": derive.session_gap,
        "event_weights": dict(derive.weights),
        "event_type_column": event_type_column,
        "time_features": list(derive.time_features),
        "save_nvtabular_workflow": save_nvtabular_workflow,
        "workflow": None if file is None else {"file": file.file.name, "sha256": file.sha256},
    }
    names = {user_column: USER_ID, item_column: ITEM_ID, time_column: TIMESTAMP}
    if len(names) < 3:
        raise ConfigError(f"columns {list(names)} for user, item and time", "three different columns")
    events = expand(interactions, "interactions")
    on_disk = engine == "disk" or (engine == "auto" and file is None and is_large(events))
    table = catalogue_item_column or item_column
    task = _Task(events, items, table, names, settings, files, derive, findings, file)
    if dry_run:
        return planned(task.files, names, items, out, on_disk=on_disk, settings=settings)
    if on_disk:
        counts = _on_disk(task, out, partitions, dask_scheduler, workers, started)
    else:
        counts = _in_memory(task, out, partitions, started)
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
        from missrec_t4r.etl.engine.append import update

        return update(interactions, out, items=items, modality=modality, delta=options["delta"], **machine)
    if options["update"] or interactions or items or modality:
        found, cure = "--compact with new events or items", "run missrec etl --update first, then --compact"
        raise ConfigError(found, "a data folder alone", cure)
    from missrec_t4r.etl.engine.compact import compact

    return compact(out, **machine)


_MACHINE_OPTIONS = ("dask_scheduler", "workers", "dry_run")
"""What an update may choose; everything else is as in the first run of the folder."""
_OWN_OPTIONS = ("interactions", "items", "out", "modality", "update", "delta", "compact")


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


@dataclass
class _Task:
    """What both paths have to know."""

    files: list[Path]
    items: Path
    catalogue_item: str
    names: dict[str, str]
    settings: dict[str, Any]
    modality_files: dict[str, Path]
    derive: EventSettings
    findings: checks.Findings
    workflow: WorkflowFile | None = None

    def report(self, counts: dict[str, Any], folder: Path, started: float) -> dict[str, Any]:
        """Write etl.json and return its content."""
        report = counts | {"findings": self.findings.to_list(), "settings": self.settings, "format": 1}
        report["seconds"] = round(time.perf_counter() - started, 3)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report


def _on_disk(
    task: _Task,
    out: Path,
    partitions: int | None,
    scheduler: str,
    workers: int | None,
    started: float,
) -> dict[str, Any]:
    settings, names = task.settings, task.names
    with places.working_folder(out) as (work, finish), running(scheduler, workers) as machines:
        user, item, _ = names
        files = places.as_parquet(task.files, places.copies_of(out), [user, item], task.findings)
        table, vectors = places.read_catalogue(
            task.items, task.catalogue_item, files, item, task.modality_files, task.findings
        )
        job = scale.Job(
            files,
            table,
            vectors,
            names,
            settings,
            task.modality_files,
            task.derive,
            task.findings,
            settings["drop_columns"],
            settings["categorical_columns"],
            partitions,
        )
        folder, counts = scale.build(job, work, machines)
        report = task.report(counts, folder, started)
        finish(folder)
    shutil.rmtree(places.copies_of(out), ignore_errors=True)
    return report


def _in_memory(task: _Task, out: Path, partitions: int | None, started: float) -> dict[str, Any]:
    settings = task.settings
    log.info("reading the tables")
    tables = read_tables(task.files, task.items, task.names, task.catalogue_item, task.findings)
    inputs = prepare(
        *tables,
        catalogues.read_modalities(task.modality_files, tables[1].num_rows),
        task.findings,
        drop_columns=settings["drop_columns"],
        drop_duplicates=settings["drop_duplicates"],
        unknown_items=settings["unknown_items"],
        k_core=settings["k_core"],
        min_item_count=settings["min_item_count"],
    )
    settings["event_features"] = list(inputs.features)
    task.derive.check(inputs.features, [name for name in inputs.features if inputs.events[name].dtype == object])
    settings["newest"] = float(inputs.events[TIMESTAMP].max())
    task.derive.check_clock(settings["newest"])
    task.derive = replace(task.derive, newest=settings["newest"])
    log.info(f"{len(inputs.events):,} events on {inputs.items.num_rows:,} items; grouping them into sessions")
    with atomic_write_dir(out, REPORT_FILE) as folder, tempfile.TemporaryDirectory() as storage:
        return task.report(_write(inputs, task, folder, Path(storage), partitions), folder, started)


def _workflow_file(workflow: str | Path, derive: EventSettings, max_events: int | None, engine: str) -> WorkflowFile:
    """Return the file of ``--workflow``; refuse options that it replaces.

    Raises
    ------
    ConfigError, DataError
        There is no usable file, or the option of another engine or workflow stands beside it.
    """
    options = {
        "--event-weights": derive.weights,
        "--session-gap": derive.session_gap,
        "--time-features": derive.time_features,
        "--max-events": max_events,
    }
    if given := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"--workflow with {', '.join(given)}",
            "one or the other: these options change the built-in workflow",
            "write EventWeights, SessionGap, TimeFeatures or SessionSlice into the file",
        )
    if engine == "disk":
        raise ConfigError(
            "--workflow with --engine disk",
            "--engine memory: the out-of-core engine does not run NVTabular operators",
            "leave --engine out",
        )
    return WorkflowFile(workflow)


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


def _write(inputs: Inputs, task: _Task, folder: Path, storage: Path, partitions: int | None) -> dict[str, Any]:
    """Write the whole data folder and return the counts."""
    settings = task.settings
    if missing := [name for name in settings["categorical_columns"] if name not in inputs.features]:
        raise SchemaError(f"categorical columns {missing} are no event columns", f"some of {list(inputs.features)}")
    catalogue = catalogues.build_catalogue(inputs.items, inputs.vectors, task.modality_files, settings["fingerprints"])
    item_ids = catalogue.items[ITEM_ID].combine_chunks()
    categories = checks.category_values(inputs.events, inputs.features, settings["categorical_columns"])
    numbers = [name for name in inputs.features if name not in categories]
    partitions = partitions or 1 + len(inputs.events) // _EVENTS_PER_PARTITION
    clock = {name: values for name, values in CLOCK.items() if name in task.derive.time_features}
    features = outputs.feature_codes([*inputs.features, *task.derive.columns], categories | clock)
    longest = settings["max_sequence_length"]
    if task.workflow is None:
        workflow = sessions.build_session_workflow(
            item_ids,
            storage / "sessions",
            categories=categories,
            numbers=numbers,
            max_events=settings["max_events"],
            derive=task.derive,
        )
        sessions.fit(workflow, inputs.events)
    else:
        vocabularies = {ITEM_ID: sessions.as_series(item_ids), **categories}
        columns = EventColumns(vocabularies, numbers, settings["newest"], str(storage / "sessions"))
        workflow = task.workflow.fit(columns, inputs.events, partitions)
        features, cut = check_fitted(workflow, item_ids, settings["split"])
        longest = min(longest, cut or longest)
    table = sessions.transform_events(workflow, inputs.events, partitions)
    check_lists(table)
    offsets, lengths = _lengths(table, settings, inputs.events[TIMESTAMP].to_numpy())

    rows_of = {name: splits.take_prefixes(table, offsets, lengths[name]) for name in SPLITS}
    outputs.write_workflow(workflow, int(np.diff(offsets).max()), folder, pickled=settings["save_nvtabular_workflow"])
    for name in track(SPLITS, "writing the splits"):
        for part, start in enumerate(range(0, rows_of[name].num_rows, _SESSIONS_PER_FILE)):
            pq.write_table(rows_of[name].slice(start, _SESSIONS_PER_FILE), folder / name / f"part_{part}.parquet")

    counts = np.bincount(_rows(rows_of["train"]), minlength=catalogue.n_rows)
    outputs.write_catalogue(catalogue, counts, folder)
    outputs.write_request(item_ids, folder, storage, longest, features)
    users = int(inputs.events[USER_ID].nunique())
    rows = {name: table.num_rows for name, table in rows_of.items()}
    return outputs.counted(catalogue, counts, len(inputs.events), users, rows)


def _lengths(table: pa.Table, settings: dict[str, Any], all_times: Any) -> tuple[splits.Ints, splits.Lengths]:
    offsets = np.asarray(table[ITEM_LIST].combine_chunks().offsets, np.int64)
    if settings["split"] == "leave_one_out":
        lengths = splits.leave_one_out(offsets)
    else:
        times = table[TIMESTAMP + LIST_SUFFIX].combine_chunks().flatten().to_numpy()
        if settings["valid_from"] is None:
            settings["valid_from"], settings["test_from"] = splits.default_boundaries(all_times)
        lengths = splits.time_split(offsets, times, settings["valid_from"], settings["test_from"])
    splits.check_lengths(lengths)
    return offsets, lengths


def _rows(sessions_table: pa.Table) -> Any:
    return sessions_table[ITEM_LIST].combine_chunks().flatten().to_numpy()


# What ``missrec etl`` would do: what is read, which path is taken, what is written; nothing is changed

LARGE = 300_000
"""Events of parquet input from which the fast path is taken by itself."""
_PARQUET = (".parquet", ".pq")


def is_large(files: Sequence[Path]) -> bool:
    """Whether these are parquet files with many events; files that cannot be read are for the reader to report."""
    if not all(file.name.endswith(_PARQUET) for file in files):
        return False
    try:
        return sum(pq.read_metadata(file).num_rows for file in files) >= LARGE
    except Exception:  # whatever is wrong with a file, its reader says it in words
        return False


def planned(
    files: Sequence[Path],
    names: Mapping[str, str],
    items: Path,
    out: Path,
    *,
    on_disk: bool,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a run would read and write.

    Raises
    ------
    DataError, SchemaError
        The output is in the way, or a table cannot be read or lacks a column.
    """
    if out.exists() and not (out.is_dir() and ((out / REPORT_FILE).is_file() or not any(out.iterdir()))):
        raise DataError(f"{out} exists and is no data folder", "a new or an older data folder", "choose another --out")
    item_table = read_table(items, "items")
    found = [_described(file) for file in files]
    for file in found:
        if lacking := [name for name in names if name not in file["columns"]]:
            raise SchemaError(f"{file['file']} has columns {file['columns']}", f"columns {lacking} too")
    rows = sum(file["rows"] for file in found)
    whole = [file for file in files if file.name.endswith(_PARQUET)]
    return {
        "dry_run": True,
        "engine": "disk" if on_disk else "memory",
        "events": rows,
        "items": item_table.num_rows,
        "files": found,
        "tasks": len(cut_chunks(whole)) if on_disk else 1,
        "would_write": [
            str(out / name)
            for name in (*SPLITS, CATALOGUE_FOLDER, WORKFLOW_FOLDER, REQUEST_FOLDER, SESSION_TRANSFORM_FILE)
        ],
        "would_replace": out.exists(),
        "settings": dict(settings),
    }


def _described(file: Path) -> dict[str, Any]:
    if file.name.endswith(_PARQUET):
        try:
            meta = pq.ParquetFile(file)
        except Exception as error:
            raise DataError(f"{file} cannot be read ({error})", "interactions as parquet", "write it again") from error
        return {"file": str(file), "rows": meta.metadata.num_rows, "columns": meta.schema_arrow.names}
    table = read_table(file, "interactions")
    return {"file": str(file), "rows": table.num_rows, "columns": table.column_names}
