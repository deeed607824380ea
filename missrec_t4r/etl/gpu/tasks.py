"""Tasks on partitions of the users, each in the memory of one GPU.

    shuffle_chunk      per chunk      complete events, sorted into the partition of their user's hash
    survey_events      per partition  counts for the findings; users and items, where rare ones are to be left out
    count_events       per partition  what is left after the filters: values of categories, nulls, the newest event
    write_splits       per partition  sessions by the NVTabular workflow, rows of train, valid and test

A task reads and writes files of the working folder and returns a small result, so that `engine.executor` runs it in
this process or on another GPU. `partitions.py` puts the results together. Every stage adds its settings to the folder:

    plan.json          names of the columns (`Columns`), chunks, number of partitions, settings
    survey.json        what was seen of all events (`Seen`)
    split.json         settings with the boundaries of a time split, number of item indices
    items.parquet      ids of the catalogue before rare ones are left out
    shuffle/           per chunk and partition: events
    filter/, kept/     per partition: users and items of the events; which events are kept
    workflow/          the fitted workflow
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from merlin.core.utils import set_dask_client

from missrec_t4r.arrays import Ints
from missrec_t4r.etl import splits
from missrec_t4r.etl.dataframe import Frame, ListColumn
from missrec_t4r.etl.engine import workdir
from missrec_t4r.etl.event_settings import weighted_events
from missrec_t4r.etl.gpu import device as gpu
from missrec_t4r.etl.gpu.read import Columns, Seen, read_complete, with_types
from missrec_t4r.etl.item_table import filters_rare
from missrec_t4r.etl.nvt import workflows
from missrec_t4r.etl.nvt.serialization import load_workflow
from missrec_t4r.etl.nvt.session_ops import ragged_index, take
from missrec_t4r.etl.nvt.workflow_file import refuse_uneven_lists
from missrec_t4r.etl.outputs import Written
from missrec_t4r.etl.quality import checks
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, ITEM_LIST, LIST_SUFFIX, SPLITS, TIMESTAMP, USER_ID

SURVEY_FILE, SPLIT_FILE = "survey.json", "split.json"
FITTED_FOLDER, TIMES_FOLDER = "workflow", "times"
_SESSIONS_PER_FILE = 5_000_000
"""A file is compressed by one kernel after the other: few large ones are faster to write than many."""


def free_memory() -> int:
    """Return the bytes that can be allocated on this task's GPU."""
    return gpu.open_device().free_memory()


@workdir.resumable(workdir.SHUFFLE_FOLDER)
def shuffle_chunk(work: str, chunk: int) -> dict[str, Any]:
    """Write the complete events of a chunk, a file per partition.

    Returns
    -------
    dict
        ``seen`` and ``texts`` of `read_complete`, events per partition, ids of unknown items by first occurrence.
    """
    (plan, columns), device = _load_plan(work), gpu.open_device()
    file, row_groups = plan["chunks"][chunk]
    frame, seen, texts = read_complete(device, [Path(file)], columns, row_groups)
    unknown: list[Any] = []
    bounds = np.zeros(plan["partitions"] + 1, np.int64)
    if len(frame):
        in_table = frame[ITEM_ID].isin(_items(work, device))
        unknown = device.to_arrow(frame[ITEM_ID][~in_table].drop_duplicates()).to_pylist()
        partition = device.partition(frame[USER_ID], plan["partitions"])
        frame = frame.take(device.xp.argsort(partition, kind="stable")).reset_index(drop=True)  # ties in input order
        bounds[1:] = np.cumsum(device.host(device.xp.bincount(partition, minlength=plan["partitions"])))
    for number, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        if end > start:
            target = Path(work) / workdir.SHUFFLE_FOLDER / f"{number:05}-{chunk:05}.parquet"
            device.write_parquet(frame.iloc[start:end], target, compression=None)
    return {"seen": seen, "texts": texts, "sizes": np.diff(bounds).tolist(), "unknown": unknown}


def survey_events(work: str, partition: int) -> dict[str, int]:
    """Return the counts of a partition for the findings: `checks.count_events`, events, events on unknown items.

    If rare users or items are to be left out, users and items of the events are written for `keep_frequent`.
    """
    (plan, _), device = _load_plan(work), gpu.open_device()
    frame = _read_partition(work, partition, device)
    duplicate = frame.duplicated(list(checks.KEYS))
    counts = checks.count_events(frame, duplicate)
    if plan["settings"]["drop_duplicates"]:
        frame = frame[~duplicate].reset_index(drop=True)
    codes, distinct = device.factorize(frame[ITEM_ID])
    ids = workdir.read_item_ids(work)
    index = pc.index_in(device.to_arrow(distinct).cast(ids.type), value_set=ids)  # [distinct id]
    index = index.fill_null(-FIRST_ITEM_ROW).to_numpy() + FIRST_ITEM_ROW
    items = device.host(device.xp.asarray(index)[codes])  # [event]: item index, 0 where it has none
    unknown = (items == 0) | (items >= FIRST_ITEM_ROW + plan["items"])
    counts |= {"events": len(frame), "unknown_item_events": int(unknown.sum())}
    if filters_rare(plan["settings"]):
        users = device.host(device.factorize(frame[USER_ID])[0])
        with atomic_write_file(workdir.partition_path(work, workdir.FILTER_FOLDER, partition, "npz")) as temporary:
            np.savez(temporary, users=users.astype(np.int32), items=items.astype(np.int32), eligible=items > 0)
    return counts


def count_events(work: str, partition: int) -> dict[str, Any]:
    """Return what a partition contributes after the filters: events, users, newest time, nulls, values of categories.

    The times are written if the boundaries of a time split depend on them.
    """
    (plan, columns), device = _load_plan(work), gpu.open_device()
    frame = _filtered(work, partition, device)
    if not len(frame):
        return {"events": 0}
    if splits.needs_times(plan["settings"]):
        with atomic_write_file(workdir.partition_path(work, TIMES_FOLDER, partition, "npy")) as temporary:
            np.save(temporary, device.host(device.array(frame[TIMESTAMP])))
    nulls = checks.count_nulls(frame, columns.features)
    filled = checks.without_nulls(frame, columns.features, columns.categorical)
    values = checks.count_values(filled, columns.features, columns.categorical)
    return {
        "events": len(frame),
        "users": int(frame[USER_ID].nunique()),
        "newest": float(frame[TIMESTAMP].max()),
        "nulls": nulls,
        "values": values,
    }


@workdir.resumable(workdir.SPLIT_FOLDER)
def write_splits(work: str, partition: int) -> dict[str, Any]:
    """Write a partition's rows of every split, and how often each item occurs in its training rows.

    Returns
    -------
    dict
        Rows per split, and the events of the longest session.
    """
    split, device = read_json(Path(work) / SPLIT_FILE), gpu.open_device()
    frame, workflow = clean_events(work, partition), load_workflow(Path(work) / FITTED_FOLDER)
    set_dask_client(None)  # on a worker of a cluster Merlin, and dask itself, would look for the cluster
    with dask.config.set(scheduler="synchronous"):
        sessions = workflows.transform_dataset(workflow, frame, 1, USER_ID) if len(frame) else frame
    written = write_rows(
        device, sessions, split, Path(work) / workdir.OUTPUT_FOLDER, split["rows"], f"part_{partition:05}"
    )
    np.save(workdir.partition_path(work, workdir.SPLIT_FOLDER, partition, "npy"), written.train_counts)
    return {"sessions": written.rows, "longest": written.longest}


def write_rows(
    device: gpu.CudfDevice,
    sessions: Frame,
    settings: Mapping[str, Any],
    folder: Path,
    n_rows: int,
    prefix: str = "part",
) -> Written:
    """Write the rows of every split; a split may have none.

    Parameters
    ----------
    device : CudfDevice
        Of the frame.
    sessions : Frame
        Output of the session workflow; list columns end in ``-list``.
    settings : mapping
        Of the run, with the boundaries of a time split.
    folder : Path
        Data folder.
    n_rows : int
        Item indices of the catalogue, reserved ones included.
    prefix : str
        Beginning of the files' names.

    Raises
    ------
    SchemaError, ConfigError
        Lists differ in length, or the boundaries are in the wrong order.
    """
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    if not len(sessions):
        return Written(dict.fromkeys(SPLITS, 0), 0, np.zeros(n_rows, np.int64))
    xp = device.xp
    lists = {name: device.take_apart(sessions[name]) for name in sessions.columns if name.endswith(LIST_SUFFIX)}
    offsets = lists[ITEM_LIST].offsets.astype("int64")  # [session + 1]
    refuse_uneven_lists([name for name, column in lists.items() if not bool((column.offsets == offsets).all())])
    times = TIMESTAMP + LIST_SUFFIX
    lengths = splits.prefix_lengths(offsets, lambda: device.array(lists[times].values), settings, xp)
    written, train_counts = {}, np.zeros(n_rows, np.int64)
    for split in SPLITS:
        rows = xp.flatnonzero(lengths[split])
        written[split] = len(rows)
        if not len(rows):
            continue
        index, ends = ragged_index(offsets[:-1][rows], lengths[split][rows], xp)  # [event], [row + 1]
        columns = {
            name: device.build(ListColumn(take(lists[name].values, index), ends))
            if name in lists
            else take(sessions[name], rows)
            for name in sessions.columns
        }
        frame = type(sessions)(columns)
        for part, start in enumerate(range(0, len(frame), _SESSIONS_PER_FILE)):
            rows_of_file = frame.iloc[start : start + _SESSIONS_PER_FILE]
            device.write_parquet(rows_of_file, folder / split / f"{prefix}_{part}.parquet")
        if split == "train":
            items = device.array(take(lists[ITEM_LIST].values, index))
            train_counts = device.host(xp.bincount(items, minlength=n_rows)).astype("int64")
    return Written(written, int(xp.diff(offsets).max()), train_counts)


def clean_events(work: str, partition: int) -> Frame:
    """Return the events of a partition that the workflow transforms, in input order; there may be none."""
    (plan, columns), frame = _load_plan(work), _filtered(work, partition, gpu.open_device())
    return weighted_events(checks.without_nulls(frame, columns.features, columns.categorical), plan["settings"])


def _load_plan(work: str) -> tuple[dict[str, Any], Columns]:
    plan = read_json(Path(work) / workdir.PLAN_FILE)
    return plan, Columns(*plan["columns"])


def _read_partition(work: str, partition: int, device: gpu.CudfDevice) -> Frame:
    """Return the complete events of a partition, in input order, in the types of all events."""
    _, columns = _load_plan(work)
    files = sorted((Path(work) / workdir.SHUFFLE_FOLDER).glob(f"{partition:05}-*.parquet"))  # by chunk
    seen = Seen(*read_json(Path(work) / SURVEY_FILE)["seen"])
    return with_types(device.read_parquet(files, list(columns.raw)), columns, seen)


def _filtered(work: str, partition: int, device: gpu.CudfDevice) -> Frame:
    """Return a partition's events without those that the settings leave out."""
    plan, _ = _load_plan(work)
    frame = _read_partition(work, partition, device)
    if plan["settings"]["drop_duplicates"]:
        frame = frame[~frame.duplicated(list(checks.KEYS))].reset_index(drop=True)
    if filters_rare(plan["settings"]):  # unknown items are left out there
        kept: Ints = np.flatnonzero(np.load(workdir.partition_path(work, workdir.KEPT_FOLDER, partition, "npy")))
        return frame.take(device.xp.asarray(kept)).reset_index(drop=True)
    if plan["settings"]["unknown_items"] == "drop":
        frame = frame[frame[ITEM_ID].isin(_items(work, device))].reset_index(drop=True)
    return frame


def _items(work: str, device: gpu.CudfDevice) -> Any:
    return device.from_arrow(pa.table({ITEM_ID: workdir.read_item_ids(work)}))[ITEM_ID]
