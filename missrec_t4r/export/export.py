"""`missrec export`: write the bundle of a run and, on request, a Triton model repository.

Everything is written to temporary folders. The bundle is read back and must reproduce the recommendations of the run's
model (`parity`); only then are the folders renamed into place. If anything fails, nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.bundle.bundle import fill_bundle, load_bundle
from missrec_t4r.bundle.lost_updates import warn_of_lost_updates
from missrec_t4r.bundle.manifest import MANIFEST_FILE
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.session_files import read_rows, row_files
from missrec_t4r.data.user_sessions import whole_sessions
from missrec_t4r.errors import BundleError, ConfigError
from missrec_t4r.export.parity import check_rows, check_workflow, compare_offline, raw_ids, sample_histories
from missrec_t4r.io.atomic import atomic_write_dir, refuse_unmanaged
from missrec_t4r.io.lock import locked
from missrec_t4r.ranking.recount import recount as count_again
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import LoadedRun, load_run, read_info
from missrec_t4r.schema import LIST_SUFFIX, SPLITS, TIMESTAMP
from missrec_t4r.serving.triton.repository import MARKER, ServingSettings, described, fill_repository

log = logging.getLogger(__name__)


def export(
    run: str | Path,
    out: str | Path,
    *,
    triton: str | Path | None = None,
    sessions: int = 256,
    data: str | Path | None = None,
    recount: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the serving bundle of a run, after a check that its recommendations equal the run's.

    Parameters
    ----------
    run : path
        Run folder written by `missrec train`.
    out : path
        Bundle to write; an older bundle there is replaced as a whole.
    triton : path, optional
        Triton model repository to write as well; an older one there is replaced as a whole.
    sessions : int
        Number of test sessions on which the recommendations of run and bundle are compared.
    data : path, optional
        Data folder, if it was moved since training.
    recount : bool
        Count co-occurrences and the events of items in the whole data folder: the training split lacks the last events
        of every user, which validation and test ask for. The weights stay as tuned. The bundle then is not the model
        that `missrec evaluate` measures, and its manifest says so: that one has the counts of training.
    dry_run : bool
        Write and compare in a temporary folder only.

    Returns
    -------
    dict
        Folders, bytes, seconds and the figures of the comparison.

    Raises
    ------
    ParityError
        The bundle's recommendations differ from the run's; nothing is left behind.
    BundleError
        A target folder was not written by missrec.
    ConfigError
        A setting that the run does not allow, such as ``recount`` without an item-kNN term.
    """
    started = time.monotonic()
    bundle, repository = Path(out).absolute(), None if triton is None else Path(triton).absolute()
    targets = [(bundle, MANIFEST_FILE, "bundle")]
    if repository is not None:
        if bundle.is_relative_to(repository) or repository.is_relative_to(bundle):
            found = f"--out {out} and --triton {triton} overlap: one is inside the other"
            raise ConfigError(found, "two separate folders")
        targets.append((repository, MARKER, "model repository"))
    require_at_least(1, sessions=sessions)
    for target, marker, kind in targets:
        refuse_unmanaged(target, marker, kind, BundleError)
    would_replace = any(target.exists() for target, *_ in targets)
    loaded = load_run(run, data)
    counted = _count_all_events(loaded, Path(run)) if recount else None
    with ExitStack() as stack:
        if dry_run:
            elsewhere = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            targets = [(elsewhere / kind, marker, kind) for _, marker, kind in targets]
        for target, *_ in targets:
            stack.enter_context(locked(target))
        temporary, *temporary_repository = [
            stack.enter_context(atomic_write_dir(target, marker, kind, BundleError)) for target, marker, kind in targets
        ]
        log.info(f"writing the bundle of {run}")
        model, catalogue, n_trained = loaded.model, loaded.catalogue, loaded.n_trained
        manifest = fill_bundle(
            temporary, model=model, catalogue=catalogue, data=loaded.data, n_trained=n_trained, recount=counted
        )
        parity = _check_parity(temporary, loaded, sessions)
        if bundle.exists():
            warn_of_lost_updates(bundle, temporary)
        for folder in temporary_repository:
            fill_repository(folder, temporary, _settings_so_far(repository))
    size = sum(file["bytes"] for file in manifest["files"].values())
    log.info(f"bundle {bundle} ({size / 2**20:.1f} MiB) equals its run on {parity['sessions']} sessions")
    return ({"dry_run": True, "would_replace": would_replace} if dry_run else {}) | {
        "bundle": str(bundle),
        "repository": None if repository is None else str(repository),
        "bytes": size,
        "items": catalogue.n_items,
        "parity": parity,
        **({"counted_events": counted["events"]} if counted else {}),
        "seconds": round(time.monotonic() - started, 2),
    }


def _count_all_events(loaded: LoadedRun, run: Path) -> dict[str, Any]:
    """Count co-occurrences in all events of the data folder; return what the bundle's manifest says about it."""
    sessions = whole_sessions(loaded.data)
    count_again(loaded.model, sessions, read_info(run).get("score_terms") or {})
    log.info(f"counted co-occurrences in all {len(sessions.values):,} events of {len(sessions):,} sessions")
    return {"events": len(sessions.values), "sessions": len(sessions), "until": _newest_time(loaded.data)}


def _newest_time(data: Path) -> str | None:
    """Return when the newest event of a data folder happened, in UTC; None where its sessions have no times."""
    column, newest = TIMESTAMP + LIST_SUFFIX, []
    for split in SPLITS:
        files = row_files(data / split)
        if files and column in pq.read_schema(files[0]).names:
            times = pc.list_flatten(read_rows(data / split, [column])[column])
            if pa.types.is_temporal(times.type):  # of a folder that another workflow wrote
                times = times.cast(pa.timestamp("s", "UTC"), safe=False).cast(pa.int64())
            newest.append(pc.max(times).as_py())
    newest = [time for time in newest if time is not None]  # of a split without an event
    return f"{np.datetime64(int(max(newest)), 's')}Z" if newest else None


def _check_parity(folder: Path, loaded: LoadedRun, sessions: int) -> dict[str, Any]:
    log.info("comparing the bundle with the run")
    bundle = load_bundle(folder)
    histories = sample_histories(load_sessions(loaded.data, "test", bundle.model.event_columns), sessions)
    requests = raw_ids(loaded.catalogue, histories)
    check_rows(bundle.transform, histories, requests)
    workflow = check_workflow(loaded.data, bundle.catalogue, requests)
    ranker = Ranker(bundle.model, bundle.catalogue, tables=bundle.tables)
    parity = compare_offline(ranker, loaded.model, histories).require("the exported bundle")
    return dataclasses.asdict(parity) | {"equal": parity.equal, "nvtabular": workflow}


def _settings_so_far(repository: Path | None) -> ServingSettings:
    """Return the settings of the repository that is replaced: tuned for this machine, or edited."""
    if repository is None or not (repository / MARKER).is_file():
        return ServingSettings()
    from missrec_t4r.serving.triton.model_config import settings_of  # needs tritonclient

    try:
        settings = settings_of((repository / MARKER).parent)
    except BundleError as error:
        log.warning(f"the new repository has the default settings: {error}")
        return ServingSettings()
    if settings != ServingSettings():
        log.info("the new repository keeps the settings of the old one: " + described(settings))
    return settings
