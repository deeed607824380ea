"""The test shop: small catalogues with given or random vectors, sessions on a circle, and data folders around them.

Suites differ in the number of items, in the columns that they need, and in the items that lack a modality. These are
parameters here; what only one suite needs stands in that suite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, ITEM_LIST, LIST_SUFFIX, TRAIN_COUNT, USER_ID

LENGTHS = {"train": 6, "valid": 7, "test": 8}
"""Items per session of the splits of `write_circle`: each split adds the next item."""


def modality(vectors: npt.NDArray[Any], without: Iterable[int] = (), **encoder: str) -> Modality:
    """Return a modality; the reserved rows and the rows in ``without`` have no vector."""
    present = np.arange(len(vectors)) >= FIRST_ITEM_ROW
    present[list(without)] = False
    return Modality(np.where(present[:, None], vectors, 0).astype(np.float32), present, encoder)


def random_modalities(
    n_items: int, widths: Mapping[str, int], seed: int, without: Mapping[str, Iterable[int]] | None = None
) -> dict[str, Modality]:
    """Return modalities with normally distributed vectors; ``without`` holds the rows that lack one, by modality."""
    rng = np.random.default_rng(seed)
    vectors = {name: rng.normal(size=(n_items + FIRST_ITEM_ROW, width)) for name, width in widths.items()}
    return {
        name: modality(values, (without or {}).get(name, ()), name=f"random-{name}") for name, values in vectors.items()
    }


def catalogue(
    ids: Sequence[str] | Sequence[int],
    modalities: Mapping[str, Modality],
    counts: npt.ArrayLike,
    columns: Mapping[str, Sequence[object]] | None = None,
) -> Catalogue:
    """Return a catalogue of items with training counts and business columns."""
    table = {ITEM_ID: pa.array(ids), TRAIN_COUNT: pa.array(np.asarray(counts, np.int64))}
    return Catalogue(pa.table(table | {name: pa.array(values) for name, values in (columns or {}).items()}), modalities)


def counts_of(sessions: Iterable[Sequence[int]], n_items: int) -> npt.NDArray[np.int64]:
    """Return how often each item occurs, [item]."""
    return np.bincount(np.concatenate([*sessions]), minlength=n_items + FIRST_ITEM_ROW)[FIRST_ITEM_ROW:]


def circle(n_items: int, n_users: int, length: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Return sessions in which item follows item around a circle, so that the next one can be learned.

    ``order`` is the position of every item on the circle, by default that of its row.
    """
    row_at = np.argsort(np.arange(n_items) if order is None else order) + FIRST_ITEM_ROW
    return [[int(row_at[(user + step) % n_items]) for step in range(length)] for user in range(n_users)]


def write_split(
    folder: Path, sessions: Sequence[Sequence[int]], features: Mapping[str, Any] | None = None, users: str = ""
) -> Path:
    """Write sessions and their event features as one parquet file; users are numbers or, with a prefix, texts."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(sessions))
    columns = {USER_ID: pa.array([f"{users}{number}" for number in numbers] if users else numbers)}
    columns[ITEM_LIST] = pa.array(sessions, pa.list_(pa.int64()))
    for name, values in (features or {}).items():
        columns[name + LIST_SUFFIX] = values if isinstance(values, pa.Array) else pa.array(values)
    pq.write_table(pa.table(columns), folder / "part_0.parquet")
    return folder / "part_0.parquet"


def write_circle(
    folder: Path,
    ids: Sequence[str] | Sequence[int],
    modalities: Mapping[str, Modality],
    *,
    n_users: int = 40,
    order: Sequence[int] | None = None,
    columns: Mapping[str, Sequence[object]] | None = None,
) -> Path:
    """Write a data folder whose sessions walk around the `circle` of its items; return it."""
    splits = {split: circle(len(ids), n_users, length, order) for split, length in LENGTHS.items()}
    items = catalogue(ids, modalities, counts_of(splits["train"], len(ids)), columns)
    items.save(folder / CATALOGUE_FOLDER)
    for split, sessions in splits.items():
        write_split(folder / split, sessions)
    return folder
