"""``missrec etl``: interactions and an item table in, a data folder of sessions, catalogue and workflows out.

read -> check -> filter -> catalogue -> NVTabular workflow -> split -> write. The folder is written aside and renamed,
so that a failed run leaves nothing and a finished one is whole; running again gives the same sessions.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from merlin.io.worker import clean_worker_cache

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    FIRST_ITEM_ROW,
    ITEM_ID,
    ITEM_LIST,
    LIST_SUFFIX,
    SESSION_TRANSFORM_FILE,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)
from missrec_t4r.workflows import catalogue as catalogues
from missrec_t4r.workflows import checks, sessions, splits
from missrec_t4r.workflows.folders import written_aside
from missrec_t4r.workflows.inputs import Inputs, prepare, read_tables
from missrec_t4r.workflows.sources.table import Paths

Split = Literal["leave_one_out", "time"]
REPORT_FILE = "etl.json"
_EVENTS_PER_PARTITION = 5_000_000
_SESSIONS_PER_FILE = 250_000


def etl(
    interactions: Paths,
    items: Path,
    out: Path,
    *,
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
    modality: Mapping[str, Path] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    max_sequence_length: int = 50,
    max_events: int | None = None,
    partitions: int | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Build a data folder.

    Parameters
    ----------
    interactions : path, pattern, folder, or a sequence of them
        Parquet or csv, one event per row.
    items : Path
        Parquet or csv, one item per row; its order becomes the order of the catalogue.
    out : Path
        Data folder; an older one is replaced whole.
    user_column, item_column, time_column : str
        Names in the interactions. Ids are strings or integers, times unix seconds or dates.
    catalogue_item_column : str, optional
        Name of the id in the item table; by default ``item_column``, or ``item_id`` where that is absent.
    drop_columns : sequence of str
        Event columns that must not become features; by default ``split``, which would tell the answer.
    categorical_columns : sequence of str
        Integer event columns that are categories. Text columns always are.
    k_core : int
        Leave out users and items with fewer events until none is left; 0 is off.
    min_item_count : int
        Leave out items with fewer events, once; 0 is off.
    unknown_items : {"append", "drop"}
        What becomes of items that only events know.
    drop_duplicates : bool
        Leave out repeated (user, item, time).
    split : {"leave_one_out", "time"}
        See `splits.py`.
    valid_from, test_from : float, optional
        Boundaries of the time split, in the unit of the time column (unix seconds for dates).
    modality : mapping of str to Path
        ``{"text": "text.npy"}``: vectors whose rows follow the item table; an all-zero row says "missing".
    fingerprint : mapping of str to str
        ``{"text": "minilm-l6-v2"}``: whose vectors those files hold, in words of your own. Pre-training over several
        data sets joins modalities of equal fingerprint (`Modality.fingerprint`).
    max_sequence_length : int
        How many last items a request keeps.
    max_events : int, optional
        Cut sessions to their last events; by default they stay whole.
    partitions : int, optional
        Dask partitions; by default one per five million events.

    Returns
    -------
    dict
        Counts, findings, settings and seconds; also written to etl.json.

    Raises
    ------
    DataError, SchemaError, ModalityError, ConfigError
        The input cannot give a right result. Nothing is left behind.
    """
    started = time.perf_counter()
    out, findings, files = Path(out), checks.Findings(), dict(modality or {})
    _check_settings(split, valid_from, test_from, max_sequence_length, max_events)
    names = {user_column: USER_ID, item_column: ITEM_ID, time_column: TIMESTAMP}
    progress.say("reading the tables")
    catalogues.check_fingerprints(fingerprint or {}, files)
    tables = read_tables(interactions, items, names, catalogue_item_column or item_column, findings)
    inputs = prepare(
        *tables,
        catalogues.read_modalities(files, tables[1].num_rows),
        findings,
        drop_columns=drop_columns,
        drop_duplicates=drop_duplicates,
        unknown_items=unknown_items,
        k_core=k_core,
        min_item_count=min_item_count,
    )
    progress.say(f"{len(inputs.events):,} events on {inputs.items.num_rows:,} items; grouping them into sessions")
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
        "event_features": list(inputs.features),
        "fingerprints": dict(fingerprint or {}),
    }
    with written_aside(out, REPORT_FILE) as folder, tempfile.TemporaryDirectory() as storage:
        counts = _write(inputs, folder, Path(storage), settings, files, categorical_columns, partitions, progress)
        report = counts | {"findings": findings.to_list(), "settings": settings, "format": 1}
        report["seconds"] = round(time.perf_counter() - started, 3)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for finding in findings.found:
        progress.say(f"{finding.check}: {finding.count:,} ({finding.message})")
    rows = ", ".join(f"{count:,} {name}" for name, count in counts["sessions"].items())
    progress.say(f"{out}: {rows} sessions in {report['seconds']:.1f} s")
    return {"data": str(out), **report}


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


def _write(
    inputs: Inputs,
    folder: Path,
    storage: Path,
    settings: dict[str, Any],
    files: Mapping[str, Path],
    categorical_columns: Sequence[str],
    partitions: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the whole data folder and return the counts."""
    if missing := [name for name in categorical_columns if name not in inputs.features]:
        raise SchemaError(f"categorical columns {missing} are no event columns", f"some of {list(inputs.features)}")
    catalogue = catalogues.build_catalogue(inputs.items, inputs.vectors, files, settings["fingerprints"])
    item_ids = catalogue.items[ITEM_ID].combine_chunks()
    categories = checks.category_values(inputs.events, inputs.features, categorical_columns)
    workflow = sessions.build_session_workflow(
        item_ids,
        storage / "sessions",
        categories=categories,
        numbers=[name for name in inputs.features if name not in categories],
        max_events=settings["max_events"],
    )
    sessions.fit(workflow, inputs.events)
    partitions = partitions or 1 + len(inputs.events) // _EVENTS_PER_PARTITION
    table = sessions.transform_events(workflow, inputs.events, partitions)
    offsets, lengths = _lengths(table, settings)

    schema = sessions.session_schema(workflow, int(np.diff(offsets).max()))
    sessions.write_schema(schema, folder)
    rows_of = {name: splits.take_prefixes(table, offsets, lengths[name]) for name in SPLITS}
    for name in progress.track(SPLITS, "writing the splits"):
        (folder / name).mkdir()
        for part, start in enumerate(range(0, rows_of[name].num_rows, _SESSIONS_PER_FILE)):
            pq.write_table(rows_of[name].slice(start, _SESSIONS_PER_FILE), folder / name / f"part_{part}.parquet")
        sessions.write_schema(schema, folder / name)

    counts = np.bincount(_rows(rows_of["train"]), minlength=catalogue.n_rows)[FIRST_ITEM_ROW:]
    catalogues.with_train_count(catalogue, counts).save(folder / CATALOGUE_FOLDER)
    workflow.save(str(folder / "workflow"))
    features = _feature_codes(inputs.features, categories)
    _write_request(item_ids, folder, storage, settings["max_sequence_length"], features)
    clean_worker_cache()  # NVTabular caches vocabularies by path, and this path may be written again
    return _counts(inputs, catalogue, rows_of, counts)


def _feature_codes(features: Sequence[str], categories: Mapping[str, pd.Series]) -> dict[str, Any]:
    """Return how a request's side features are encoded: the values of the codes from 3 on, numbers as they are."""
    numbers = {name: {"kind": "continuous"} for name in features if name not in categories}
    return numbers | {name: {"kind": "categorical", "values": v.tolist()} for name, v in categories.items()}


def _write_request(
    item_ids: pa.Array, folder: Path, storage: Path, max_sequence_length: int, features: Mapping[str, Any]
) -> None:
    request = sessions.build_request_workflow(item_ids, storage / "request", max_sequence_length=max_sequence_length)
    sessions.fit(request, pd.DataFrame({ITEM_ID: [item_ids[:2].to_pylist(), item_ids[:1].to_pylist()]}))
    request.save(str(folder / "request_workflow"))
    transform = sessions.compile_session_transform(request) | {"features": dict(features)}
    if not sessions.request_vocabulary(request).equals(item_ids):
        raise DataError(
            "NVTabular encodes the items in another order than the catalogue", "the order of the item table"
        )
    (folder / SESSION_TRANSFORM_FILE).write_text(json.dumps(transform, indent=2) + "\n", encoding="utf-8")


def _lengths(table: pa.Table, settings: dict[str, Any]) -> tuple[splits.Ints, splits.Lengths]:
    offsets = np.asarray(table[ITEM_LIST].combine_chunks().offsets, np.int64)
    if settings["split"] == "leave_one_out":
        lengths = splits.leave_one_out(offsets)
    else:
        times = table[TIMESTAMP + LIST_SUFFIX].combine_chunks().flatten().to_numpy()
        if settings["valid_from"] is None:
            settings["valid_from"], settings["test_from"] = splits.default_boundaries(times)
        lengths = splits.time_split(offsets, times, settings["valid_from"], settings["test_from"])
    splits.check_lengths(lengths)
    return offsets, lengths


def _rows(sessions_table: pa.Table) -> Any:
    return sessions_table[ITEM_LIST].combine_chunks().flatten().to_numpy()


def _counts(inputs: Inputs, catalogue: Catalogue, rows_of: Mapping[str, pa.Table], train_count: Any) -> dict[str, Any]:
    return {
        "events": len(inputs.events),
        "users": int(inputs.events[USER_ID].nunique()),
        "items": catalogue.n_items,
        "cold_items": int((train_count == 0).sum()),
        "sessions": {name: table.num_rows for name, table in rows_of.items()},
        "modalities": {name: int(modality.present.sum()) for name, modality in catalogue.modalities.items()},
    }
