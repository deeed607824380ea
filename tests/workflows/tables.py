"""Two small raw tables that fit on a screen, and how to read a data folder back."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

# lamp = row 3, desk = row 4, sofa = row 5, vase = row 6: the order of the item table, not of frequency.
ITEMS = pd.DataFrame(
    {
        "item_id": ["lamp", "desk", "sofa", "vase"],
        "title": ["a lamp", "a desk", None, "a vase"],
        "price": [10.0, 200.0, 900.0, 5.0],
    }
)

# ben's events stand backwards and are sorted; cem has too few events for a validation and a test row.
EVENTS = pd.DataFrame(
    [
        ("ann", "sofa", 10, "view", 1.0, "x"),
        ("ben", "desk", 50, "cart", 0.5, "x"),
        ("ann", "lamp", 20, "view", 2.0, "x"),
        ("ben", "sofa", 30, "view", 0.0, "y"),
        ("ann", "sofa", 30, "cart", 3.0, "y"),
        ("cem", "lamp", 25, "view", 1.0, "x"),
        ("ann", "desk", 40, "view", 4.0, "y"),
        ("ben", "lamp", 40, "view", 9.0, "y"),
        ("cem", "vase", 26, "view", 7.0, "y"),
    ],
    columns=["user_id", "item_id", "timestamp", "event_type", "dwell", "split"],
)


def write(folder: Path, events: pd.DataFrame = EVENTS, items: pd.DataFrame = ITEMS) -> tuple[Path, Path]:
    """Write both tables as parquet and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    events.to_parquet(folder / "events.parquet", index=False)
    items.to_parquet(folder / "items.parquet", index=False)
    return folder / "events.parquet", folder / "items.parquet"


def rows(data: Path, split: str) -> dict[Any, dict[str, list[Any]]]:
    """Return the sessions of a split: user -> list columns without their suffix."""
    lines = [line for file in sorted((data / split).glob("*.parquet")) for line in pq.read_table(file).to_pylist()]
    return {
        line["user_id"]: {name.removesuffix("-list"): value for name, value in line.items() if name != "user_id"}
        for line in lines
    }


def items_of(data: Path, split: str) -> dict[Any, list[int]]:
    """Return the item rows of a split by user."""
    return {user: columns["item_id"] for user, columns in rows(data, split).items()}


@contextmanager
def few_open_files(more: int = 10) -> Iterator[None]:
    """Let this process open so many files at a time beside those that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def save_vectors(file: Path, values: Any) -> Path:
    """Write a modality file."""
    np.save(file, np.asarray(values, np.float32))
    return file
