"""Incremental update (``missrec etl --update``): new events and items are added to a data folder.

Only the new input is read. Sessions are extended from the user state that the folder keeps. Item indices and category
codes never move: new items and values come after the old ones. Settings, types, time boundaries and the time that
recency counts from stay those of the first run, so the result equals a full run on all events, up to the numbering.

The new version is assembled beside the old one, unchanged files as hard links, and replaces it in one rename.
``versions.json`` lists what each version added. By default the partitions of the affected users are rewritten; with
``delta`` their sessions go to one more file beside the splits (`delta.py`), until compaction (`compact.py`).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.session_files import delta_files
from missrec_t4r.etl.engine import workdir
from missrec_t4r.etl.engine.build import build
from missrec_t4r.etl.engine.compact import compact, is_due
from missrec_t4r.etl.engine.delta import write_delta
from missrec_t4r.etl.engine.executor import open_executor
from missrec_t4r.etl.engine.job import Job
from missrec_t4r.etl.engine.versions import (
    Version,
    link_unchanged,
    load_version,
    new_files,
    part_files,
)
from missrec_t4r.etl.inputs import read_items
from missrec_t4r.etl.installed import require_nvtabular
from missrec_t4r.etl.item_table import merge_new_items
from missrec_t4r.etl.outputs import NVTABULAR_FOLDER, REQUEST_FOLDER, VERSIONS_FILE, WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import Paths, expand, parquet_rows
from missrec_t4r.etl.task import Run
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

MAX_DELTA_EVENTS = 5_000_000
"""Events of an increment that is added as a delta: they are held in memory, with the sessions of their users."""
_WORKFLOWS = (WORKFLOW_FOLDER, REQUEST_FOLDER, NVTABULAR_FOLDER)


def update(
    interactions: Paths,
    out: Path,
    *,
    items: Path | None = None,
    catalogue_item_column: str | None = None,
    modality: Mapping[str, Path] | None = None,
    delta: bool = False,
    dask_scheduler: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Add events and items to a data folder.

    Parameters
    ----------
    interactions, items, catalogue_item_column, modality, delta, dask_scheduler, workers, dry_run
        As in `missrec_t4r.etl.pipeline.etl`. Files that were added before are skipped; rows of items that the folder
        has already replace their values. Compaction after a delta runs when it is due; more than `MAX_DELTA_EVENTS`
        events are added without delta.
    out : Path
        Data folder of ``missrec etl --engine disk``.

    Returns
    -------
    dict
        As `etl`, with ``version``, ``plain_version`` (of the parquet files) and ``added``; ``"updated": False`` if
        there was nothing new.

    Raises
    ------
    ConfigError, DataError, SchemaError, ModalityError
        The folder cannot be updated, or the new events do not fit it. The old version stays as it is.
    """
    started, out, vectors = time.perf_counter(), Path(out), dict(modality or {})
    old = load_version(out)
    if (out / WORKFLOW_FOLDER).is_dir():
        require_nvtabular(f"an update of {out}, which holds NVTabular workflows", "run missrec etl on all events")
    paths = [interactions] if isinstance(interactions, str | Path) else list(interactions)
    files = expand(paths, "interactions") if paths or items is None else []
    new = new_files(files, old.history, out)
    if known := [str(file) for file in files if file not in new]:
        log.info(f"{out}: {', '.join(known[:3])}{', …' if len(known) > 3 else ''} added before: skipped")
    settings = dict(old.report["settings"])
    columns = settings["columns"]
    names = {columns[name]: name for name in (USER_ID, ITEM_ID, TIMESTAMP)}
    run = Run(files=[], names=names, settings=settings, modality_files={}, started=started)
    id_column = catalogue_item_column or settings.get("catalogue_item_column", columns[ITEM_ID])
    table = None if items is None else read_items(items, id_column, checks.Findings())
    catalogue = Catalogue.load(out / CATALOGUE_FOLDER)
    all_items, all_vectors, n_items = merge_new_items(catalogue, table, vectors, run.findings)
    if dry_run or not (new or n_items):
        if not dry_run:
            workdir.clear_after_kill(out)
        outlook = {"version": old.number, "new_files": [str(file) for file in new], "new_lines": n_items}
        return {"data": str(out), "updated": False, "dry_run": dry_run, **outlook}
    copies = workdir.copies_folder(out)
    files = workdir.as_parquet(list(new), copies, [columns[USER_ID], columns[ITEM_ID]])
    run.files = files = [file for file in files if parquet_rows([file])]  # a day without events
    as_delta = not files or (delta and parquet_rows(files) <= MAX_DELTA_EVENTS)
    if not as_delta and delta_files(out):
        compact(out, dask_scheduler=dask_scheduler, workers=workers)
        old = load_version(out)
    version = old.number + 1
    job = Job(run, all_items, all_vectors, old.state["partitions"], old, catalogue, n_items)
    with workdir.working_folder(out) as (work, finish):
        if as_delta:
            folder, counts = write_delta(job, old, catalogue, work)
            plain = old.history["plain_version"] if delta_files(folder) or delta_files(out) else version
        else:
            with open_executor(dask_scheduler, workers) as executor:
                folder, counts = build(job, work, executor)
            plain = version
        change = _describe_change(job, old, catalogue, counts) | {"files": sorted(new.values())}
        read = parquet_rows(files)
        noted = change | {"events_read": read, "findings": job.run.findings.counts()}
        history = {"version": version, "plain_version": plain, "changes": [*old.history["changes"], noted]}
        write_json(folder / VERSIONS_FILE, history, indent=1)
        final = job.run.write_report(counts | {"version": version, "events_read": read}, folder)
        rewritten = () if as_delta else (*part_files(change["partitions"]), *_WORKFLOWS)
        link_unchanged(out, folder, {CATALOGUE_FOLDER, *rewritten})
        finish(folder)
    shutil.rmtree(copies, ignore_errors=True)
    n_added = len(change["items_added"])
    changed = f", {change['items_changed']:,} items changed" if change["items_changed"] else ""
    log.info(f"{out}: version {version}, {change['events_added']:,} events and {n_added:,} items added{changed}")
    if plain < version and is_due(out, counts["events"]):
        plain = compact(out, dask_scheduler=dask_scheduler, workers=workers)["plain_version"]
    added = {**change, "items_added": n_added}
    return {"data": str(out), "updated": True, "added": added, **final, "plain_version": plain}


def _describe_change(job: Job, old: Version, catalogue: Catalogue, counts: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a version in ``versions.json``; ``touched`` moves there from the counts."""
    ids, first = job.items[ITEM_ID].slice(catalogue.n_items).to_pylist(), FIRST_ITEM_ROW + catalogue.n_items
    return {
        "version": old.number + 1,
        "events_added": counts["events"] - old.report["events"],
        "users_added": counts["users"] - old.report["users"],
        "items_added": ids,
        "items_changed": sum(found.count for found in job.run.findings.found if found.check == "changed_items"),
        "rows_added": [first, first + len(ids)],
        **counts.pop("touched"),
    }
