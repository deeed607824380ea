"""Full, chunked and sampled softmax on a small shop: quality and time per epoch, over seeds.

    python -m benchmarks.speed.softmaxes            # about two minutes

The shop is a Markov chain over kinds of items, with two modalities that encode the kind and long-tailed popularity. It
is small enough for the full softmax, to compare the estimate with; `large_catalogue` measures the cost at size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import report
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.schema import FIRST_ITEM_ROW
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Trainer

KINDS, WIDTH, EVENTS = 100, 32, 9
CASES: dict[str, dict[str, Any]] = {
    "full": {"softmax": "full"},
    "chunked, 512 rows": {"softmax": "chunked", "chunk_size": 512},
    "sampled, 128 negatives": {"softmax": "sampled", "negatives": 128},
    "sampled, 512 negatives": {"softmax": "sampled", "negatives": 512},
}
SETTINGS = {
    "model.n_neighbours": 0,
    "model.n_similar_items": 0,
    "model.temperature": 0.12,
    "train.learning_rate": 3e-3,
    "train.batch_size": 512,
    "train.ema_decay": 0.0,
    "train.patience": 99,
}


def main() -> None:
    """Train every case with every seed and write the result."""
    parser = argparse.ArgumentParser(description="Softmaxes side by side on a small shop.")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--sessions", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    shop = make_shop(options.items, options.sessions)
    found = {}
    for name, settings in CASES.items():
        runs = [train(shop, settings, options.epochs, seed) for seed in range(options.seeds)]
        best, seconds = [run[0] for run in runs], [run[1] for run in runs]
        spread = stdev(best) if len(best) > 1 else None
        found[name] = {"valid_ndcg@10": {"mean": mean(best), "std": spread}, "cpu_s": round(mean(seconds), 1)}
    report("softmaxes", {**{key: value for key, value in vars(options).items() if key != "out"}, **found}, options.out)


def train(shop: tuple[Catalogue, Sessions, Sessions], settings: dict[str, Any], epochs: int, seed: int) -> list[float]:
    """Return the best validation NDCG@10 and the processor's seconds."""
    extra = {f"train.{name}": value for name, value in settings.items()} | {"train.epochs": epochs, "train.seed": seed}
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(Recipe.load("tiny", SETTINGS | extra), TrainingData(*shop), Path(out), "cpu")
        started = time.process_time()
        lines = [trainer._epoch() for _ in range(epochs)]
        return [max(line["valid_ndcg@10"] for line in lines), time.process_time() - started]


def make_shop(n_items: int, n_sessions: int) -> tuple[Catalogue, Sessions, Sessions]:
    """Return the catalogue, training sessions, and validation sessions (with their last event)."""
    draw = np.random.default_rng(0)
    kind, centre, following = (
        draw.integers(KINDS, size=n_items),
        draw.normal(size=(KINDS, WIDTH)),
        draw.permutation(KINDS),
    )
    members = [np.flatnonzero(kind == number) for number in range(KINDS)]
    popularity = draw.zipf(1.5, size=n_items).clip(max=50).astype(float)

    def session() -> list[int]:
        now, rows = int(draw.integers(KINDS)), []
        for _ in range(EVENTS):
            own = members[now]
            rows.append(FIRST_ITEM_ROW + int(draw.choice(own, p=popularity[own] / popularity[own].sum())))
            now = int(following[now] if draw.random() < 0.8 else draw.integers(KINDS))
        return rows

    def vectors() -> np.ndarray[Any, np.dtype[np.float32]]:
        table = np.zeros((FIRST_ITEM_ROW + n_items, WIDTH), np.float32)
        table[FIRST_ITEM_ROW:] = centre[kind] + 0.5 * draw.normal(size=(n_items, WIDTH))
        return table

    whole = [session() for _ in range(n_sessions)]
    train_sessions = Sessions.from_lists([rows[:-1] for rows in whole])
    counts = np.bincount(train_sessions.values, minlength=FIRST_ITEM_ROW + n_items)[FIRST_ITEM_ROW:]
    present = np.arange(FIRST_ITEM_ROW + n_items) >= FIRST_ITEM_ROW
    items = pa.table({"item_id": np.arange(n_items), "train_count": counts})
    catalogue = Catalogue(items, {name: Modality(vectors(), present) for name in ("text", "image")})
    return catalogue, train_sessions, Sessions.from_lists(whole)


if __name__ == "__main__":
    main()
