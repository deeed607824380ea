"""Catalogue of any size for the serving benchmark: correlated vectors of two modalities, item-kNN, filter columns.

Nothing is trained: latency depends on shapes, not on weights. Pass the bundle of a trained run instead if there is one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from missrec_t4r.bundle.bundle import write_bundle
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.ranking.hybrid import build_missrec, terms_of
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.schema import FIRST_ITEM_ROW, SCHEMA_FILE, SESSION_TRANSFORM_FILE

WIDTHS = {"text": 384, "image": 512}
_HAS_IMAGE = 0.8


def item_id(index: int) -> str:
    """Return the raw id of an item."""
    return f"B{index:09d}"


def shop(n_items: int, seed: int = 0) -> Catalogue:
    """Return a catalogue whose modalities share 24 hidden directions; some items have no image."""
    rng, n_rows = np.random.default_rng(seed), n_items + FIRST_ITEM_ROW
    is_item = np.arange(n_rows) >= FIRST_ITEM_ROW
    hidden = rng.normal(size=(n_rows, 24)).astype(np.float32)
    modalities = {}
    for name, width in WIDTHS.items():
        present = is_item if name == "text" else is_item & (rng.random(n_rows) < _HAS_IMAGE)
        vectors = hidden @ rng.normal(size=(24, width)).astype(np.float32)
        vectors += 0.5 * rng.normal(size=vectors.shape).astype(np.float32)
        modalities[name] = Modality(vectors * present[:, None], present, {"name": f"random-{name}"})
    columns = {
        "item_id": [item_id(i) for i in range(n_items)],
        "train_count": rng.zipf(1.5, n_items).clip(1, 5000),
        "brand": [f"brand {i}" for i in rng.integers(0, max(n_items // 40, 1), n_items)],
        "in_stock": rng.random(n_items) < 0.9,
        "price": rng.random(n_items) * 100,
    }
    return Catalogue(pa.table(columns), modalities)


def bundle_of(out: Path, n_items: int, *, d_model: int = 300, seed: int = 0, most_sessions: int | None = None) -> Path:
    """Write a bundle of an untrained model with an item-kNN term of random sessions, and return its folder.

    The item-kNN term counts five sessions per item, at most ``most_sessions``.
    """
    catalogue = shop(n_items, seed)
    torch.manual_seed(seed)
    config = Recipe.load("default", {"model.d_model": d_model}).model
    model = build_missrec(config, catalogue).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        tokens, interests = model.item_encoder.catalogue(), model.interests
        if count := interests.n_interests:
            points = tokens.modality[tokens.mask]
            interests.centroids[1:] = points[torch.randperm(len(points))[:count]]
            interests.assignment[tokens.mask] = torch.randint(1, count + 1, (len(points),))
        sessions = [
            rng.zipf(1.3, rng.integers(2, 20)) % n_items + FIRST_ITEM_ROW
            for _ in range(min(5 * n_items, most_sessions or 5 * n_items))
        ]
        if terms_of(model).item_knn is not None:
            terms_of(model).item_knn.fit(Sessions.from_lists([one.tolist() for one in sessions]), 5)
            terms_of(model).item_knn.choose(ItemKNNSettings(0.3, 0.8, 0.5))
        if model.fusion.phi is not None:
            model.fusion.phi.fill_(2.0)
    data = out.with_name(f"{out.name}-data")
    data.mkdir(parents=True, exist_ok=True)
    item = {"column": "item_id", "type": "string", "null_row": 1, "unknown_row": 2, "first_row": FIRST_ITEM_ROW}
    transform = {"format": 1, "item_id": item, "max_sequence_length": config.max_sequence_length, "features": {}}
    (data / SESSION_TRANSFORM_FILE).write_text(json.dumps(transform))
    (data / SCHEMA_FILE).write_text('feature {\n  name: "item_id-list"\n}\n')
    write_bundle(out, model=model, catalogue=catalogue, data=data)
    return out
