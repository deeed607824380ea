"""``missrec etl --update``: only the new events and items are read, and only what they concern is written.

Rows of the vocabulary never move: new items, and new values of categories, come after the old ones. Sessions are
extended from what the folder keeps of its users (``state/``). Settings, types, time boundaries and the day that
recency counts from stay those of the first run, so the result is that of a full run on all events, row numbers aside.
The new version is put together beside the old one, untouched files as hard links, and takes its place by one rename.
``versions.json`` says what each version added. By default the partitions of the users concerned are written anew;
with ``delta`` only these users are, beside the plain files (`delta.py`), until `compact` brings both together.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.session_files import delta_files
from missrec_t4r.etl.engine import build as scale
from missrec_t4r.etl.engine import delta as nights
from missrec_t4r.etl.engine import workdir as places
from missrec_t4r.etl.engine.compact import compact, is_due
from missrec_t4r.etl.engine.executor import engine as running
from missrec_t4r.etl.engine.versions import VERSIONS_FILE, derived_of, known, link_rest, new_files, plain_version
from missrec_t4r.etl.inputs import read_items
from missrec_t4r.etl.item_table import with_lines
from missrec_t4r.etl.outputs import NVTABULAR_FOLDER, REPORT_FILE, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import Paths, expand
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

DELTA_ROWS = 5_000_000
"""Events of a night that are added as a delta at most: it is held in memory, with the sessions of its users."""
_WORKFLOWS = (WORKFLOW_FOLDER, REQUEST_FOLDER, NVTABULAR_FOLDER)


def update(
    interactions: Paths,
    out: Path,
    *,
    items: Path | None = None,
    modality: Mapping[str, Path] | None = None,
    delta: bool = False,
    dask_scheduler: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Add events and items to a data folder.

    Parameters
    ----------
    interactions : path, pattern, folder, or a sequence of them
        New events only, columns as in the first run; may be empty with ``items``. A file that was added before is
        left out.
    out : Path
        Data folder of ``missrec etl --engine disk``.
    items : Path, optional
        Item table; lines of items that had one already are left out.
    modality : mapping of str to Path
        Vectors whose rows follow ``items``; new items without them lack the modality (`missrec features` adds it).
    delta : bool
        Write the users of the new events only, as one file beside the splits, which all of missrec reads with them;
        the parquet files of the splits stay those of an older version. `compact` follows by itself when it is due. A
        night with too many events for memory is added the other way.
    dask_scheduler, workers
        As in `missrec_t4r.etl.pipeline.etl`.
    dry_run : bool
        Say what would be added, and write nothing.

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
    started, out = time.perf_counter(), Path(out)
    report, state, versions = known(out)
    paths = [interactions] if isinstance(interactions, str | Path) else list(interactions)
    new = new_files(expand(paths, "interactions") if paths or items is None else [], versions)
    settings = dict(report["settings"])
    table = None if items is None else read_items(items, settings["columns"][ITEM_ID], checks.Findings())
    if dry_run or not new:
        catalogue = Catalogue.load(out / CATALOGUE_FOLDER)
        *_, lines = with_lines(catalogue, table, dict(modality or {}), checks.Findings())
        told = {"dry_run": dry_run, "version": versions["version"], "new_files": [str(file) for file in new]}
        if dry_run or not lines:
            return {"data": str(out), "updated": False, **told, "new_lines": lines}
    copies, columns = places.copies_of(out), settings["columns"]
    files = places.as_parquet(list(new), copies, [columns[USER_ID], columns[ITEM_ID]])
    beside = not files or (delta and _rows(files) <= DELTA_ROWS)
    if not beside and delta_files(out):
        compact(out, dask_scheduler=dask_scheduler, workers=workers)
        report, state, versions = known(out)
    with places.working_folder(out) as (work, finish):
        catalogue, old = Catalogue.load(out / CATALOGUE_FOLDER), {"folder": str(out.absolute()), **state}
        job = _job(files, catalogue, settings, table, dict(modality or {}), old | {"version": versions["version"]})
        version = versions["version"] + 1
        if beside:
            folder = _emptied(work / f"delta-{version}")
            counts = nights.add(job, catalogue, out, folder, report, version)
            plain = plain_version(versions) if delta_files(folder) or delta_files(out) else version
        else:
            with running(dask_scheduler, workers) as machines:
                folder, counts = scale.build(job, work, machines)
            plain = version
        change = _change(job, catalogue, counts, report, version, sorted(new.values()))
        told = {"version": version, "plain_version": plain, "changes": [*versions["changes"], change]}
        (folder / VERSIONS_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        final = counts | {"findings": job.findings.to_list(), "settings": settings, "format": 1, "version": version}
        final["seconds"] = round(time.perf_counter() - started, 3)
        (folder / REPORT_FILE).write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
        link_rest(out, folder, {CATALOGUE_FOLDER, *(() if beside else _WORKFLOWS)})
        finish(folder)
    shutil.rmtree(copies, ignore_errors=True)
    ids = change["items_added"]
    log.info(f"{out}: version {version}, {change['events_added']:,} events and {len(ids):,} items more")
    if plain < version and is_due(out, counts["events"]):
        plain = compact(out, dask_scheduler=dask_scheduler, workers=workers)["plain_version"]
    added = {**change, "items_added": len(ids)}
    return {"data": str(out), "updated": True, "added": added, **final, "plain_version": plain}


def _job(
    files: Sequence[Path],
    catalogue: Catalogue,
    settings: dict[str, Any],
    table: pa.Table | None,
    vectors: Mapping[str, Path],
    old: Mapping[str, Any],
) -> scale.Job:
    """Return what an update has to do, items with the new lines of the item table."""
    findings = checks.Findings()
    items, grown, added = with_lines(catalogue, table, vectors, findings)
    columns = settings["columns"]
    return scale.Job(
        files,
        items,
        grown,
        {str(columns[name]): name for name in (USER_ID, ITEM_ID, TIMESTAMP)},
        settings,
        {},
        derived_of(settings),
        findings,
        settings["drop_columns"],
        settings["categorical_columns"],
        old["partitions"],
        old={**old, "new_lines": added},
        catalogue=catalogue,
    )


def _change(
    job: scale.Job,
    catalogue: Catalogue,
    counts: dict[str, Any],
    report: Mapping[str, Any],
    version: int,
    digests: Sequence[str],
) -> dict[str, Any]:
    """Return the entry of a version in the list of changes; the counts lose what only it tells."""
    ids, first = job.items[ITEM_ID].slice(catalogue.n_items).to_pylist(), FIRST_ITEM_ROW + catalogue.n_items
    return {
        "version": version,
        "events_added": counts["events"] - report["events"],
        "users_added": counts["users"] - report["users"],
        "items_added": ids,
        "rows_added": [first, first + len(ids)],
        **counts.pop("touched"),
        "files": list(digests),
    }


def _rows(files: Sequence[Path]) -> int:
    """Return the number of events; a file that cannot be read is for its reader to report."""
    try:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    except (pa.ArrowInvalid, OSError):
        return 0


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
