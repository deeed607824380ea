"""A tiny shop for the serving tests: thirty items, two modalities, some items without image, a random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_LIST, SCHEMA_FILE, SESSION_TRANSFORM_FILE
from tests.settings import EVERY_PART
from tests.shop import make_catalogue, random_modalities, write_split

N_ITEMS = 30
MAX_LENGTH = 8


def item_ids(integers: bool) -> list[str] | list[int]:
    """Ids that are neither sorted nor ASCII alone, so that order and encoding matter."""
    shuffled = np.random.default_rng(5).permutation(N_ITEMS)
    return [int(1000 - 7 * i) for i in shuffled] if integers else [f"ware-{i}-ü" for i in shuffled]


def catalogue(*, integers: bool = False) -> Catalogue:
    """Every item has text, two in three have an image; popularity falls with the row and has ties."""
    without = {"image": range(FIRST_ITEM_ROW, N_ITEMS + FIRST_ITEM_ROW, 3)}
    modalities = random_modalities(N_ITEMS, {"text": 12, "image": 6}, seed=3, without=without)
    columns = {
        "title": [f"Ware {i}" for i in range(N_ITEMS)],
        "brand": [None if i == 4 else f"brand {i % 4}" for i in range(N_ITEMS)],
        "price": [None if i == 7 else 10.0 + i for i in range(N_ITEMS)],
        "in_stock": [i % 5 != 0 for i in range(N_ITEMS)],
        "stars": [i % 6 for i in range(N_ITEMS)],
        "market": [["DE", "FR"] if i % 2 else ["FR"] if i % 4 else [] for i in range(N_ITEMS)],
    }
    return make_catalogue(item_ids(integers), modalities, [(N_ITEMS - i) // 3 for i in range(N_ITEMS)], columns)


def model_for(shop: Catalogue, **settings: object) -> MISSRec:
    """A small model with large random weights in every part, and discovered interests."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_head": 2, "d_feedforward": 8, "max_sequence_length": MAX_LENGTH}
    config = Recipe.from_dict({"name": "tiny", "model": EVERY_PART | sizes | settings}).model
    assert isinstance(config, MISSRecConfig)
    model = build_missrec(config, shop).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.discover_interests(seed=1)
    return model


def data_folder(folder: Path, shop: Catalogue, n_sessions: int = 220) -> Path:
    """Write the part of a data folder that serving reads: catalogue, transform, schema, test sessions."""
    shop.save(folder / "catalogue")
    transform = {
        "format": 1,
        "item_id": {"column": "item_id", "type": shop.id_type, "null_row": 1, "unknown_row": 2, "first_row": 3},
        "max_sequence_length": MAX_LENGTH,
        "features": {},
    }
    (folder / SESSION_TRANSFORM_FILE).write_text(json.dumps(transform))
    (folder / SCHEMA_FILE).write_text(f'feature {{\n  name: "{ITEM_LIST}"\n}}\n')
    rng = np.random.default_rng(11)
    rows = [rng.integers(FIRST_ITEM_ROW, shop.n_rows, rng.integers(2, 15)).tolist() for _ in range(n_sessions)]
    write_split(folder / "test", rows, users="u")
    return folder


def raw_sessions(shop: Catalogue, n: int, seed: int = 0) -> list[list[str | int | None]]:
    """Random sessions of raw ids: empty, short and over-long ones, with unknown and missing ids among them."""
    rng = np.random.default_rng(seed)
    known = shop.ids_of(np.arange(FIRST_ITEM_ROW, shop.n_rows))
    unknown: list[str | int] = ["nobody", "ware"] if shop.id_type == "string" else [-5, 2**40]
    pool: list[str | int | None] = [*known, *known, *unknown, None]
    return [[pool[i] for i in rng.integers(0, len(pool), length)] for length in rng.integers(0, 20, n)]


def recipe_of(model: MISSRec) -> Recipe:
    """The recipe of a run of this model."""
    return Recipe(name="tiny", model=model.config)


def padded(rows: list[np.ndarray]) -> np.ndarray:
    """Ragged rows as a matrix, 0-padded on the right."""
    width = max(1, *map(len, rows))
    return np.stack([np.pad(line, (0, width - len(line))) for line in rows])
