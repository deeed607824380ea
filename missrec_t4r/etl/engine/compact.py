"""Compaction (``missrec etl --compact``): rewrite the parquet files of the splits with all deltas applied.

Per affected partition, the newest state of every user replaces older ones and the rows of the splits are written from
it. Counts, catalogue and workflows are up to date already and are linked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.data.session_files import DELTA_FOLDER, delta_files
from missrec_t4r.data.user_hash import partition_of
from missrec_t4r.etl.engine import sessionize
from missrec_t4r.etl.engine.executor import Executor, open_executor
from missrec_t4r.etl.engine.reduce import derivation_settings
from missrec_t4r.etl.engine.user_state import (
    STATE_FOLDER,
    USER_HASH,
    count_events,
    find_users,
    move_state,
    state_deltas,
    state_path,
    user_hashes,
)
from missrec_t4r.etl.engine.versions import VERSIONS_FILE, event_settings, link_unchanged, load_version, plain_version
from missrec_t4r.etl.engine.workdir import OUTPUT_FOLDER, SPLIT_FOLDER, job_folder, working_folder
from missrec_t4r.io.arrow_files import one_array, read_arrow, write_arrow
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import SPLITS, USER_ID

log = logging.getLogger(__name__)

MAX_DELTAS = 14
"""Largest number of delta files; one more starts compaction automatically."""
MAX_DELTA_SHARE = 1.0
"""Events in the deltas, as a share of all events, above which they are compacted automatically: readers read as much
more, a matter of seconds."""


def is_due(data: Path, events: int) -> bool:
    """Whether the deltas of a folder with so many events should be compacted.

    Parameters
    ----------
    data : Path
        Data folder.
    events : int
        Events of the folder, deltas included.
    """
    files = state_deltas(data)
    if len(files) > MAX_DELTAS:
        return True
    return sum(count_events(read_arrow(file)) for file in files) > MAX_DELTA_SHARE * events


def compact(
    out: Path,
    *,
    dask_scheduler: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Rewrite the parquet files of the splits with all deltas applied; without deltas nothing is done.

    What missrec reads from the folder stays the same, row by row.

    Parameters
    ----------
    out : Path
        Data folder.
    dask_scheduler, workers, dry_run
        As in `missrec_t4r.etl.pipeline.etl`.

    Returns
    -------
    dict
        ``compacted``: whether the splits were rewritten; ``deltas``: number of delta files before; ``version`` and
        ``plain_version`` of the folder afterwards.

    Raises
    ------
    ConfigError, DataError
        The folder was not written by the out-of-core engine.
    """
    started, out = time.perf_counter(), Path(out)
    report, state, versions = load_version(out)
    n_deltas = len(delta_files(out))
    result = {"data": str(out), "compacted": bool(n_deltas) and not dry_run, "dry_run": dry_run, "deltas": n_deltas}
    if not n_deltas or dry_run:
        return result | {"version": versions["version"], "plain_version": plain_version(versions)}
    with working_folder(out) as (work, finish), open_executor(dask_scheduler, workers) as executor:
        settings = report["settings"]
        common = {name: settings[name] for name in ("split", "valid_from", "test_from", "max_events", "newest")}
        common |= derivation_settings(event_settings(settings), state["categories"])
        name = hashlib.sha256(json.dumps([common, state, versions["version"]]).encode()).hexdigest()[:16]
        folder = _rewrite_splits(out, state, common, job_folder(work, name), executor)
        result |= {"version": versions["version"], "plain_version": versions["version"]}
        write_json(folder / VERSIONS_FILE, versions | {"plain_version": versions["version"]}, indent=1)
        numbers = affected_partitions(out, state["partitions"])
        rewritten = {f"{split}/part_{number:05}.parquet" for split in SPLITS for number in numbers}
        link_unchanged(out, folder, {DELTA_FOLDER, f"{STATE_FOLDER}/{DELTA_FOLDER}", *rewritten})
        finish(folder)
    log.info(f"{out}: the parquet files of the splits hold version {versions['version']}")
    return result | {"seconds": round(time.perf_counter() - started, 3)}


def _rewrite_splits(
    data: Path,
    state: Mapping[str, Any],
    common: Mapping[str, Any],
    folder: Path,
    executor: Executor,
) -> Path:
    """Write the affected partitions; return a data folder that lacks only the files that stay the same.

    Parameters
    ----------
    data : Path
        The data folder.
    state : mapping
        Content of its ``state.json``.
    common : mapping
        Settings of sessions and splits, see `reduce.py`.
    folder : Path
        Working folder of this compaction.
    """
    for name in (STATE_FOLDER, SPLIT_FOLDER, *(f"{OUTPUT_FOLDER}/{split}" for split in SPLITS)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = {"maps": [], "old": str(data.absolute()), "partitions": state["partitions"]}
    write_json(folder / sessionize.SPLIT_FILE, {**common, **source}, indent=None)
    numbers = affected_partitions(data, state["partitions"])
    tasks = [(str(folder), number) for number in numbers]
    executor.run(merge_state, tasks, "reading the deltas")
    split = executor.run(sessionize.write_splits, tasks, "writing the splits")
    parts = [dict(part) for part in state["parts"]]
    for number, part in zip(numbers, split, strict=True):
        parts[number] = part
    move_state(folder, folder / OUTPUT_FOLDER, {**state, "parts": parts})
    return folder / OUTPUT_FOLDER


def affected_partitions(data: Path, count: int) -> list[int]:
    """Return the partitions of all users who are in a delta, of ``count`` partitions."""
    numbers = [np.unique(partition_of(user_hashes(read_arrow(file)), count)) for file in state_deltas(data)]
    return [int(number) for number in np.unique(np.concatenate(numbers))]


def merge_state(work: str, partition: int) -> dict[str, Any]:
    """Write the newest state of every user of a partition; return the numbers of events and users."""
    done = state_path(work, partition, "json")
    if done.is_file():
        return read_json(done)
    common = sessionize.load_common(work, sessionize.SPLIT_FILE)
    data = Path(common["old"])
    tables = [
        _partition_rows(read_arrow(file), partition, common["partitions"]) for file in reversed(state_deltas(data))
    ]
    base = state_path(data, partition)
    tables += [_with_hashes(read_arrow(base))] if base.is_file() else []
    newest = reduce(_add_older_users, tables)
    newest = newest.take(pa.array(np.argsort(newest[USER_HASH].to_numpy(), kind="stable")))
    write_arrow(newest, state_path(work, partition))
    counts = {"events": count_events(newest), "users": newest.num_rows}
    write_json(done, counts, indent=None)
    return counts


def _partition_rows(state: pa.Table, partition: int, count: int) -> pa.Table:
    """Return the rows of a partition's users: a slice, because rows are sorted by hash."""
    numbers = partition_of(user_hashes(state), count)
    begin, end = np.searchsorted(numbers, [partition, partition + 1])
    return state.slice(int(begin), int(end - begin))


def _with_hashes(state: pa.Table) -> pa.Table:
    """Return a state table with the hash column, which folders of older releases lack."""
    if USER_HASH in state.column_names:
        return state
    return state.add_column(1, USER_HASH, pa.array(user_hashes(state), pa.uint64()))


def _add_older_users(newest: pa.Table, older: pa.Table) -> pa.Table:
    """Return the rows of the older state whose users are not in the newer one, followed by the newer rows."""
    newest = newest.take(pa.array(np.argsort(newest[USER_HASH].to_numpy(), kind="stable")))
    unchanged = find_users(newest, one_array(older[USER_ID]), older[USER_HASH].to_numpy()) < 0
    return pa.concat_tables([older.filter(pa.array(unchanged)), newest.select(older.column_names).cast(older.schema)])
