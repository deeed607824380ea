"""A shop small enough to read: 117 items in text and image, sessions with a category and a price per event."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from merlin.schema import ColumnSchema, Schema, Tags
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from tests.settings import EVERY_PART
from tests.shop import make_catalogue, random_modalities, write_split

N_ROWS = 120
"""117 items and the three reserved rows: T4R's Trainer takes the top 100, so fewer would break its own recipe too."""
N_CATEGORIES = 8
MAX_LENGTH = 6
"""Of a session that the model sees; the shop's sessions are shorter, as long and longer."""

SMALL = {"d_model": 16, "n_head": 2, "d_feedforward": 16, "dropout": 0.2}
"""The block's sizes."""


def catalogue() -> Catalogue:
    """Return the shop's items: every third has no image, row 5 has neither."""
    without = {"text": [5], "image": [5, *range(3, N_ROWS, 3)]}
    modalities = random_modalities(N_ROWS - 3, {"text": 7, "image": 5}, seed=5, without=without)
    return make_catalogue([f"item {row}" for row in range(3, N_ROWS)], modalities, np.full(N_ROWS - 3, 4))


def schema(event_features: bool = True, maximum: int = N_ROWS - 1) -> Schema:
    """Return the schema of a session row."""
    count = {"value_count": {"min": 0, "max": 20}}
    item = ColumnSchema(
        "item_id-list",
        dtype="int64",
        is_list=True,
        is_ragged=True,
        tags=[Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL, Tags.LIST],
        properties={"domain": {"min": 0, "max": maximum, "name": "item_id"}, **count},
    )
    category = ColumnSchema(
        "category-list",
        dtype="int64",
        is_list=True,
        is_ragged=True,
        tags=[Tags.CATEGORICAL, Tags.LIST],
        properties={"domain": {"min": 0, "max": N_CATEGORIES - 1, "name": "category"}, **count},
    )
    price = ColumnSchema(
        "price-list",
        dtype="float32",
        is_list=True,
        is_ragged=True,
        tags=[Tags.CONTINUOUS, Tags.LIST],
        properties=count,
    )
    return Schema([item, category, price] if event_features else [item])


def sessions(n: int, seed: int, longest: int = 9) -> list[list[int]]:
    """Return item rows: each session walks up the catalogue from a random start, in steps of one or two."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(rng.integers(2, longest + 1))
        steps = rng.integers(1, 3, length).cumsum() + rng.integers(0, N_ROWS)
        rows.append((3 + steps % (N_ROWS - 3)).tolist())
    return rows


def write_sessions(folder: Path, rows: list[list[int]]) -> Path:
    """Write one parquet file of sessions with their event features, and their schema."""
    features = {
        "category": [[row % N_CATEGORIES for row in session] for session in rows],
        "price": pa.array([[row / N_ROWS for row in session] for session in rows], pa.list_(pa.float32())),
    }
    path = write_split(folder, rows, features, users="user ")
    TensorflowMetadata.from_merlin_schema(schema()).to_proto_text_file(str(folder))
    return path


def config(**changes: object) -> MISSRecConfig:
    """Return the smallest model of every part."""
    sizes: dict[str, object] = {"max_sequence_length": MAX_LENGTH, "attention": "bidirectional", **EVERY_PART, **SMALL}
    return MISSRecConfig(**(sizes | changes))  # type: ignore[arg-type]  # checked by the config itself
