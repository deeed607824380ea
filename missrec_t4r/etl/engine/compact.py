"""missrec etl --compact: the nights of --delta go into the splits' parquet files, and plain parquet is all again.

Partition by partition, the state of the users whom the deltas know takes the place of the older one, and the splits are
written anew. Counts, catalogue and workflows are up to date already, so they are linked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.data.session_files import DELTA_FOLDER, delta_files, one_array
from missrec_t4r.data.user_hash import partition_of
from missrec_t4r.etl.engine import build as scale
from missrec_t4r.etl.engine import sessionize as partitions
from missrec_t4r.etl.engine.executor import Engine
from missrec_t4r.etl.engine.executor import engine as running
from missrec_t4r.etl.engine.sessionize import DIVIDE_FILE, STATE_FILE, STATE_FOLDER, USER_HASH, read_arrow
from missrec_t4r.etl.engine.shuffle import write_json
from missrec_t4r.etl.engine.user_state import hashes_of, rows_of, state_deltas
from missrec_t4r.etl.engine.versions import VERSIONS_FILE, derived_of, known, link_rest, plain_version
from missrec_t4r.etl.engine.workdir import one_of, working_folder
from missrec_t4r.schema import SPLITS, USER_ID

log = logging.getLogger(__name__)

DELTAS_AT_MOST = 14
"""Nights after which compaction follows by itself."""
SHARE_AT_MOST = 1.0
"""Events in the deltas, as a share of all events, from which on it does; readers read that much more, seconds of it."""


def is_due(data: Path, events: int) -> bool:
    """Whether readers would be better off with plain parquet."""
    files = state_deltas(data)
    if len(files) > DELTAS_AT_MOST:
        return True
    held = sum(partitions.n_events(read_arrow(file)) for file in files)
    return held > SHARE_AT_MOST * events


def compact(
    out: Path,
    *,
    dask_scheduler: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the splits of a data folder anew where deltas stand beside them, so that plain parquet is all again.

    What is read of the folder stays the same, row by row.

    Returns
    -------
    dict
        ``compacted``: whether it was done; ``deltas``: how many there were; ``version``, ``plain_version``.

    Raises
    ------
    ConfigError, DataError
        The folder is none of the fast path's.
    """
    started, out = time.perf_counter(), Path(out)
    report, state, versions = known(out)
    found = len(delta_files(out))
    told = {"data": str(out), "compacted": bool(found) and not dry_run, "dry_run": dry_run, "deltas": found}
    if not found or dry_run:
        return told | {"version": versions["version"], "plain_version": plain_version(versions)}
    with working_folder(out) as (top, finish), running(dask_scheduler, workers) as machines:
        settings = report["settings"]
        how = {name: settings[name] for name in ("split", "valid_from", "test_from", "max_events", "newest")}
        how |= scale.derived(derived_of(settings), state["categories"])
        name = hashlib.sha256(json.dumps([how, state, versions["version"]]).encode()).hexdigest()[:16]
        folder = _rewrite(out, state, how, one_of(top, name), machines)
        told |= {"version": versions["version"], "plain_version": versions["version"]}
        text = json.dumps(versions | {"plain_version": versions["version"]}, indent=1)
        (folder / VERSIONS_FILE).write_text(text + "\n", encoding="utf-8")
        link_rest(out, folder, {DELTA_FOLDER, f"{STATE_FOLDER}/{DELTA_FOLDER}"})
        finish(folder)
    log.info(f"{out}: the splits hold version {versions['version']}, as parquet")
    return told | {"seconds": round(time.perf_counter() - started, 3)}


def _rewrite(data: Path, state: Mapping[str, Any], told: Mapping[str, Any], work: Path, engine: Engine) -> Path:
    """Write the partitions that deltas concern; return a folder that lacks only what stays the same.

    Parameters
    ----------
    state : mapping
        ``state.json``; told : mapping
        What sessions and splits are made by.
    """
    for name in (STATE_FOLDER, "done", *(f"out/{split}" for split in SPLITS)):
        (work / name).mkdir(parents=True, exist_ok=True)
    write_json(work / DIVIDE_FILE, {**told, "maps": [], "old": str(data.absolute()), "partitions": state["partitions"]})
    numbers = concerned(data, state["partitions"])
    tasks = [(str(work), number) for number in numbers]
    engine.run(absorb, tasks, "reading the nights")
    divided = engine.run(partitions.divide, tasks, "writing the splits")
    parts = [dict(part) for part in state["parts"]]
    for number, part in zip(numbers, divided, strict=True):
        parts[number] = part
    place = work / "out" / STATE_FOLDER
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed after this line
    (work / STATE_FOLDER).rename(place)
    write_json(place / STATE_FILE, {**state, "parts": parts})
    return work / "out"


def concerned(data: Path, count: int) -> list[int]:
    """Return the partitions of the users whom the deltas know."""
    found = [np.unique(partition_of(hashes_of(read_arrow(file)), count)) for file in state_deltas(data)]
    return [int(number) for number in np.unique(np.concatenate(found))]


def absorb(work: str, partition: int) -> dict[str, Any]:
    """Write what is known of a partition's users, of each the newest state; return the numbers of events and users."""
    done = partitions.place(work, STATE_FOLDER, partition, "json")
    if done.is_file():
        answer: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return answer
    told = partitions.load_merged(work, DIVIDE_FILE)
    data = Path(told["old"])
    parts = [_slice(read_arrow(file), partition, told["partitions"]) for file in reversed(state_deltas(data))]
    plain = data / STATE_FOLDER / f"{partition:05}.arrow"
    parts += [_with_hashes(read_arrow(plain))] if plain.is_file() else []
    newest = reduce(_with_older, parts)
    order = np.argsort(newest[USER_HASH].to_numpy(), kind="stable")
    newest = newest.take(pa.array(order))
    partitions.write_state(newest, Path(work) / STATE_FOLDER, partition)
    found = {"events": partitions.n_events(newest), "users": newest.num_rows}
    write_json(done, found)
    return found


def _slice(state: pa.Table, partition: int, count: int) -> pa.Table:
    """Return the rows of a partition's users; they are in the order of their hash."""
    numbers = partition_of(hashes_of(state), count)
    begin, end = np.searchsorted(numbers, [partition, partition + 1])
    return state.slice(int(begin), int(end - begin))


def _with_hashes(state: pa.Table) -> pa.Table:
    """Return a state with the hashes of its users, which older folders do not keep."""
    known = USER_HASH in state.column_names
    return state if known else state.add_column(1, USER_HASH, pa.array(hashes_of(state), pa.uint64()))


def _with_older(newest: pa.Table, older: pa.Table) -> pa.Table:
    """Return the rows of an older state whose users the newer does not know, followed by the newer ones."""
    newest = newest.take(pa.array(np.argsort(newest[USER_HASH].to_numpy(), kind="stable")))
    stays = rows_of(newest, one_array(older[USER_ID]), older[USER_HASH].to_numpy()) < 0
    return pa.concat_tables([older.filter(pa.array(stays)), newest.select(older.column_names).cast(older.schema)])
