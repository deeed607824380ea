"""The fitted request workflow at work: raw ids in, rows out, as NVTabular itself computes them.

Serving does not use it (`missrec_t4r.serving.session_transform` is compiled from it); export and tests use it to prove
that both give the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dask
import pandas as pd
from merlin.io import Dataset

from missrec_t4r.schema import ITEM_ID
from missrec_t4r.workflows.storage import load_workflow


def request_rows(workflow: Path, sessions: Sequence[Sequence[str | int | None]]) -> list[list[int]]:
    """Return the rows that a saved request workflow gives sessions of raw ids.

    Parameters
    ----------
    workflow : Path
        Folder ``request_workflow`` of a data folder.
    sessions : sequence of sequences
        Raw ids, None for an event without one.
    """
    frame = pd.DataFrame({ITEM_ID: pd.Series([list(session) for session in sessions], dtype=object)})
    with dask.config.set({"dataframe.convert-string": False}):  # True turns list columns into text
        transformed = load_workflow(workflow).transform(Dataset(frame)).to_ddf().compute(scheduler="synchronous")
    return [[int(row) for row in rows] for rows in transformed[ITEM_ID]]
