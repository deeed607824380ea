"""Files of a data folder beside the sessions: catalogue, request transform, counts of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.etl import item_table
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    FIRST_ITEM_ROW,
    ITEM_ID,
    NULL_ROW,
    UNKNOWN_ROW,
)


class Written(NamedTuple):
    """What the splits hold."""

    rows: Mapping[str, int]
    """Rows per split."""
    longest: int
    """Events of the longest session."""
    train_counts: Ints
    """Events of the training split, [item index]."""


REPORT_FILE = "etl.json"
"""Marker file of a data folder."""
WORKFLOW_FOLDER = "workflow"
REQUEST_FOLDER = "request_workflow"
NVTABULAR_FOLDER = "nvtabular_workflow"
TRANSFORM_FORMAT = 1


def write_catalogue(catalogue: Catalogue, train_counts: Ints, folder: Path) -> None:
    """Write the catalogue with its popularity: events of the training split, [item index], reserved rows included."""
    item_table.with_train_count(catalogue, train_counts[FIRST_ITEM_ROW:]).save(folder / CATALOGUE_FOLDER)


def request_transform(
    id_type: pa.DataType, n_items: int, max_sequence_length: int, features: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what serving does with the raw ids and event features of a request, as plain data.

    Parameters
    ----------
    id_type : pyarrow.DataType
        Of the raw item ids; the ids themselves are those of the catalogue, in its order.
    n_items : int
    max_sequence_length : int
        Number of last items of a request that the model reads.
    features : mapping
        From `feature_codes`.
    """
    return {
        "format": TRANSFORM_FORMAT,
        "item_id": {
            "column": ITEM_ID,
            "type": "int64" if pa.types.is_integer(id_type) else "string",
            "items": n_items,
            "null_row": NULL_ROW,
            "unknown_row": UNKNOWN_ROW,
            "first_row": FIRST_ITEM_ROW,
        },
        "max_sequence_length": max_sequence_length,
        "features": dict(features),
    }


def feature_codes(features: Sequence[str], categories: Mapping[str, pd.Series]) -> dict[str, Any]:
    """Return how event features of a request are encoded: the raw values of codes 3, 4, …; numbers are unchanged."""
    numbers = {name: {"kind": "continuous"} for name in features if name not in categories}
    return numbers | {name: {"kind": "categorical", "values": v.tolist()} for name, v in categories.items()}


def data_counts(catalogue: Catalogue, train_counts: Ints, rows: Mapping[str, int]) -> dict[str, Any]:
    """Return the counts of ``etl.json`` beside those of events and users.

    Parameters
    ----------
    catalogue : Catalogue
        Of the data folder.
    train_counts : ndarray [item index]
        As in `write_catalogue`.
    rows : mapping of str to int
        Rows per split.
    """
    return {
        "items": catalogue.n_items,
        "cold_items": int((train_counts[FIRST_ITEM_ROW:] == 0).sum()),
        "sessions": dict(rows),
        "modalities": {name: int(modality.present.sum()) for name, modality in catalogue.modalities.items()},
    }
