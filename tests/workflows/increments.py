"""Random events and increments, and comparison of two data folders: shared by the tests of incremental updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, settings

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.session_files import read_rows
from missrec_t4r.schema import SPLITS

OPTIONS: list[dict[str, Any]] = [
    {},
    {"drop_duplicates": True, "max_events": 3},
    {"unknown_items": "drop", "split": "time"},
    {"session_gap": "20s", "event_weights": "cart=3,gift=0", "time_features": "gap,hour"},
]
SOME = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
NEW_ITEMS = pd.DataFrame(
    {"item_id": ["desk", "rug", "lute"], "title": ["old desk", "a rug", "a lute"], "price": [1.0, 30.0, 7.0]}
)


def shop(
    seed: int, size: int, users: int = 8, items: tuple[str, ...] = ("lamp", "desk", "sofa", "rug")
) -> pd.DataFrame:
    """Return random events with equal times, of users who return."""
    chance = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user_id": chance.choice([f"user {n}" for n in range(users)], size),
            "item_id": chance.choice(items, size),
            "timestamp": chance.integers(0, 300, size),
            "event_type": chance.choice(["view", "cart", "gift"], size, p=[0.7, 0.2, 0.1]),
            "dwell": chance.random(size).astype("float32"),
        }
    )


def increment(folder: Path, number: int, seed: int, *, size: int = 30) -> Path:
    """Write an increment: events of old and new users and items, some of them late, and a new event type."""
    events = shop(seed + number, size, 8 + 2 * number, ("lamp", "rug", "mat", f"new {number}"))
    if number == 2:
        events.loc[0, "event_type"] = "return"
    folder.mkdir(parents=True, exist_ok=True)
    events.to_parquet(folder / f"increment-{number}.parquet", index=False)
    return folder / f"increment-{number}.parquet"


def raw_rows(data: Path, split: str) -> dict[Any, dict[str, Any]]:
    """Return the rows by user and session, items and categories as raw values, independent of their codes."""
    catalogue = Catalogue.load(data / "catalogue")
    features = json.loads((data / "session_transform.json").read_text())["features"]
    found = {}
    names = pq.read_schema(next((data / split).glob("*.parquet"))).names
    for row in read_rows(data / split, names).to_pylist():
        row["item_id-list"] = catalogue.ids_of(row["item_id-list"])
        for name, described in features.items():
            if described["kind"] == "categorical":
                row[f"{name}-list"] = [described["values"][code - 3] for code in row[f"{name}-list"]]
        found[row["user_id"], row.get("session_id", 0)] = row
    return found


def counted(data: Path) -> dict[str, Any]:
    """Return the counts of a folder's report."""
    report = json.loads((data / "etl.json").read_text())
    return {name: report[name] for name in ("events", "users", "items", "cold_items", "sessions", "modalities")}


def content(data: Path) -> dict[str, Any]:
    """Return everything that readers of a folder see, in order."""
    names = pq.read_schema(next((data / "train").glob("*.parquet"))).names
    catalogue = Catalogue.load(data / "catalogue")
    texts = ["schema.pbtxt", "test/schema.pbtxt", "session_transform.json"]
    texts += ["workflow/workflow.json", "request_workflow/workflow.json"]
    return {
        "rows": {split: read_rows(data / split, names) for split in SPLITS},
        "items": catalogue.items,
        "vectors": {name: modality.vectors.tolist() for name, modality in catalogue.modalities.items()},
        "counted": counted(data),
        "texts": {name: (data / name).read_text() for name in texts},
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert equal content, part by part."""
    for split, rows in one["rows"].items():
        assert rows.schema == other["rows"][split].schema, split
        assert rows.to_pylist() == other["rows"][split].to_pylist(), split
    assert one["items"].to_pylist() == other["items"].to_pylist()
    for part in ("vectors", "counted", "texts"):
        assert one[part] == other[part], part
