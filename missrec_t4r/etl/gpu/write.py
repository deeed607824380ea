"""Write the splits of sessions from the GPU: prefixes of the lists, encoded as parquet there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.etl import splits
from missrec_t4r.etl.dataframe import Frame, ListColumn, Series
from missrec_t4r.etl.gpu.device import CudfDevice
from missrec_t4r.etl.nvt.session_ops import ragged_index
from missrec_t4r.etl.nvt.workflow_file import refuse_uneven_lists
from missrec_t4r.etl.outputs import Written
from missrec_t4r.schema import ITEM_LIST, LIST_SUFFIX, SPLITS, TIMESTAMP

_SESSIONS_PER_FILE = 5_000_000
"""A file is compressed by one kernel after the other: few large ones are faster to write than many."""


def write_splits(
    device: CudfDevice, sessions: Frame, settings: Mapping[str, Any], folder: Path, n_rows: int, prefix: str = "part"
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
            name: device.build(ListColumn(_take(lists[name].values, index), ends))
            if name in lists
            else _take(sessions[name], rows)
            for name in sessions.columns
        }
        frame = type(sessions)(columns)
        for part, start in enumerate(range(0, len(frame), _SESSIONS_PER_FILE)):
            rows_of_file = frame.iloc[start : start + _SESSIONS_PER_FILE]
            device.write_parquet(rows_of_file, folder / split / f"{prefix}_{part}.parquet")
        if split == "train":
            items = device.array(_take(lists[ITEM_LIST].values, index))
            train_counts = device.host(xp.bincount(items, minlength=n_rows)).astype("int64")
    return Written(written, int(xp.diff(offsets).max()), train_counts)


def _take(column: Series, index: Any) -> Series:
    return column.take(index).reset_index(drop=True)
