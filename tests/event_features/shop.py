"""A shop where the next item depends on an event feature alone: the item does not determine it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from missrec_t4r.data.catalogue import Catalogue
from tests.shop import make_catalogue, random_modalities, write_split

N_ITEMS = 24
STEPS = {3: 1, 4: 5, 5: 11}
"""Code of an event -> distance of the next item in the catalogue."""
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
    """Return items with random text vectors."""
    modalities = random_modalities(N_ITEMS, {"text": 8}, seed=2)
    return make_catalogue([f"i{row}" for row in range(N_ITEMS)], modalities, np.full(N_ITEMS, 9))


def sessions(n: int, seed: int) -> dict[str, list[list[object]]]:
    """Return columns of sessions; only the event type determines the next item, dwell time and scene are noise."""
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
        rows: list[list[int]] = columns.pop("item_id")  # type: ignore[assignment]  # items are integers
        times = [list(range(len(session))) for session in rows]
        write_split(folder / split, rows, {"timestamp": times, **columns}, users="u")
    (folder / "schema.pbtxt").write_text(SCHEMA, encoding="utf-8")
    catalogue().save(folder / "catalogue")
    return folder
