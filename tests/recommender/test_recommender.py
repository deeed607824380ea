"""`mr.Shop` and `mr.Recommender`: the ten lines of the README, from data frames to a served model."""

from __future__ import annotations

import pickle
import shlex
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import missrec_t4r as mr
from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.cli.app import app
from missrec_t4r.errors import BundleError, ConfigError, DataError, MISSRecError, SchemaError
from missrec_t4r.pages.charts import number
from missrec_t4r.recommender.frames import arrow_table, write_parquet
from missrec_t4r.recommender.shop import command_line
from tests.workflows import strict_cudf

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
            "since": pd.date_range("2024-01-01", periods=N_ITEMS, tz="UTC"),
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


def test_the_commands_are_those_of_the_command_line(model: mr.Recommender, shop: mr.Shop) -> None:
    import typer

    command = typer.main.get_command(app)
    assert [shlex.split(line)[1] for line in model.commands] == ["etl", "features", "train", "export"]
    assert mr.Shop.open(shop.folder).commands == shop.commands == model.commands[:2]
    for line in model.commands:
        words = shlex.split(line)[1:]
        context = command.make_context("missrec", list(words), resilient_parsing=False)
        name, sub, rest = command.resolve_command(context, words)  # type: ignore[attr-defined]
        sub.make_context(name, rest)  # fails on an unknown option or a wrong value


def test_a_command_line_gives_a_command_what_the_call_gave_it() -> None:
    import typer

    call = {"interactions": "e.parquet", "out": "data", "drop_columns": ["a", "b"], "categorical_columns": ["c"]}
    call |= {"event_weights": {"view": 1.0, "buy": 3.0}, "time_features": ["gap", "hour"], "drop_duplicates": True}
    words = shlex.split(command_line("etl", call | {"modality": {"text": Path("t.npy"), "image": Path("i.npy")}}))
    command = typer.main.get_command(app)
    name, etl, rest = command.resolve_command(command.make_context("missrec", words[1:]), words[1:])  # type: ignore[attr-defined]
    found = etl.make_context(name, rest).params
    lists = [[*found[name]] for name in ("drop_columns", "categorical_columns", "modality")]  # tuples in older typer
    assert lists == [["a", "b"], ["c"], ["text=t.npy", "image=i.npy"]]
    assert (found["event_weights"], found["time_features"]) == ("view=1.0,buy=3.0", "gap,hour")
    assert found["drop_duplicates"] is True


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


def test_a_model_that_was_used_can_be_pickled(model: mr.Recommender) -> None:
    before = model.recommend(users=["u1"], k=3)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(model)).recommend(users=["u1"], k=3), before)


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


def test_bad_input_is_refused_in_words(tables: Any, model: mr.Recommender, shop: mr.Shop) -> None:
    events, items = tables
    with pytest.raises(ConfigError, match=r"columns.json is a file; expected: a folder\. choose another `out`"):
        mr.Recommender("tiny", folder=shop.folder / "columns.json").fit(shop)
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


def _history(events: pd.DataFrame, user: str) -> list[str]:
    return list(events[events["kunde"] == user].sort_values("zeit")["artikel"])


NAMES = {"user": "kunde", "item": "artikel", "time": "zeit"}


@pytest.mark.parametrize("how", ["numbers as text", "German dates", "categories"])
def test_histories_are_in_the_order_of_time_whatever_the_columns_hold(how: str, tables: Any, tmp_path: Path) -> None:
    events, _ = tables
    events = events.assign(
        zeit=(events["zeit"] - 1_700_000_000) * 1440 * 5 + 86_400
    )  # 5 days apart: over a month's end
    wanted, given, options = _history(events, "u7"), events, {}
    if how == "numbers as text":  # of one to seven digits: as texts they have another order
        given = events.assign(zeit=events["zeit"].astype(str))
    elif how == "German dates":
        given = events.assign(zeit=pd.to_datetime(events["zeit"], unit="s").dt.strftime("%d.%m.%Y"))
        options = {"time_format": "%d.%m.%Y"}
    else:
        given = events.astype({"kunde": "category", "artikel": "category"})
    incomplete = given.iloc[:2].assign(kunde="u7", artikel=[None, "P01"], zeit=[given["zeit"].iloc[0], None])
    shop = mr.Shop.from_frames(pd.concat([given, incomplete]), **NAMES, folder=tmp_path, **options)
    assert shop.histories(["u7"])[0] == [wanted]


def test_users_are_found_by_their_id_as_number_and_as_text(tables: Any, tmp_path: Path) -> None:
    events, _ = tables
    numbers = events.assign(kunde=events["kunde"].str[1:].astype(int), artikel=events["artikel"].str[1:].astype(float))
    numbers.loc[numbers.index[0], "artikel"] = np.nan  # pandas then holds the ids as fractions
    shop = mr.Shop.from_frames(numbers, **NAMES, folder=tmp_path / "numbers")
    (expected,), _ = shop.histories([3])
    assert all(isinstance(item, int) for item in expected)
    for same in ("3", 3.0, np.int64(3)):
        assert shop.histories([same])[0] == [expected]
    with pytest.raises(DataError, match="users without an event: nobody, True"):
        shop.histories(["nobody", True])


def test_ids_of_a_csv_keep_their_zeros(tables: Any, tmp_path: Path) -> None:
    events, _ = tables
    zeros = events.assign(kunde=events["kunde"].str[1:].str.zfill(5), artikel=events["artikel"].str[1:].str.zfill(4))
    zeros.to_csv(tmp_path / "events.csv", index=False)
    shop = mr.Shop.from_frames(tmp_path / "events.csv", **NAMES, folder=tmp_path / "shop")
    assert shop.histories(["00003"])[0] == [_history(zeros, "00003")]
    assert shop.catalogue.items["item_id"][0].as_py() in set(zeros["artikel"])


def test_columns_may_have_the_names_of_methods_of_other_frames() -> None:
    names = ["compute", "collect", "lazy", "to_arrow"]
    assert arrow_table(pd.DataFrame({name: [1.0] for name in names}), "events").column_names == names


def test_an_index_of_cudf_is_no_column() -> None:
    frame = strict_cudf.DataFrame({"price": [1.0, 0.0, 2.0]})
    paid = frame[frame["price"] > 0]
    assert paid.to_arrow().column_names == ["price", "index"]
    assert arrow_table(paid, "events").to_pydict() == {"price": [1.0, 2.0]}


def test_findings_and_missing_vectors_are_in_sight(tables: Any, tmp_path: Path) -> None:
    events, items = tables
    few = items.assign(title=items["title"].where(items.index >= 10))
    events = pd.concat([events, events.head(1)])
    shop = mr.Shop.from_frames(events, pd.concat([few, few.tail(2)]), **NAMES, text="title", folder=tmp_path)
    assert "duplicate_items: 2 (of several rows with the same id the first is kept)" in shop.findings
    assert any("drop_duplicates=True leaves them out" in one for one in shop.findings)
    assert "text of 30, 3 findings (.findings)" in repr(shop)


def test_frames_that_cannot_be_right_are_refused_in_words(tables: Any) -> None:
    events, items = tables
    twice = pd.concat([events, events[["zeit"]]], axis=1)
    with pytest.raises(DataError, match="events with several columns called zeit"):
        mr.Shop.from_frames(twice, items, **NAMES)
    mixed = events.assign(note=[1 if row % 2 else "a" for row in range(len(events))])
    with pytest.raises(DataError, match="several types .*column note.*one type per column"):
        mr.Shop.from_frames(mixed, items, **NAMES)
    with pytest.raises(ConfigError, match="unknown setting etl.kcore; .* did you mean 'k_core'"):
        mr.Shop.from_frames(events, items, **NAMES, kcore=3)
    with pytest.raises(ConfigError, match="vectors without an item table"):
        mr.Shop.from_frames(events, **NAMES, vectors={"text": np.ones((N_ITEMS, 2))})
    with pytest.raises(ConfigError, match="vectors of 'text', and texts to encode"):
        mr.Shop.from_frames(events, items, **NAMES, text="title", vectors={"text": np.ones((N_ITEMS, 2))})
    with pytest.raises(SchemaError, match=r"items without marke; .*words="):
        mr.Shop.from_frames(events, items, **NAMES, words="marke")
    with pytest.raises(SchemaError, match=r"events without kunde.*reset_index"):
        mr.Shop.from_frames(events.set_index("kunde"), items, **NAMES)
    indexed = items.set_index("artikel")
    with pytest.raises(SchemaError, match=r"items without artikel; .*its index 'artikel' becomes a column with"):
        mr.Shop.from_frames(events, indexed, **NAMES, text="title")
    with pytest.raises(SchemaError, match=r"items without artikel; .*with rename_axis\('artikel'\).reset_index\(\)"):
        mr.Shop.from_frames(events, indexed.rename_axis(None), **NAMES, text="title")
    vectors = torch.eye(N_ITEMS, 2, dtype=torch.bfloat16, requires_grad=True)
    for wrong, words in (
        (vectors, "vectors of type Tensor; expected: a mapping of modalities to arrays"),
        ({"text": [[1.0], [1.0, 2.0]]}, "vectors of 'text' are not numbers .*; expected: an array"),
        ({"text": [["a", "b"]] * N_ITEMS}, "vectors of 'text' are not numbers .*could not convert string"),
        ({"text": vectors[1:]}, "has shape .*39, 2.* expected: 40 rows"),
    ):
        with pytest.raises(MISSRecError, match=words):
            mr.Shop.from_frames(events, items, **NAMES, vectors=wrong)  # type: ignore[arg-type]  # the mistakes
    with pytest.raises(DataError, match="column 'retired' of type string; expected: true or false"):
        mr.Shop.from_frames(events, items.assign(retired="no"), **NAMES)
    with pytest.raises(DataError, match="events with text that is not Unicode"):
        mr.Shop.from_frames(events.assign(note="\udc80"), items, **NAMES)
    with pytest.raises(ConfigError, match="k_core='5'; expected: a number of at least 0"):
        mr.Shop.from_frames(events, items, **NAMES, k_core="5")
    with pytest.raises(ConfigError, match="recipe of type dict; expected: a name or the path"):
        mr.Recommender({"epochs": 3})  # type: ignore[arg-type]  # what a reader of Transformers writes first
    with pytest.raises(ConfigError, match="fit on a DataFrame"):
        mr.Recommender().fit(events)  # type: ignore[arg-type]  # what a reader of scikit-learn writes first


def test_tables_of_others_are_not_replaced(tables: Any, tmp_path: Path) -> None:
    """A folder with an events.parquet of one's own is no shop; one that is being made, or was, is."""
    events, items = tables
    names = {"user": "kunde", "item": "artikel", "time": "zeit", "text": ["title"], "folder": tmp_path / "own"}
    (tmp_path / "own").mkdir()
    items.to_parquet(tmp_path / "own" / "items.parquet")
    with pytest.raises(DataError, match=r"own holds items.parquet and is no shop; .* choose another folder"):
        mr.Shop.from_frames(events, items.head(5), **names)
    assert pd.read_parquet(tmp_path / "own" / "items.parquet").equals(items)
    (tmp_path / "own" / "items.parquet").unlink()
    mr.Shop.from_frames(events, items, **names)
    (tmp_path / "own" / "columns.json").unlink()  # as after a kill before the last step
    mr.Shop.from_frames(events, items, **names)


def test_refused_events_leave_an_older_shop_as_it_is(shop: mr.Shop, tables: Any, tmp_path: Path) -> None:
    events, items = tables
    folder = shutil.copytree(shop.folder, tmp_path / "shop")
    with pytest.raises(DataError, match="the valid split has no session"):
        mr.Shop.from_frames(
            events.drop_duplicates("kunde"), items, **NAMES, folder=folder, vectors={"sound": np.ones((N_ITEMS, 2))}
        )
    assert mr.Shop.open(folder).histories(["u3"]) == shop.histories(["u3"])
    assert {file.name for file in folder.iterdir()} == {file.name for file in shop.folder.iterdir()}


def test_a_single_id_is_no_list_of_letters(model: mr.Recommender) -> None:
    with pytest.raises(ConfigError, match=r"write users=\['u3'\]"):
        model.recommend(users="u3")
    for sessions in ("P01", ["P01", "P02"], [1, 2], 7, [{"P01", "P02"}], {"u1": ["P01"]}):
        with pytest.raises(ConfigError, match="each a list of item ids"):
            model.recommend(sessions=sessions)  # type: ignore[arg-type]  # the mistake itself
    sessions = [["P01", "P02"], ["P03", "P04"]]
    expected = model.recommend(sessions=sessions, k=2)
    assert model.recommend(sessions=np.array(sessions), k=2).equals(expected)
    assert model.recommend(sessions=(iter(one) for one in sessions), k=2).equals(expected)
    users = model.recommend(users=["u1", "u2"], k=2)
    assert model.recommend(users=(one for one in ("u1", "u2")), k=2).equals(users)


@pytest.mark.parametrize("k", [0, -1, 2.5, "3", float("nan"), None])
def test_k_is_a_whole_number(k: Any, model: mr.Recommender) -> None:
    for call in (lambda: model.recommend(sessions=[["P01"]], k=k), lambda: model.similar("P01", k)):
        with pytest.raises(ConfigError, match=r"^k=.*; expected: a whole number of at least 1"):
            call()


def test_the_last_events_of_every_user_are_counted_on_request(shop: mr.Shop, tables: Any, tmp_path: Path) -> None:
    model = mr.Recommender("tiny", train__epochs=1, folder=tmp_path).fit(shop, recount=True)
    assert shlex.split(model.commands[-1])[-1] == "--recount"
    assert load_bundle(tmp_path / "bundle").model.terms["item_knn"].frequency.sum() == len(tables[0])
    with pytest.raises(ConfigError, match=r"without item-kNN term; .*\. export it without recount=True"):
        mr.Recommender("tiny", train__epochs=1, model__n_neighbours=0, folder=tmp_path / "none").fit(shop, recount=True)


def test_dates_are_bounds_of_a_filter(model: mr.Recommender) -> None:
    for day in (pd.Timestamp("2024-01-31", tz="UTC"), date(2024, 1, 31), np.datetime64("2024-01-31")):
        found = model.recommend(sessions=[["P01"]], k=N_ITEMS, where={"since": {"min": day}})
        assert set(found["item"]) == {f"P{item}" for item in range(30, N_ITEMS)}
    with pytest.raises(ConfigError, match=r"missing date \(NaT\) in where"):
        model.recommend(sessions=[["P01"]], where={"since": {"min": pd.NaT}})


def test_columns_and_arrays_of_any_library_are_sessions(model: mr.Recommender, tables: Any) -> None:
    sessions = tables[0].groupby("kunde")["artikel"].agg(list).head(2)
    expected = model.recommend(sessions=sessions.tolist(), k=2)
    for given in (sessions, pa.array(sessions.tolist()), [pa.array(one) for one in sessions]):
        assert model.recommend(sessions=given, k=2).equals(expected)
    users = model.recommend(users=sessions.index.astype("category"), k=2)
    assert users.equals(model.recommend(users=pa.array(sessions.index), k=2))


def test_the_working_directory_may_change(
    shop: mr.Shop, model: mr.Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.recommend(users=["u1"], k=3)
    monkeypatch.chdir(shop.folder.parent)
    opened = mr.Shop.open(shop.folder.name)
    loaded = mr.Recommender.load(f"{shop.folder.name}/models/tiny/bundle", opened)
    assert f"folder='{shop.folder.name}')" in repr(opened)
    assert repr(loaded) == f"Recommender(bundle='{shop.folder.name}/models/tiny/bundle')"
    monkeypatch.chdir(tmp_path)
    pd.testing.assert_frame_equal(loaded.recommend(users=["u1"], k=3), expected)
    assert loaded.similar("P05", 2).equals(model.similar("P05", 2))


def test_filters_are_mappings(model: mr.Recommender) -> None:
    with pytest.raises(ConfigError, match="where='in_stock'; expected: a mapping of columns"):
        model.recommend(sessions=[["P01"]], where="in_stock")  # type: ignore[arg-type]  # the mistake itself


def test_numbers_of_numpy_filter(model: mr.Recommender) -> None:
    plain = model.recommend(sessions=[["P01"]], k=5, where={"in_stock": True}, exclude=["P05"])
    numpy = model.recommend(
        sessions=[["P01"]], k=np.int64(5), where={"in_stock": np.bool_(True)}, exclude=np.array(["P05"])
    )
    assert numpy.equals(plain)


def test_unknown_names_of_an_evaluation_are_refused(model: mr.Recommender, shop: mr.Shop) -> None:
    found = model.evaluate(shop.folder, baselines="popularity")  # a name, not ten letters
    assert "popularity" in found.to_frame().index.get_level_values("system")
    for call in (found.slices, found.plot):
        with pytest.raises(ConfigError, match=r"unknown metric ndcg@1o; .* did you mean 'ndcg@10'"):
            call("ndcg@1o")
    with pytest.raises(ConfigError, match="unknown protocol kept;"):
        found.slices(protocol="kept")
    with pytest.raises(ConfigError, match="unknown slice colt; .* did you mean 'cold'"):
        found.plot(slices="colt")


def test_a_folder_is_trained_anew_on_request(shop: mr.Shop, tmp_path: Path) -> None:
    first = mr.Recommender("tiny", train__epochs=1, folder=tmp_path).fit(shop)
    again = mr.Recommender("tiny", train__epochs=1, folder=tmp_path).fit(shop)
    assert again.result == first.result | {"found": True}
    other = mr.Recommender("tiny", train__epochs=1, train__learning_rate=0.01, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"train.learning_rate .* -> 0.01; .*fit\(shop, restart=True\)"):
        other.fit(shop)
    assert "found" not in other.fit(shop, restart=True).result


def test_items_change_without_their_texts(shop: mr.Shop, model: mr.Recommender, tmp_path: Path) -> None:
    copy = mr.Recommender.load(model.save(tmp_path / "bundle"), shop=shop.folder)
    assert repr(copy) == f"Recommender(bundle={str(tmp_path / 'bundle')!r})"
    changed = copy.add_items(pd.DataFrame({"artikel": ["P03", "P08"], "in_stock": [False, True]}))
    assert (changed["changed"], changed["unchanged"]) == (2, 0)
    retired = copy.add_items(pd.DataFrame({"artikel": ["P05"], "retired": [True]}))
    assert (retired["added"], retired["retired"]) == (0, 1)
    found = copy.recommend(sessions=[["P04"]], k=N_ITEMS, where={"in_stock": True})
    assert "P08" in set(found["item"])
    assert not {"P03", "P05"} & set(found["item"])
    with pytest.raises(SchemaError, match="items without title; .* 'text' is encoded from: title. .*give its vectors"):
        copy.add_items(pd.DataFrame({"artikel": ["N1"], "in_stock": [True]}))
    with pytest.raises(SchemaError, match="a column 'artikel' of item ids"):
        copy.add_items(pd.DataFrame({"title": ["lamp"]}))
    with pytest.raises(DataError, match="item ids of type int64; expected: string"):
        copy.add_items(pd.DataFrame({"artikel": [7], "title": ["lamp"]}))
    with pytest.raises(DataError, match="1 of 2 items without an id; expected: one id per row"):
        copy.add_items(pd.DataFrame({"artikel": ["N1", None], "title": [None, "lamp"]}))
    with pytest.raises(DataError, match="column 'retired' of type string; expected: true or false"):
        copy.add_items(pd.DataFrame({"artikel": ["P05"], "retired": ["false"]}))
    vectors = shop.catalogue.modalities["text"].vectors[5:6]
    assert copy.add_items(pd.DataFrame({"artikel": ["N1"]}), vectors={"text": vectors})["without_vectors"] == 0


def test_items_of_a_shop_of_vectors_bring_theirs(
    tables: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events, items = tables
    vectors = {"text": np.eye(N_ITEMS, 8, dtype=np.float32) + 0.1}
    shop = mr.Shop.from_frames(events, items, **NAMES, vectors=vectors, folder=tmp_path)
    model = mr.Recommender("tiny", train__epochs=1).fit(shop)
    given = model.add_items(pd.DataFrame({"artikel": ["N1"]}), vectors={"text": vectors["text"][5:6]})
    assert given["without_vectors"] == 0
    capfd.readouterr()
    assert model.add_items(pd.DataFrame({"artikel": ["N2"]}))["without_vectors"] == 1
    assert "1 of 1 new items have no vector of text" in " ".join(capfd.readouterr().err.split())
    everything = model.recommend(sessions=[["P05"]], k=N_ITEMS + 2, exclude_seen=False)
    assert "N1" in set(everything["item"])


def test_words_stand_beside_vectors_of_ones_own(tables: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events, items = tables
    vectors = {"text": np.eye(N_ITEMS, 8, dtype=np.float32) + 0.1}
    shop = mr.Shop.from_frames(events, items, **NAMES, vectors=vectors, words="title", folder=tmp_path)
    assert list(shop.catalogue.modalities) == ["text", "words"]
    model = mr.Recommender("tiny", train__epochs=1).fit(shop)
    new = pd.DataFrame({"artikel": ["N1"], "title": [items["title"][5]]})
    assert model.add_items(new, vectors={"text": vectors["text"][5:6]})["without_vectors"] == 0
    assert "N1" in set(model.recommend(sessions=[["P05"]], k=N_ITEMS + 1, exclude_seen=False)["item"])
    assert "no vector" not in capfd.readouterr().err
    mr.Shop.from_frames(events, items, **NAMES, vectors=vectors, folder=tmp_path)  # made anew, without the words
    model.add_items(new.assign(artikel="N2"), vectors={"text": vectors["text"][5:6]})
    told = " ".join(capfd.readouterr().err.split())
    assert "1 new items get no vector of words, which 100% of the items have" in told
    assert "it reads title" in told
    with pytest.raises(ConfigError, match="vectors of 'words', and words to encode"):
        mr.Shop.from_frames(events, items, **NAMES, words="title", vectors={"words": np.ones((N_ITEMS, 2))})


def test_a_temporary_folder_ends_with_its_process() -> None:
    code = "from missrec_t4r.recommender.shop import temporary_folder as f; print(f('missrec-'))"
    folder = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert Path(folder).name.startswith("missrec-")
    assert not Path(folder).exists()


def test_errors_of_a_shop_name_its_own_arguments(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    events, items = tables
    own = {"user": "kunde", "item": "artikel", "time": "zeit"}
    with pytest.raises(MISSRecError, match=r"with `time_format`, such as time_format='%d/%m/%Y' for 31/12/2023"):
        mr.Shop.from_frames(events.assign(zeit="31/12/2023"), items, **own)
    with pytest.raises(MISSRecError, match="set `valid_from` and `test_from`"):
        mr.Shop.from_frames(events, items, **own, split="time", valid_from=1_700_000_100)


def test_a_model_whose_folder_holds_another_one_goes_on_in_memory_alone(shop: mr.Shop, tmp_path: Path) -> None:
    first = mr.Recommender("tiny", train__epochs=1, folder=tmp_path / "model").fit(shop)
    before = first.recommend(users=["u1"], k=3)
    unused = pickle.loads(pickle.dumps(first))
    mr.Recommender("tiny", train__epochs=1, folder=tmp_path / "model").fit(shop)  # finds the finished run
    pd.testing.assert_frame_equal(unused.recommend(users=["u1"], k=3), before)
    unused = pickle.loads(pickle.dumps(first))
    second = mr.Recommender("tiny", train__epochs=1, train__seed=7, folder=tmp_path / "model").fit(shop, restart=True)
    pd.testing.assert_frame_equal(first.recommend(users=["u1"], k=3), before)
    new = pd.DataFrame({"artikel": ["N1"], "title": ["lamp number 5"], "in_stock": [True]})
    words = r"run was replaced or removed|bundle was replaced or removed"
    for call in (
        first.evaluate,
        lambda: first.save(tmp_path / "saved"),
        lambda: first.add_items(new),
        lambda: first.similar("P05"),
        lambda: unused.recommend(users=["u1"]),
    ):
        with pytest.raises(ConfigError, match=rf"({words}) .*; expected: .*\. open the present model with Recommender"):
            call()
    loaded = mr.Recommender.load(tmp_path / "model" / "bundle", shop=shop)
    pd.testing.assert_frame_equal(loaded.recommend(users=["u1"]), second.recommend(users=["u1"]))


def test_a_model_of_a_second_shop_is_kept_with_that_shop(shop: mr.Shop, tables: Any, tmp_path: Path) -> None:
    events, _ = tables
    model = mr.Recommender("tiny", train__epochs=1).fit(shop)
    model.fit(mr.Shop.from_frames(events, **NAMES, folder=tmp_path))
    assert model.folder == tmp_path / "models" / "tiny"


def test_another_kind_of_folder_is_named_with_what_opens_it(
    shop: mr.Shop, model: mr.Recommender, tmp_path: Path
) -> None:
    folder = shop.folder / "models" / "tiny"
    for given, words in (
        (folder / "run", rf"is a run folder; expected: a bundle .*Recommender.load\('{folder}/bundle'\)"),
        (folder, rf"is the folder of a Recommender; .*Recommender.load\('{folder}/bundle'\)"),
        (shop.folder, rf"is the folder of a shop; .*Shop.open\('{shop.folder}'\)"),
        (shop.data, rf"is the data folder of a shop; .*Shop.open\('{shop.folder}'\)"),
        (Path(shutil.copytree(shop.data, tmp_path / "data")), r"is a data folder; .*Shop.from_frames"),
        (Path(shutil.copytree(folder / "run", tmp_path / "run")), "is a run folder; .*`missrec export --run"),
        (tmp_path / "nothing", "does not exist"),
    ):
        with pytest.raises(BundleError, match=words):
            mr.Recommender.load(given)
    with pytest.raises(DataError, match=r"bundle is a bundle; expected: a folder of Shop.*Recommender.load"):
        mr.Recommender.load(folder / "bundle", shop=folder / "bundle")
    with pytest.raises(BundleError, match=r"is not a bundle: .*; expected: .*\. choose another `folder`\.") as refused:
        model.save(shop.folder)
    assert "--" not in str(refused.value)


def test_recommendations_leave_the_threads_of_torch_alone(model: mr.Recommender, shop: mr.Shop) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        copy = pickle.loads(pickle.dumps(model))
        copy.recommend(sessions=[["P05"]])
        copy.similar("P05")
        copy.similar("P05", by="content")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_vectors_of_a_shop_may_be_files(tables: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(N_ITEMS, 8)).astype(np.float32))
    columns = {"user": "kunde", "item": "artikel", "time": "zeit"}
    files = {"text": tmp_path / "text.npy"}
    shop = mr.Shop.from_frames(*tables, **columns, folder=tmp_path / "shop", modality=files, unknown_items="drop")
    assert shop.catalogue.modalities["text"].width == 8


def test_the_index_that_a_table_remembers_stays_a_column(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(pd.DataFrame({"user": ["a", "b"], "item": [1, 2]}).set_index("user"))
    assert [*pd.read_parquet(write_parquet(table, tmp_path / "events.parquet")).columns] == ["item", "user"]
