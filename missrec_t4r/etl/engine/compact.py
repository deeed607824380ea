"""Compaction (``missrec etl --compact``): rewrite the parquet files of the splits with all deltas applied.

Per affected partition, the newest state of every user replaces older ones and the rows of the splits are written from
it. Counts, catalogue and workflows are up to date already and are linked.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.data.session_files import DELTA_FOLDER, delta_files
from missrec_t4r.data.user_hash import hash_ids, partition_of
from missrec_t4r.etl.engine import sessionize
from missrec_t4r.etl.engine.executor import open_executor
from missrec_t4r.etl.engine.reduce import session_settings
from missrec_t4r.etl.engine.user_state import (
    STATE_FOLDER,
    USER_HASH,
    bare_state,
    count_events,
    link_state,
    state_deltas,
    state_path,
    user_hashes,
)
from missrec_t4r.etl.engine.versions import link_unchanged, load_version, part_files
from missrec_t4r.etl.engine.workdir import OUTPUT_FOLDER, clear_after_kill, open_job, resumable, working_folder
from missrec_t4r.etl.outputs import VERSIONS_FILE
from missrec_t4r.io.arrow_files import one_array, read_arrow, write_arrow
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import USER_ID

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
    out: Path, *, dask_scheduler: str = "threads", workers: int | None = None, dry_run: bool = False
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
    data, report, state, versions = load_version(out)
    n_deltas = len(delta_files(out))
    result = {"data": str(out), "compacted": bool(n_deltas) and not dry_run, "dry_run": dry_run, "deltas": n_deltas}
    if not n_deltas or dry_run:
        if not dry_run:
            clear_after_kill(out)
        return result | {name: versions[name] for name in ("version", "plain_version")}
    with working_folder(out) as (work, finish), open_executor(dask_scheduler, workers) as executor:
        common = session_settings(report["settings"], state["categories"])
        job = open_job(work, [common, state, versions["version"]])
        common |= {"maps": [], "old": str(data), "partitions": state["partitions"]}
        write_json(job / sessionize.SPLIT_FILE, common, indent=None)
        numbers = affected_partitions(out, state["partitions"])
        tasks = [(str(job), number) for number in numbers]
        executor.run(merge_state, tasks, "reading the deltas")
        written = executor.run(sessionize.write_splits, tasks, "writing the splits")
        parts = state["parts"]
        for number, part in zip(numbers, written, strict=True):
            parts[number] = part
        folder = job / OUTPUT_FOLDER
        link_state(job, folder, state)
        versions["plain_version"] = versions["version"]
        write_json(folder / VERSIONS_FILE, versions, indent=1)
        link_unchanged(out, folder, {DELTA_FOLDER, f"{STATE_FOLDER}/{DELTA_FOLDER}", *part_files(numbers)})
        finish(folder)
    log.info(f"{out}: the parquet files of the splits hold version {versions['version']}")
    result |= {name: versions[name] for name in ("version", "plain_version")}
    return result | {"seconds": round(time.perf_counter() - started, 3)}


def affected_partitions(data: Path, count: int) -> list[int]:
    """Return the partitions of all users who are in a delta, of ``count`` partitions."""
    numbers = [np.unique(partition_of(user_hashes(read_arrow(file)), count)) for file in state_deltas(data)]
    return [int(number) for number in np.unique(np.concatenate(numbers))]


@resumable(STATE_FOLDER)
def merge_state(work: str, partition: int) -> dict[str, Any]:
    """Write the newest state of every user of a partition; return the numbers of events and users."""
    common = sessionize.load_common(work, sessionize.SPLIT_FILE)
    data = Path(common["old"])
    deltas = (read_arrow(file) for file in reversed(state_deltas(data)))
    tables = [_partition_rows(delta, partition, common["partitions"]) for delta in deltas]  # newest first
    base = state_path(data, partition)
    tables += [read_arrow(base)] if base.is_file() else []
    tables = [bare_state(table) for table in tables]
    state = pa.concat_tables([table.select(tables[-1].column_names).cast(tables[-1].schema) for table in tables])
    users = one_array(state[USER_ID])
    _, rows = np.unique(users.dictionary_encode().indices.to_numpy(), return_index=True)  # the first of every user
    hashes = hash_ids(users)
    rows = rows[np.argsort(hashes[rows], kind="stable")]
    state = state.take(pa.array(rows)).add_column(1, USER_HASH, pa.array(hashes[rows], pa.uint64()))
    write_arrow(state, state_path(work, partition))
    return {"events": count_events(state), "users": state.num_rows}


def _partition_rows(state: pa.Table, partition: int, count: int) -> pa.Table:
    """Return the rows of a partition's users: a slice, because rows are sorted by hash."""
    numbers = partition_of(user_hashes(state), count)
    begin, end = np.searchsorted(numbers, [partition, partition + 1])
    return state.slice(int(begin), int(end - begin))
