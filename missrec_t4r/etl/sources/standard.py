"""Shared by the importers of public data sets: cleaning as in the benchmarks, leave-one-out, files for the ETL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError
from missrec_t4r.etl import event_arithmetic
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.io.atomic import atomic_write_dir, refuse_unmanaged
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

REPORT_FILE = "import.json"
SPLIT = "split"


def clean_events(events: pd.DataFrame, findings: Findings, *, k_core: int, keep_repeats: bool = False) -> pd.DataFrame:
    """Return complete events sorted by user and time, without copies and repeats, k-core filtered.

    Parameters
    ----------
    events : DataFrame
        ``user_id``, ``item_id``, ``timestamp`` and further columns. Ties of time keep the order of the file.
    k_core : int
        Drop users and items with fewer events, repeatedly until all have as many; 0 is off.
    keep_repeats : bool
        Keep a user's later events on the same item; copies of an event (user, item and time) are always dropped.

    Raises
    ------
    DataError
        No event is left.
    """
    complete = events[[USER_ID, ITEM_ID, TIMESTAMP]].notna().all(axis=1)
    findings.add("incomplete_events", int((~complete).sum()), "events without user, item or time are left out")
    events = events[complete].sort_values([USER_ID, TIMESTAMP], kind="stable")
    copies = events.duplicated([USER_ID, ITEM_ID, TIMESTAMP])
    findings.add("duplicate_events", int(copies.sum()), "copies of one event are left out")
    events = events[~copies]
    if not keep_repeats:
        repeated = events.duplicated([USER_ID, ITEM_ID])
        findings.add("repeated_events", int(repeated.sum()), "later events of a user on the same item are left out")
        events = events[~repeated]
    if k_core > 1:
        codes = [pd.factorize(events[name])[0] for name in (USER_ID, ITEM_ID)]
        events = events[event_arithmetic.core(codes, k_core)]
    if events.empty:
        raise DataError(f"the {k_core}-core of the data is empty", "at least one event", "lower --k-core")
    return events.reset_index(drop=True)


def leave_one_out(events: pd.DataFrame) -> pd.Series:
    """Return the split per event: a user's last event is test, the one before valid; with under three, all train.

    Examples
    --------
    >>> leave_one_out(pd.DataFrame({"user_id": [1, 1, 1, 2]})).tolist()
    ['train', 'valid', 'test', 'train']
    """
    users = events.groupby(USER_ID, sort=False)[USER_ID]
    from_end, size = users.cumcount(ascending=False), users.transform("size")
    split = np.select([(size >= 3) & (from_end == 0), (size >= 3) & (from_end == 1)], ["test", "valid"], "train")
    return pd.Series(split, index=events.index)


def write_dataset(
    out: Path,
    events: pd.DataFrame,
    items: pd.DataFrame,
    findings: Findings,
    source: dict[str, Any],
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write ``interactions.parquet``, ``items.parquet`` and ``import.json``, as one atomic folder.

    Items keep their order; items without events are dropped, items of events without metadata are appended with their
    id alone. ``dry_run`` only counts.

    Returns
    -------
    dict
        Counts, findings and the description of the source.
    """
    in_events = events[ITEM_ID].drop_duplicates()
    missing = in_events[~in_events.isin(items[ITEM_ID])]
    findings.add("items_without_metadata", len(missing), "items of events without metadata are appended with their id")
    items = items[items[ITEM_ID].isin(in_events)].drop_duplicates(ITEM_ID)
    if len(missing):
        items = pd.concat([items, pd.DataFrame({ITEM_ID: missing})], ignore_index=True)
    events = events.assign(**{SPLIT: leave_one_out(events)})
    report = {
        "source": source,
        "users": int(events[USER_ID].nunique()),
        "items": len(items),
        "events": len(events),
        "splits": {name: int(count) for name, count in events[SPLIT].value_counts().sort_index().items()},
        "with_text": int(items["text"].notna().sum()) if "text" in items else 0,
        "findings": findings.to_list(),
    }
    if dry_run:
        refuse_unmanaged(out, REPORT_FILE, "data set")
        would_write = [str(out / name) for name in ("interactions.parquet", "items.parquet", REPORT_FILE)]
        return {"dry_run": True, "out": str(out), **report, "would_write": would_write, "would_replace": out.exists()}
    with atomic_write_dir(out, REPORT_FILE, "data set") as folder:
        for name, frame in (("interactions", events), ("items", items)):
            pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / f"{name}.parquet")
        write_json(folder / REPORT_FILE, report)
    return {"out": str(out), **report}
