"""``missrec etl --update``: only the new events and items are read, and only the partitions they belong to written.

Rows of the vocabulary never move: new items, and new values of categories, come after the old ones. Sessions are
extended from what the folder keeps of its users (``state/``). Settings, types, time boundaries and the day that
recency counts from stay those of the first run, so the result is that of a full run on all events, row numbers aside.
The new version is put together beside the old one, untouched files as hard links, and takes its place by one rename.
``versions.json`` says what each version added.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.aside import recover
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError, ModalityError, SchemaError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, TRAIN_COUNT, USER_ID
from missrec_t4r.workflows import catalogue as catalogues
from missrec_t4r.workflows import checks, places, scale
from missrec_t4r.workflows.derived import Derived
from missrec_t4r.workflows.engine import engine as running
from missrec_t4r.workflows.inputs import read_items
from missrec_t4r.workflows.outputs import REPORT_FILE
from missrec_t4r.workflows.partitions import STATE_FOLDER
from missrec_t4r.workflows.sources.table import Paths, expand

VERSIONS_FILE = "versions.json"


def update(
    interactions: Paths,
    out: Path,
    *,
    items: Path | None = None,
    modality: Mapping[str, Path] | None = None,
    dask_scheduler: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Add events and items to a data folder.

    Parameters
    ----------
    interactions : path, pattern, folder, or a sequence of them
        New events only, columns as in the first run. A file that was added before is left out.
    out : Path
        Data folder of ``missrec etl --engine disk``.
    items : Path, optional
        Item table; lines of items that had one already are left out.
    modality : mapping of str to Path
        Vectors whose rows follow ``items``; new items without them lack the modality (`missrec features` adds it).
    dask_scheduler, workers
        As in `missrec_t4r.workflows.etl.etl`.
    dry_run : bool
        Say what would be added, and write nothing.

    Returns
    -------
    dict
        As `etl`, with ``version`` and ``added``; ``"updated": False`` if there was nothing new.

    Raises
    ------
    ConfigError, DataError, SchemaError, ModalityError
        The folder cannot be updated, or the new events do not fit it. The old version stays as it is.
    """
    started, out = time.perf_counter(), Path(out)
    report, state, versions = _known(out)
    settings = dict(report["settings"])
    events = expand(interactions, "interactions")
    digests = {str(file): _digest(file) for file in events}
    applied = {digest for change in versions["changes"] for digest in change.get("files", [])}
    new = [file for file in events if digests[str(file)] not in applied]
    table = None if items is None else read_items(items, settings["columns"][ITEM_ID], checks.Findings())
    if dry_run or not (new or table is not None):
        told = [str(file) for file in new]
        return {
            "data": str(out),
            "updated": False,
            "dry_run": dry_run,
            "version": versions["version"],
            "new_files": told,
        }
    findings = checks.Findings()
    old = Catalogue.load(out / CATALOGUE_FOLDER)
    grown_items, vectors, added = _with_lines(old, table, dict(modality or {}), findings)
    columns = settings["columns"]
    names = {str(columns[name]): name for name in (USER_ID, ITEM_ID, TIMESTAMP)}
    copies = out.with_name(f".{out.name}-copies")
    with places.working_folder(out) as (work, finish), running(dask_scheduler, workers) as machines:
        job = scale.Job(
            places.as_parquet(new, copies, [columns[USER_ID], columns[ITEM_ID]]),
            grown_items,
            vectors,
            names,
            settings,
            {},
            _derived(settings),
            findings,
            settings["drop_columns"],
            settings["categorical_columns"],
            state["partitions"],
            old={"folder": str(out.absolute()), "version": versions["version"], "new_items": added, **state},
            catalogue=old,
        )
        folder, counts = scale.build(job, work, machines, progress)
        version = versions["version"] + 1
        ids = job.items[ITEM_ID].slice(old.n_items).to_pylist()
        first = FIRST_ITEM_ROW + old.n_items
        change = {
            "version": version,
            "events_added": counts["events"] - report["events"],
            "users_added": counts["users"] - report["users"],
            "items_added": ids,
            "rows_added": [first, first + len(ids)],
            "partitions": counts.pop("touched"),
            "files": sorted(digests[str(file)] for file in new),
        }
        versions = {"version": version, "changes": [*versions["changes"], change]}
        (folder / VERSIONS_FILE).write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")
        final = counts | {"findings": findings.to_list(), "settings": settings, "format": 1, "version": version}
        final["seconds"] = round(time.perf_counter() - started, 3)
        (folder / REPORT_FILE).write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
        link_rest(out, folder)
        finish(folder)
    shutil.rmtree(copies, ignore_errors=True)
    progress.say(f"{out}: version {version}, {change['events_added']:,} events and {len(ids):,} items more")
    return {"data": str(out), "updated": True, "added": {**change, "items_added": len(ids)}, **final}


def link_rest(old: Path, new: Path) -> None:
    """Hard-link (or copy, where a disk has no links) every file of the old version that the new one lacks."""
    for file in sorted(old.rglob("*")):
        place = new / file.relative_to(old)
        rewritten = {CATALOGUE_FOLDER, "workflow", "request_workflow", "nvtabular_workflow"}
        if file.is_dir() or place.exists() or file.relative_to(old).parts[0] in rewritten:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        places.link(file, place)


def _known(out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    recover(out)
    state_file = out / STATE_FOLDER / "state.json"
    if not state_file.is_file():
        raise DataError(
            f"{out} keeps no state to update from",
            "a data folder of the fast path",
            "run missrec etl --engine disk once",
        )
    report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    settings = report["settings"]
    if settings["k_core"] or settings["min_item_count"]:
        raise ConfigError(
            "the folder was filtered by k-core or item count, which new events change for old ones",
            "a folder without these filters",
            "run missrec etl on all events",
        )
    file = out / VERSIONS_FILE
    versions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"version": 1, "changes": []}
    return report, json.loads(state_file.read_text(encoding="utf-8")), versions


def _derived(settings: Mapping[str, Any]) -> Derived:
    return Derived(
        settings["event_weights"],
        settings["event_type_column"],
        session_gap=settings["session_gap"],
        time_features=settings["time_features"],
        newest=settings["newest"],
    )


def _with_lines(
    old: Catalogue, table: pa.Table | None, files: Mapping[str, Path], findings: checks.Findings
) -> tuple[pa.Table, catalogues.Vectors, int]:
    """Return the old items followed by the new lines of the item table, their vectors, and how many are new."""
    known = old.items.drop_columns([TRAIN_COUNT])
    vectors = {name: modality.vectors[FIRST_ITEM_ROW:] for name, modality in old.modalities.items()}
    if table is None:
        if files:
            raise ConfigError("vectors are given without an item table", "both or none", "add --items")
        return known, vectors, 0
    ids = checks.normal_ids(table[ITEM_ID], ITEM_ID)
    if pa.types.is_string(ids.type) and old.id_type == "int64":
        ids = checks.text_to_integers(ids) or ids
    if ids.type != known[ITEM_ID].type:
        raise SchemaError(f"item ids are {ids.type} in the item table", f"{known[ITEM_ID].type} as in the catalogue")
    table = table.set_column(table.column_names.index(ITEM_ID), ITEM_ID, ids)
    given: catalogues.Vectors = catalogues.read_modalities(files, table.num_rows)
    for name, array in given.items():
        if name not in vectors or vectors[name].shape[1] != array.shape[1]:
            widths = {known_name: part.shape[1] for known_name, part in vectors.items()}
            raise ModalityError(f"modality {name!r} of width {array.shape[1]}", f"one of the catalogue's: {widths}")
    table, given = catalogues.unique_items(table, given, findings)
    rows = old.rows_of(table[ITEM_ID].combine_chunks())
    shared = [name for name in table.column_names if name in known.column_names]
    try:
        both = pa.concat_tables([known, table.select(shared)], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"the item table differs in a type ({error})", "types as in the catalogue") from error
    new = np.flatnonzero(rows < FIRST_ITEM_ROW)
    order = np.arange(old.n_items)
    told = np.flatnonzero((rows >= FIRST_ITEM_ROW) & _empty(known)[np.maximum(rows - FIRST_ITEM_ROW, 0)])
    order[rows[told] - FIRST_ITEM_ROW] = old.n_items + told  # only events knew these items; now they have a line
    order = np.concatenate([order, old.n_items + new])
    blank = {name: np.zeros((table.num_rows, array.shape[1]), np.float32) for name, array in vectors.items()}
    grown = {name: np.concatenate([array, given.get(name, blank[name])])[order] for name, array in vectors.items()}
    return both.take(pa.array(order)), grown, len(new)


def _empty(items: pa.Table) -> np.ndarray[Any, Any]:
    """Return which items nothing is known of but their id, [item]."""
    empty = np.ones(items.num_rows, bool)
    for name in items.column_names:
        if name != ITEM_ID:
            empty &= items[name].is_null().to_numpy()
    return empty


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _read(stream)


def _read(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
