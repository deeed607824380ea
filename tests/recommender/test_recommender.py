"""`mr.Shop` and `mr.Recommender`: the ten lines of the README, from data frames to a served model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import missrec_t4r as mr
from missrec_t4r.cli.app import app
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.quality.charts import number

N_USERS, N_ITEMS = 60, 40
WORDS = ("lamp", "desk", "chair", "shelf", "rug")


@pytest.fixture(scope="module")
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Events in another order than time, with German column names, and an item table."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(N_USERS):
        start = int(rng.integers(N_ITEMS))
        length = int(rng.integers(4, 9))
        rows += [(f"u{user}", f"P{(start + step) % N_ITEMS:02}", 1_700_000_000 + 60 * step) for step in range(length)]
    events = pd.DataFrame(rows, columns=["kunde", "artikel", "zeit"]).sample(frac=1, random_state=0)
    items = pd.DataFrame(
        {
            "artikel": [f"P{item:02}" for item in range(N_ITEMS)],
            "title": [f"{WORDS[item % 5]} number {item}" for item in range(N_ITEMS)],
            "in_stock": [item % 4 != 0 for item in range(N_ITEMS)],
        }
    )
    return events, items


@pytest.fixture(scope="module")
def shop(tables: tuple[pd.DataFrame, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> mr.Shop:
    events, items = tables
    folder = tmp_path_factory.mktemp("shop")
    return mr.Shop.from_frames(
        events, items, user="kunde", item="artikel", time="zeit", text=["title"], folder=folder, unknown_items="drop"
    )


@pytest.fixture(scope="module")
def model(shop: mr.Shop) -> mr.Recommender:
    return mr.Recommender("tiny", train__epochs=1).fit(shop)


def test_recommendations_are_a_frame_in_rank_order(model: mr.Recommender, tables: Any) -> None:
    found = model.recommend(users=["u3", "u1"], k=5)
    assert list(found.columns) == ["user", "item", "title", "score", "rank", "reason"]
    assert found["user"].tolist() == ["u3"] * 5 + ["u1"] * 5
    assert found["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    events, items = tables
    titles = dict(zip(items["artikel"], items["title"], strict=True))
    assert found["title"].tolist() == [titles[item] for item in found["item"]]
    for user, own in found.groupby("user"):
        seen = set(events.loc[events["kunde"] == user, "artikel"])
        assert not seen & set(own["item"])
        assert own["score"].is_monotonic_decreasing
        assert all(reason.split(" (")[0] in seen for reason in own["reason"])


def test_users_are_their_events_in_time_order(model: mr.Recommender, tables: Any) -> None:
    events, _ = tables
    history = events[events["kunde"] == "u7"].sort_values("zeit")["artikel"].tolist()
    by_user = model.recommend(users=["u7"], k=8)
    by_session = model.recommend(sessions=[history], k=8)
    assert by_user["item"].tolist() == by_session["item"].tolist()
    np.testing.assert_allclose(by_user["score"], by_session["score"], atol=1e-6)


def test_event_features_of_users_reach_the_model(tables: Any, tmp_path: Path) -> None:
    events, items = tables
    bought = events.assign(event_type=np.where(events["zeit"] % 120 == 0, "buy", "view"))
    names = {"user": "kunde", "item": "artikel", "time": "zeit"}
    shop = mr.Shop.from_frames(bought, items, **names, text="title", folder=tmp_path)
    model = mr.Recommender("tiny", train__epochs=1, model__event_features="event_type").fit(shop)
    own = bought[bought["kunde"] == "u4"].sort_values("zeit")
    assert shop.histories(["u4"], ["event_type", "absent"]) == (
        [own["artikel"].tolist()],
        [{"event_type": own["event_type"].tolist()}],
    )
    with_features = model.recommend(users=["u4"], k=N_ITEMS)
    without = model.recommend(sessions=[own["artikel"].tolist()], k=N_ITEMS)
    assert not np.allclose(with_features["score"], without["score"], atol=1e-6)


def test_filters_hold_and_seen_items_may_be_kept(model: mr.Recommender, tables: Any) -> None:
    _, items = tables
    stocked = set(items.loc[items["in_stock"], "artikel"])
    found = model.recommend(sessions=[["P01", "P02"]], k=20, where={"in_stock": True})
    assert set(found["item"]) <= stocked
    everything = model.recommend(sessions=[["P01", "P02"]], k=N_ITEMS, exclude_seen=False)
    assert {"P01", "P02"} <= set(everything["item"])


def test_an_evaluation_is_a_table(model: mr.Recommender) -> None:
    found = model.evaluate()
    frame = found.to_frame()
    assert {"model", "item_knn", "popularity"} <= set(frame.index.get_level_values("system"))
    assert frame["ndcg@10"].between(0, 1).all()
    assert "<table" in found._repr_html_()
    drawn = found.plot("recall@10")._repr_html_()
    assert drawn.count("<svg") == len(found.report["protocols"])
    assert f"item_knn: {number(frame.loc[(next(iter(found.report['protocols'])), 'item_knn'), 'recall@10'])}" in drawn
    assert found.report["split"] == "test"
    parts = found.slices("recall@10")
    assert parts.loc["all", "n"] == found.report["n_users"]
    assert parts.loc["all", "model"] == frame.loc[("excluded", "model"), "recall@10"]
    drawn = found.plot("recall@10", slices=["all", "cold"])._repr_html_()
    assert drawn.count("<svg") == 2
    assert f"model: {number(parts.loc['all', 'model'])}" in drawn


def test_the_commands_are_those_of_the_command_line(model: mr.Recommender) -> None:
    import typer

    command = typer.main.get_command(app)
    assert [shlex.split(line)[1] for line in model.commands] == ["etl", "features", "train", "export"]
    for line in model.commands:
        words = shlex.split(line)[1:]
        context = command.make_context("missrec", list(words), resilient_parsing=False)
        name, sub, rest = command.resolve_command(context, words)  # type: ignore[attr-defined]
        sub.make_context(name, rest)  # fails on an unknown option or a wrong value


def test_similar_and_saved_models(model: mr.Recommender, shop: mr.Shop, tmp_path: Path) -> None:
    assert list(model.similar("P05", 3).columns[:1]) == ["item"]
    assert len(model.similar("P05", 3)) == 3
    model.save(tmp_path / "bundle")
    again = mr.Recommender.load(tmp_path / "bundle", shop=shop)
    pd.testing.assert_frame_equal(again.recommend(users=["u5"]), model.recommend(users=["u5"]))
    with pytest.raises(ConfigError, match="without a training run"):
        again.evaluate()
    with pytest.raises(ConfigError, match="without a shop"):
        mr.Recommender.load(tmp_path / "bundle").recommend(users=["u5"])


def test_new_items_are_recommended_by_their_content(shop: mr.Shop, model: mr.Recommender, tmp_path: Path) -> None:
    copy = mr.Recommender.load(model.save(tmp_path / "bundle"), shop=shop)
    copy.add_items(pd.DataFrame({"artikel": ["N1"], "title": ["lamp number 5"], "in_stock": [True]}))
    everything = copy.recommend(sessions=[["P05"]], k=N_ITEMS + 1, exclude_seen=False)
    assert "N1" in set(everything["item"])
    assert "N1" not in set(model.recommend(sessions=[["P05"]], k=N_ITEMS, exclude_seen=False)["item"])


def test_ids_alone_train(tables: Any, tmp_path: Path) -> None:
    events, _ = tables
    table = pa.Table.from_pandas(events, preserve_index=False)
    shop = mr.Shop.from_frames(table, user="kunde", item="artikel", time="zeit", folder=tmp_path)
    assert list(shop.catalogue.modalities) == ["cooccurrence"]
    assert "cooccurrence" in repr(mr.Shop.open(tmp_path))
    found = mr.Recommender("tiny", train__epochs=1).fit(shop).recommend(users=["u1"], k=3)
    assert list(found.columns) == ["user", "item", "score", "rank", "reason"]
    assert len(found) == 3


def test_polars_frames_give_the_same_shop(shop: mr.Shop, tables: Any, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="in requirements/floor.txt and newest.txt")
    events, items = (polars.from_pandas(table) for table in tables)
    names = {"user": "kunde", "item": "artikel", "time": "zeit"}
    same = mr.Shop.from_frames(events, items.lazy(), **names, text="title", folder=tmp_path, unknown_items="drop")
    users = ["u1", "u2"]
    assert same.histories(users) == shop.histories(users)
    assert same.catalogue.items.equals(shop.catalogue.items)
    np.testing.assert_allclose(
        same.catalogue.modalities["text"].vectors, shop.catalogue.modalities["text"].vectors, atol=1e-6
    )


def test_nothing_is_printed(tables: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events, items = tables
    mr.Shop.from_frames(events, items, user="kunde", item="artikel", time="zeit", text="title", folder=tmp_path)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "sessions in" not in printed.err, "messages belong to the command line"


def test_bad_input_is_refused_in_words(tables: Any, model: mr.Recommender) -> None:
    events, items = tables
    with pytest.raises(SchemaError, match="events without user_id, item_id, timestamp"):
        mr.Shop.from_frames(events, items)
    with pytest.raises(DataError, match="events of type list"):
        mr.Shop.from_frames([1, 2], items)
    with pytest.raises(DataError, match="users without an event: nobody"):
        model.recommend(users=["nobody"])
    with pytest.raises(ConfigError, match="both users and sessions"):
        model.recommend(users=["u1"], sessions=[["P01"]])
    with pytest.raises(ConfigError, match="call fit"):
        mr.Recommender().recommend(sessions=[["P01"]])


@pytest.mark.triton
def test_the_embedded_server_gives_the_same_items(model: mr.Recommender) -> None:
    with model.serve() as server, mr.MISSRecClient(server.grpc_url) as client:
        (answer,) = client.recommend([["P01", "P02"]], 5, exclude_seen=True)
    assert list(answer.item_ids) == model.recommend(sessions=[["P01", "P02"]], k=5)["item"].tolist()
