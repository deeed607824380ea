"""The generated shop: frozen, made so that content matters, and without a hint of the next event in its columns."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.synthetic.shop import (
    END,
    VERSION,
    Events,
    Items,
    Users,
    fingerprint,
    generate_shop,
    make_events,
    make_items,
    make_tables,
    make_users,
    streams,
)
from missrec_t4r.etl.sources.synthetic.shop_text import EVENT_TYPES
from missrec_t4r.ranking.baselines import ContentKNN, CoOccurrence, ItemKNN, Popularity

SMALL = {"users": 80, "items": 120}


def test_the_tutorial_counts_what_its_shop_lacks(repository: Path) -> None:
    page = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
    ((users, items),) = re.findall(r"^missrec generate .*--users (\d+) --items (\d+)", page, re.MULTILINE)
    _, table, _ = make_tables(7, int(users), int(items))  # the seed of the command
    no_text, no_picture = (table[name].null_count for name in ("title", "image"))
    assert f"{no_text} of {items} items have no text and {no_picture} no picture" in page


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
    assert events.groupby("user_id").size().min() >= 5
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


def _check_that_content_and_sessions_help(tmp_path: Path, seed: int) -> None:
    shop, data = tmp_path / "shop", tmp_path / "data"
    generate_shop(shop, seed=seed)
    etl(shop / "interactions.parquet", shop / "items.parquet", data)
    features(data, text_columns=["title", "description"], image_column="image", images=shop)
    catalogue, train = Catalogue.load(data / "catalogue"), Sessions.load(data / "train")
    histories, targets = Sessions.load(data / "test").split_last()
    repeated = [target in history for history, target in zip(histories, targets, strict=True)]
    assert 1 <= sum(repeated) < 0.02 * len(targets)
    cold = catalogue.train_count[targets] == 0
    assert cold.sum() >= 30

    def ndcg(model: Popularity | ItemKNN | ContentKNN) -> np.ndarray:
        return _ndcg(model(histories).numpy(), targets, histories)

    item_knn = ndcg(ItemKNN(CoOccurrence.count(train, catalogue.n_rows), 0.6, 0.3))
    content_knn = ndcg(ContentKNN.fit(catalogue).using(["text"], 0.7))
    popularity = ndcg(Popularity.fit(catalogue)).mean()
    chance = sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / catalogue.n_items
    assert content_knn[cold].mean() > item_knn[cold].mean()
    assert content_knn.mean() > 6 * chance
    assert item_knn.mean() > 2 * popularity > 0


def test_content_and_sessions_help(tmp_path: Path) -> None:
    _check_that_content_and_sessions_help(tmp_path, 7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [8, 9, 10, 11])
def test_content_and_sessions_help_on_other_seeds(tmp_path: Path, seed: int) -> None:
    _check_that_content_and_sessions_help(tmp_path, seed)


@pytest.mark.parametrize(
    ("sizes", "events", "frozen"),
    [
        ((7, 80, 120), 538, "400ac8891e0dcccfbf831ad7194fb4f9b095be75b40b11743aa599b44a046d99"),
        ((7, 3000, 1200), 21093, "dc75722a026a01667d0ab9245477bf407ba83242e6ee5bf5820cffcadd6587df"),
    ],
)
def test_the_shop_is_frozen(sizes: tuple[int, int, int], events: int, frozen: str) -> None:
    """Another hash is another shop: a new version, with all results on it measured anew."""
    interactions, items, _ = make_tables(*sizes)
    assert (VERSION, len(interactions), fingerprint(interactions, items)) == (2, events, frozen)


def test_the_folder_names_version_and_hash_of_what_it_holds(tmp_path: Path) -> None:
    report = generate_shop(tmp_path / "shop", **SMALL)
    written = [pq.read_table(tmp_path / "shop" / name) for name in ("interactions.parquet", "items.parquet")]
    stored = json.loads((tmp_path / "shop" / "shop.json").read_text())
    assert stored["tables_sha256"] == report["tables_sha256"] == fingerprint(*written)
    assert stored["version"] == VERSION


def _simulated(seed: int, moves_of: int) -> tuple[Items, Users, Events]:
    rng = streams(seed)
    items, users = make_items(400, rng["catalogue"]), make_users(800, rng["users"])
    return items, users, make_events(items, users, streams(moves_of)["moves"], rng["columns"])


def _by_user(events: Events) -> tuple[Events, np.ndarray]:
    """Events by user and time, and whether the next one is of the same user."""
    order = np.lexsort([events.time, events.user])
    by_user = Events(*(getattr(events, field.name)[order] for field in dataclasses.fields(events)))
    return by_user, np.append(by_user.user[:-1] == by_user.user[1:], False)


def test_event_columns_do_not_change_when_the_next_items_are_drawn_anew() -> None:
    """Where another draw of all moves gives a user the same item at the same event, its columns are the same."""
    (first, followed), (second, _) = (_by_user(_simulated(5, moves_of=seed)[2]) for seed in (5, 6))
    assert (first.user == second.user).all()
    same = followed & (first.item == second.item)
    another_next = same & (np.roll(first.item, -1) != np.roll(second.item, -1))
    assert another_next.sum() > 30
    assert (first.kind == second.kind)[same].all()
    assert (first.dwell == second.dwell)[same].all()
    assert not (first.kind == second.kind).all()  # of other items they differ


def _advantage(feature: np.ndarray, outcome: np.ndarray, strata: np.ndarray) -> float:
    """Rank-sum test of the feature for the outcome within strata: distance from chance, in standard deviations."""
    wins, expected, variance = 0.0, 0.0, 0.0
    for stratum in np.unique(strata):
        values, positive = feature[strata == stratum], outcome[strata == stratum]
        ranks = pd.Series(values).rank().to_numpy()
        n, m = positive.sum(), (~positive).sum()
        wins += ranks[positive].sum()
        expected += n * (n + m + 1) / 2
        variance += n * m / (n + m) * ranks.var(ddof=1) if min(n, m) else 0.0
    return abs(wins - expected) / variance**0.5


def test_event_columns_do_not_predict_the_next_event_given_user_and_item() -> None:
    """Neither whether the next event stays in the interest nor whether it is of the same product or set."""
    items, users, events = _simulated(5, moves_of=5)
    events, followed = _by_user(events)
    now, later = events.item[followed], np.roll(events.item, -1)[followed]
    user = events.user[followed]
    own = items.style[now] == users.taste[user]
    strata = own + 2 * users.buyer[user] + 4 * (users.pace[user] > 1.0)  # what the columns may tell
    rng = np.random.default_rng(0)
    for latent in (items.interest, items.product, items.set):
        stays = latent[now] == latent[later]
        dwell = events.dwell[followed] / users.pace[user]
        assert _advantage(dwell, stays, strata) < 3.5
        assert _advantage(events.kind[followed].astype(float), stays, strata) < 3.5
        leaked = dwell * np.where(stays, 1.3, 1.0) * rng.lognormal(0, 0.4, len(dwell))
        assert _advantage(leaked, stays, strata) > 5  # a hint far weaker than that of version 1 would be seen


def test_event_columns_tell_of_user_and_item() -> None:
    items, users, events = _simulated(5, moves_of=5)
    own, buyer = items.style[events.item] == users.taste[events.user], users.buyer[events.user] == 1
    bought = events.kind == EVENT_TYPES.index("purchase")
    assert events.dwell[own].mean() > 1.5 * events.dwell[~own].mean()
    assert bought[own & buyer].mean() > bought[~own & buyer].mean() > bought[~own & ~buyer].mean()
