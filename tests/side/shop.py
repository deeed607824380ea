"""A shop where the next item cannot be told without a side feature: the item alone says nothing about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue, Modality

N_ITEMS = 24
STEPS = {3: 1, 4: 5, 5: 11}
"""Where an event of a code leads: so many items ahead in the catalogue."""
WIDTH = 4
"""Of the pre-trained vectors."""

SCHEMA = """
feature { name: "user_id" type: BYTES annotation { tag: "id" tag: "user" } }
feature {
  name: "item_id-list" type: INT int_domain { name: "item_id" max: 26 is_categorical: true }
  annotation { tag: "id" tag: "item" tag: "categorical" tag: "list" tag: "sequence" }
}
feature { name: "timestamp-list" type: INT annotation { tag: "time" tag: "list" } }
feature {
  name: "event_type-list" type: INT int_domain { name: "event_type" max: 5 is_categorical: true }
  annotation { tag: "categorical" tag: "list" }
}
feature { name: "dwell-list" type: FLOAT annotation { tag: "continuous" tag: "list" } }
feature { name: "scene-list" type: FLOAT annotation { tag: "embedding" tag: "list" } }
feature { name: "age" type: INT annotation { tag: "continuous" } }
"""


def catalogue() -> Catalogue:
    """Return items without any order in their texts."""
    vectors = np.random.default_rng(2).normal(size=(N_ITEMS + 3, 8)).astype(np.float32)
    present = np.arange(N_ITEMS + 3) >= 3
    items = pa.table({"item_id": [f"i{row}" for row in range(N_ITEMS)], "train_count": np.full(N_ITEMS, 9)})
    return Catalogue(items, {"text": Modality(vectors * present[:, None], present)})


def sessions(n: int, seed: int) -> dict[str, list[list[object]]]:
    """Return columns of sessions; only the event type tells the next item, dwell time and scene are noise."""
    rng = np.random.default_rng(seed)
    scenes = np.eye(WIDTH, dtype=np.float32)[:3] * 2
    table: dict[str, list[list[object]]] = {name: [] for name in ("item_id", "event_type", "dwell", "scene")}
    for _ in range(n):
        length = int(rng.integers(3, 8))
        codes, others = rng.integers(3, 6, length), rng.integers(3, 6, length)
        items = [int(rng.integers(N_ITEMS))]
        for code in codes[:-1]:
            items.append((items[-1] + STEPS[int(code)]) % N_ITEMS)
        table["item_id"].append([item + 3 for item in items])
        table["event_type"].append(codes.tolist())
        table["dwell"].append((10.0 ** (others - 3)).tolist())
        table["scene"].append([scenes[code - 3].tolist() for code in others])
    return table


def write(folder: Path, sizes: tuple[int, int, int] = (160, 40, 40)) -> Path:
    """Write a data folder, schema and all."""
    for seed, (split, size) in enumerate(zip(("train", "valid", "test"), sizes, strict=True)):
        columns = sessions(size, seed)
        lists = {f"{name}-list": pa.array(rows) for name, rows in columns.items()}
        times = pa.array([list(range(len(rows))) for rows in columns["item_id"]])
        (folder / split).mkdir(parents=True)
        users = pa.array([f"u{index}" for index in range(size)])
        pq.write_table(
            pa.table({"user_id": users, "timestamp-list": times, **lists}), folder / split / "part_0.parquet"
        )
    (folder / "schema.pbtxt").write_text(SCHEMA, encoding="utf-8")
    catalogue().save(folder / "catalogue")
    return folder
