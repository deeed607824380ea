"""Tiny shops whose items lie on a ring: customers walk along it, and an encoder shows where on it an item lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.data.catalogue import Catalogue, Modality

TEXT_WIDTH, IMAGE_WIDTH = 8, 6
SMALL = {
    "model.d_model": 16,
    "model.n_head": 2,
    "model.d_feedforward": 16,
    "model.dropout": 0.0,
    "model.max_sequence_length": 6,
    "train.batch_size": 64,
    "train.patience": 99,
    "train.ema_decay": 0.0,
    "train.validation_sessions": 0,
}


def encode(angles: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Return what the encoder ``seed`` makes of places on the ring."""
    mix = np.random.default_rng(seed).normal(size=(4, width))
    waves = np.stack([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(2 * angles)], 1)
    return (waves @ mix).astype(np.float32)


def modality(
    angles: np.ndarray, width: int, seed: int, fingerprint: str | None, *, word_drop: bool = False
) -> Modality:
    vectors = np.concatenate([np.zeros((3, width), np.float32), encode(angles, width, seed)])
    encoder = {"name": "ring"} | ({"fingerprint": fingerprint} if fingerprint else {})
    variants = {"word_drop": vectors * np.float32(0.9)} if word_drop else {}
    return Modality(vectors, np.arange(len(vectors)) >= 3, encoder, variants)


def write_shop(
    folder: Path,
    ids: Sequence[str | int],
    modalities: Mapping[str, Modality],
    *,
    sessions: int = 40,
    order: Sequence[int] | None = None,
) -> Path:
    """Write a data folder; ``order`` is the place on the ring of every item, by default that of its line."""
    places = np.arange(len(ids)) if order is None else np.asarray(order)
    row_at = np.argsort(places) + 3
    walks = {
        split: [[int(row_at[(user + step) % len(ids)]) for step in range(length)] for user in range(sessions)]
        for split, length in (("train", 6), ("valid", 7), ("test", 8))
    }
    counts = np.bincount(np.concatenate(walks["train"]), minlength=len(ids) + 3)[3:]
    items = pa.table({"item_id": list(ids), "train_count": counts})
    Catalogue(items, modalities).save(folder / "catalogue")
    for split, lists in walks.items():
        (folder / split).mkdir()
        table = pa.table({"user_id": np.arange(len(lists)), "item_id-list": pa.array(lists, pa.list_(pa.int64()))})
        pq.write_table(table, folder / split / "part_0.parquet")
    return folder


def angles(n_items: int) -> np.ndarray:
    return np.arange(n_items) * 2 * np.pi / n_items


@pytest.fixture(scope="session")
def shops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three shops of one text encoder; only `toys` has images, and only `books` texts with words left out."""
    folder = tmp_path_factory.mktemp("shops")
    text = {
        name: modality(angles(n), TEXT_WIDTH, 1, "ring-text@1", word_drop=name == "books")
        for name, n in (("books", 14), ("toys", 10), ("tools", 12))
    }
    image = modality(angles(10), IMAGE_WIDTH, 2, "ring-image@1")
    return {
        "books": write_shop(folder / "books", [f"B{i}" for i in range(14)], {"text": text["books"]}),
        "toys": write_shop(folder / "toys", list(range(10)), {"title": text["toys"], "image": image}),
        "tools": write_shop(folder / "tools", [f"T{i}" for i in range(12)], {"text": text["tools"]}),
    }


@pytest.fixture(scope="session")
def pretrained(shops: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training run on books and toys, four epochs."""
    from missrec_t4r.training.pretrain import pretrain

    out = tmp_path_factory.mktemp("runs") / "pre"
    pretrain([shops["books"], shops["toys"]], out, settings=SMALL | {"train.epochs": 12, "train.learning_rate": 5e-3})
    return out
