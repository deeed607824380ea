"""The generated shop: reproducible, and made so that content and order matter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.synthetic.shop import END, generate_shop
from missrec_t4r.ranking.baselines import ContentKNN, CoOccurrence, ItemKNN, Popularity

SMALL = {"users": 80, "items": 120}


def _fingerprint(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_shop_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_shop(tmp_path / name, seed=seed, **SMALL)
    first, again, other = (_fingerprint(tmp_path / name) for name in "abc")
    assert first == again
    assert first["interactions.parquet"] != other["interactions.parquet"]
    generate_shop(tmp_path / "c", seed=1, **SMALL)  # an older shop is replaced whole
    assert _fingerprint(tmp_path / "c") == first


def test_tables_and_pictures(tmp_path: Path) -> None:
    report = generate_shop(tmp_path / "shop", users=300, items=400)
    items = pd.read_parquet(tmp_path / "shop" / "items.parquet")
    events = pd.read_parquet(tmp_path / "shop" / "interactions.parquet")
    assert list(items) == ["item_id", "title", "description", "category", "brand", "price", "image"]
    assert list(events) == ["user_id", "item_id", "timestamp", "event_type", "dwell_seconds", "category"]
    assert (events.user_id.nunique(), len(items), len(events)) == (300, 400, report["events"])
    assert set(events.item_id) <= set(items.item_id)
    assert items.item_id[42] == "P00042"
    assert 0.01 < items.title.isna().mean() < 0.15
    assert 0.05 < items.image.isna().mean() < 0.3
    assert not (items.title.isna() & items.image.isna()).any()
    named = set(items.image.dropna())
    assert {str(path.relative_to(tmp_path / "shop")) for path in (tmp_path / "shop" / "images").iterdir()} == named
    assert events.timestamp.is_monotonic_increasing
    assert END - 600 * 86_400 < events.timestamp.min() < events.timestamp.max() < END
    assert not events.duplicated(["user_id", "item_id"]).any()
    assert not items.title.dropna().str.contains("style|plain|grid|stripes|waves|dots|rings", case=False).any()
    first_seen = events.groupby("item_id").timestamp.min()
    assert (first_seen > END - 120 * 86_400).mean() > 0.3  # late items


def _ndcg(scores: np.ndarray, targets: np.ndarray, histories: Sessions) -> np.ndarray:
    """NDCG@10 per session, seen items excluded, ties by row."""
    scores = scores.copy()
    for line, history in enumerate(histories):
        scores[line, history] = -np.inf
    mine = scores[np.arange(len(targets)), targets][:, None]
    tied = (scores == mine) & (np.arange(scores.shape[1]) < targets[:, None])
    rank = (scores > mine).sum(1) + tied.sum(1)
    return np.where(rank < 10, 1 / np.log2(rank + 2), 0.0)


def _check_that_content_and_order_help(tmp_path: Path, seed: int) -> None:
    shop, data = tmp_path / "shop", tmp_path / "data"
    generate_shop(shop, seed=seed)
    etl(shop / "interactions.parquet", shop / "items.parquet", data)
    features(data, text_columns=["title", "description"], image_column="image", images=shop)
    catalogue, train = Catalogue.load(data / "catalogue"), Sessions.load(data / "train")
    histories, targets = Sessions.load(data / "test").split_last()
    cold = catalogue.train_count[targets] == 0
    assert cold.sum() >= 60

    def ndcg(model: Popularity | ItemKNN | ContentKNN) -> np.ndarray:
        return _ndcg(model(histories).numpy(), targets, histories)

    backwards = Sessions(train.values[::-1].copy(), (len(train.values) - train.offsets)[::-1].copy())
    item_knn, reversed_knn = (
        ndcg(ItemKNN(CoOccurrence.count(sessions, catalogue.n_rows, follow_within=3), 0.6, 0.3))
        for sessions in (train, backwards)
    )
    content_knn = ndcg(ContentKNN.fit(catalogue, 0.3).using(["text"], 0.3))
    popularity = ndcg(Popularity.fit(catalogue)).mean()
    assert 0.01 < popularity < 0.05
    assert content_knn[cold].mean() > item_knn[cold].mean() + 0.02
    assert content_knn.mean() > popularity
    assert item_knn.mean() > 3 * popularity
    assert item_knn.mean() > 1.3 * reversed_knn.mean()  # the order of the visits tells


def test_content_and_order_help(tmp_path: Path) -> None:
    _check_that_content_and_order_help(tmp_path, 7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [8, 9, 10, 11])
def test_content_and_order_help_on_other_seeds(tmp_path: Path, seed: int) -> None:
    _check_that_content_and_order_help(tmp_path, seed)
