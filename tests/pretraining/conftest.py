"""Small shops whose items lie on a circle: sessions walk along it, and modality vectors encode the position on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.data.catalogue import Modality
from tests import shop

TEXT_WIDTH, IMAGE_WIDTH = 8, 6
SMALL = {
    "model.interest_ratio": 0.3,
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
    """Return the vectors of positions on the circle by the encoder ``seed``."""
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
    """Write a data folder; ``order`` is the position on the circle of every item, by default that of its row."""
    return shop.write_circle(folder, ids, modalities, n_users=sessions, order=order)  # type: ignore[arg-type]  # of one type


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
    """A pre-training run on books and toys, twelve epochs."""
    from missrec_t4r.training.pretrain import pretrain

    out = tmp_path_factory.mktemp("runs") / "pre"
    pretrain([shops["books"], shops["toys"]], out, settings=SMALL | {"train.epochs": 12, "train.learning_rate": 5e-3})
    return out
