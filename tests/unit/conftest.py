"""A data folder small enough to read: twelve items, two modalities, one item without picture, forty sessions."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.data.catalogue import Catalogue, Modality

N_ITEMS = 12


def _walk(user: int, length: int) -> list[int]:
    """Items in a circle, so that the next one can be learned."""
    return [3 + (user + step) % N_ITEMS for step in range(length)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    sessions = {
        split: [_walk(user, length) for user in range(40)]
        for split, length in (("train", 6), ("valid", 7), ("test", 8))
    }
    counts = np.bincount(np.concatenate(sessions["train"]), minlength=N_ITEMS + 3)
    vectors = {
        name: rng.normal(size=(N_ITEMS + 3, width)).astype(np.float32) for name, width in (("text", 8), ("image", 5))
    }
    modalities = {}
    for name, table in vectors.items():
        table[:3] = 0
        present = np.arange(N_ITEMS + 3) >= 3
        if name == "image":
            present[5] = False
            table[5] = 0
        modalities[name] = Modality(table, present, {"name": "random"})
    items = pa.table(
        {
            "item_id": [f"P{i}" for i in range(N_ITEMS)],
            "train_count": counts[3:],
            "title": [f"thing {i}" for i in range(N_ITEMS)],
        }
    )
    Catalogue(items, modalities).save(folder / "catalogue")
    for split, lists in sessions.items():
        (folder / split).mkdir()
        table = pa.table({"user_id": np.arange(len(lists)), "item_id-list": pa.array(lists, pa.list_(pa.int64()))})
        pq.write_table(table, folder / split / "part_0.parquet")
    (folder / "etl.json").write_text(json.dumps({"format": 1}))
    return folder
