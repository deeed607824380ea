"""Data of the training benchmarks: Amazon Scientific's complete-modality subset, or a generated shop of its size.

A data folder holds ``interactions_mm_subset.parquet`` (user_id, item_id, timestamp, split), ``items.parquet`` and two
files of vectors whose rows follow the items, ``text_clip.npy`` and ``image_clip.npy``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import require_files
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.schema import FIRST_ITEM_ROW

FILES = {"text": "text_clip.npy", "image": "image_clip.npy"}
N_USERS, N_ITEMS, WIDTH = 2_928, 1_585, 512
"""Size of the generated shop: that of the subset."""


def load(data: Path | None) -> tuple[Catalogue, Sessions, Sessions]:
    """Return the catalogue, the training sessions and the test sessions (history and target).

    Parameters
    ----------
    data : Path, optional
        Data folder; without one the shop is generated, from a fixed seed.
    """
    users, items, splits, vectors = _generated() if data is None else _read(data)
    names, rows = np.unique(items, return_inverse=True)
    rows = rows.astype(np.int64) + FIRST_ITEM_ROW
    counts = np.bincount(rows[splits == "train"], minlength=len(names) + FIRST_ITEM_ROW)[FIRST_ITEM_ROW:]
    table = pa.table({"item_id": pa.array(names.astype(str)), "train_count": pa.array(counts)})
    present = np.arange(len(names) + FIRST_ITEM_ROW) >= FIRST_ITEM_ROW
    modalities = {
        name: Modality(np.concatenate([np.zeros((FIRST_ITEM_ROW, of.shape[1]), np.float32), of[names]]), present)
        for name, of in vectors.items()
    }
    return Catalogue(table, modalities), _sessions(users, rows, splits == "train"), _sessions(users, rows)


def require(data: Path) -> None:
    """Raise a `DataError` unless the data folder has the files."""
    names = ("interactions_mm_subset.parquet", "items.parquet", *FILES.values())
    require_files(data, names, "the files of Amazon Scientific's subset", "see --data; without it a shop is generated")


def _read(data: Path) -> tuple[npt.NDArray, npt.NDArray[np.int64], npt.NDArray, dict[str, npt.NDArray[np.float32]]]:  # type: ignore[type-arg]
    require(data)
    events = pq.read_table(data / "interactions_mm_subset.parquet").sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )
    order = {item: index for index, item in enumerate(pq.read_table(data / "items.parquet")["item_id"].to_pylist())}
    items = np.array([order[item] for item in events["item_id"].to_pylist()], np.int64)
    vectors = {name: np.load(data / file).astype(np.float32) for name, file in FILES.items()}
    _, users = np.unique(events["user_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    return users, items, events["split"].to_numpy(zero_copy_only=False).astype(str), vectors


def _generated() -> tuple[npt.NDArray, npt.NDArray[np.int64], npt.NDArray, dict[str, npt.NDArray[np.float32]]]:  # type: ignore[type-arg]
    """Draw sessions of three to forty events with the subset's mean of 6.7, within topics, which the vectors encode."""
    rng = np.random.default_rng(0)
    topics = rng.integers(0, 40, N_ITEMS)
    lengths = np.minimum(5 + rng.geometric(1 / 2.75, N_USERS) - 1, 40)
    users = np.repeat(np.arange(N_USERS), lengths)
    popularity = (1 / (1 + rng.permutation(N_ITEMS))) ** 0.8
    by_topic = [np.flatnonzero(topics == topic) for topic in range(40)]
    weights = [popularity[members] / popularity[members].sum() for members in by_topic]
    items = np.concatenate(
        [rng.choice(by_topic[t], n, p=weights[t]) for t, n in zip(rng.integers(0, 40, N_USERS), lengths, strict=True)]
    )
    ends = np.cumsum(lengths)
    splits = np.full(len(users), "train", dtype="<U5")
    splits[ends - 1], splits[ends - 2] = "test", "valid"
    centres = {name: rng.normal(size=(40, WIDTH)) for name in FILES}
    vectors = {
        name: (centre[topics] + rng.normal(size=(N_ITEMS, WIDTH))).astype(np.float32) * 0.4
        for name, centre in centres.items()
    }
    return users, items, splits, vectors


def _sessions(users: npt.NDArray, rows: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_] | None = None) -> Sessions:  # type: ignore[type-arg]
    if chosen is not None:
        users, rows = users[chosen], rows[chosen]
    counts = np.bincount(users)
    return Sessions(rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
