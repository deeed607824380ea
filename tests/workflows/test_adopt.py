"""The output of T4R's tutorial ETL, made with stock operators, becomes a catalogue on its own rows."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import nvtabular as nvt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from merlin.io import Dataset
from merlin.io.worker import clean_worker_cache
from merlin.schema import Tags
from nvtabular import ops
from transformers4rec.torch.utils.data_utils import MerlinDataLoader
from typer.testing import CliRunner

import missrec_t4r.t4r as mr
from missrec_t4r.cli import app
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import event_columns, fit_event_columns, load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.user_sessions import user_sessions, whole_sessions
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.engine.append import update
from missrec_t4r.etl.nvt.adopt import adopt
from missrec_t4r.etl.nvt.adopt_users import BEGIN, number_sessions
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.schema import SPLITS
from missrec_t4r.serving.batch.parquet_io import session_file_of
from missrec_t4r.t4r.columns import as_core_schema
from tests.workflows.tables import save_vectors

DAYS = 4


def _log() -> pd.DataFrame:
    """Events as the tutorial draws them: item ids from a long-tailed distribution, some days of sessions."""
    rng = np.random.default_rng(7)
    count = 1500
    drawn = np.clip(rng.lognormal(3.0, 1.0, count).astype(int), 1, 90) * 10
    start = pd.Timestamp("2020-04-01")
    return pd.DataFrame(
        {
            "session_id": rng.integers(70_000, 70_150, count),
            "item_id": drawn,
            "category": drawn % 7 + 1,
            "timestamp": start + pd.to_timedelta(rng.integers(0, DAYS * 86_400, count), unit="s"),
            "age_days": rng.random(count).astype("float32"),
        }
    ).assign(day=lambda events: (events["timestamp"] - start).dt.days + 1)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tutorial's steps: Categorify, Groupby, ListSlice, Filter; parquet, splits by day, a saved workflow."""
    folder = tmp_path_factory.mktemp("tutorial")
    encoded = ["item_id", "category"] >> ops.Categorify(out_path=str(folder / "stats"))
    grouped = ["session_id", "day", "timestamp", "age_days"] + encoded >> ops.Groupby(
        groupby_cols=["session_id"],
        aggs={"item_id": ["list", "count"], "category": ["list"], "day": ["first"], "age_days": ["list"]},
        sort_cols=["timestamp"],
        name_sep="-",
    )
    lists = (
        (grouped["age_days-list"] >> ops.AddMetadata(tags=[Tags.CONTINUOUS]))
        + (grouped["item_id-list"] >> ops.TagAsItemID())
        + grouped["category-list"]
    ) >> ops.ListSlice(-20)
    chosen = lists + grouped["session_id", "day-first", "item_id-count"]
    workflow = nvt.Workflow(chosen >> ops.Filter(f=lambda frame: frame["item_id-count"] >= 2))
    events = Dataset(_log())
    workflow.fit(events)
    workflow.transform(events).to_parquet(str(folder / "processed"))
    workflow.save(str(folder / "workflow"))
    sessions = pd.concat(pd.read_parquet(file) for file in (folder / "processed").glob("*.parquet"))
    for day, part in sessions.groupby("day-first"):  # as save_time_based_splits lays it out, which needs RAPIDS
        (folder / "days" / str(day)).mkdir(parents=True)
        for name, rows in zip(("test", "valid", "train"), (part[0::10], part[1::10], part), strict=True):
            rows.to_parquet(folder / "days" / str(day) / f"{name}.parquet", index=False)
    (folder / "days" / "schema.pbtxt").write_bytes((folder / "processed" / "schema.pbtxt").read_bytes())
    yield folder
    clean_worker_cache()


@pytest.fixture
def items(tmp_path: Path) -> tuple[Path, Path]:
    """An item table in another order than the vocabulary: one item fewer and two more; and vectors beside it."""
    ids = sorted(set(_log()["item_id"]), reverse=True)[1:]
    table = pd.DataFrame({"sku": [*ids, 5, 6], "title": [f"item {number}" for number in [*ids, 5, 6]]})
    table.to_parquet(tmp_path / "items.parquet")
    return tmp_path / "items.parquet", save_vectors(tmp_path / "text.npy", table[["sku"]].to_numpy() * [1.0, 2.0])


def test_every_row_means_what_the_workflow_says(tutorial: Path, items: tuple[Path, Path], tmp_path: Path) -> None:
    report = adopt(
        tutorial / "workflow",
        tmp_path / "data",
        sessions=tutorial / "processed",
        items=items[0],
        item_column="sku",
        modality={"text": items[1]},
        fingerprint={"text": "mine"},
    )
    catalogue = Catalogue.load(tmp_path / "data" / "catalogue")
    rows_of = dict(zip(*np.unique(_log()["item_id"], return_counts=True), strict=True))
    processed = pq.read_table(tutorial / "processed" / "part_0.parquet").to_pylist()
    # The stock workflow's own encoding, session by session, decoded with the catalogue, is the raw log again.
    log = _log().sort_values("timestamp", kind="stable").groupby("session_id")["item_id"].agg(list)
    assert all(
        catalogue.ids_of(line["item_id-list"]) == log[line["session_id"]][-20:]
        for line in processed
        if len(set(log[line["session_id"]])) > 1
    )
    assert catalogue.n_items == len(rows_of) + 2
    event_features = {column.name: column for column in event_columns(tmp_path / "data", "auto", 8)}
    assert {name: column.kind for name, column in event_features.items()} == {
        "category": "categorical",
        "age_days": "continuous",
    }
    line = next(line for line in processed if len(set(log[line["session_id"]])) > 1)
    assert event_features["category"].decode(line["category-list"]) == [
        item % 7 + 1 for item in catalogue.ids_of(line["item_id-list"])
    ]
    assert catalogue.ids_of([catalogue.n_rows - 2, catalogue.n_rows - 1]) == [5, 6]  # new: behind the last row
    text = catalogue.modalities["text"]
    raw = np.array(catalogue.ids_of(range(3, catalogue.n_rows)), float)
    np.testing.assert_array_equal(text.vectors[3:][text.present[3:]][:, 0], raw[text.present[3:]])
    assert text.fingerprint == "mine"
    assert {(finding["check"], finding["count"]) for finding in report["findings"]} == {
        ("items_without_line", 1),
        ("new_items", 2),
    }
    assert catalogue.items["title"].null_count == 1
    train, test = (Sessions.load(tmp_path / "data" / split) for split in ("train", "test"))
    assert set(test.features) == {"age_days", "category"}
    assert catalogue.train_count.sum() == len(train.values)
    first = next(line for line in processed if len(line["item_id-list"]) >= 3)
    assert test[0].tolist() == first["item_id-list"]
    assert test.users[0].as_py() == first["session_id"]
    assert json.loads((tmp_path / "data" / "session_transform.json").read_text())["item_id"]["type"] == "int64"


def test_a_t4r_script_takes_the_catalogue_and_keeps_its_own_files(
    tutorial: Path, items: tuple[Path, Path], tmp_path: Path
) -> None:
    adopt(
        tutorial / "workflow",
        tmp_path / "data",
        **{name: tutorial / "days" / "2" / f"{name}.parquet" for name in ("train", "valid", "test")},
        items=items[0],
        item_column="sku",
        modality={"text": items[1]},
    )
    days = pq.read_table(tutorial / "days" / "2" / "valid.parquet", columns=["item_id-list"])
    valid = Sessions.load(tmp_path / "data" / "valid")
    assert [row.tolist() for row in valid] == days["item_id-list"].to_pylist()
    schema = Dataset(str(tutorial / "processed"), engine="parquet").schema
    schema = as_core_schema(schema).select_by_name(["item_id-list", "category-list", "age_days-list"])
    catalogue = Catalogue.load(tmp_path / "data" / "catalogue")
    inputs = mr.MultiModalSequenceFeatures.from_schema(
        schema, max_sequence_length=20, continuous_projection=8, catalogue=catalogue
    )
    file = str(tutorial / "days" / "2" / "train.parquet")
    loader = MerlinDataLoader.from_schema(schema, file, batch_size=8, max_sequence_length=20)
    batch, _ = next(iter(loader))
    assert inputs(batch, testing=True).shape[:2] == (8, 20)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda ids: ids.set_axis(range(1, len(ids) + 1)), SchemaError, "starts at row 1; expected: row 3"),
        (lambda ids: ids[:-5].set_axis(range(3, len(ids) - 2)), DataError, "schema counts .* rows and the vocabulary"),
        (lambda ids: ids.assign(item_id=10), SchemaError, "an id twice"),
    ],
    ids=["older NVTabular", "another fit", "doubled"],
)
def test_a_vocabulary_that_does_not_fit_is_refused(change, kind, words, tutorial: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ids = pd.read_parquet(tutorial / "workflow" / "categories" / "unique.item_id.parquet")
    ids = change(ids)
    ids.index = pd.RangeIndex(ids.index[0], ids.index[-1] + 1)
    ids.to_parquet(tmp_path / "unique.item_id.parquet")
    with pytest.raises(kind, match=words):
        adopt(tmp_path / "unique.item_id.parquet", tmp_path / "data", sessions=tutorial / "processed")
    assert not (tmp_path / "data").exists()


def _as_cudf_writes(file: Path, target: Path, first: int = 3) -> None:
    """Write a vocabulary as NVTabular on cuDF: the index is a column, the first one."""
    frame = pd.read_parquet(file).reset_index(drop=True)
    table = pa.Table.from_pandas(frame.set_axis(np.arange(first, first + len(frame))))
    names = table.column_names
    assert names[-1] == "__index_level_0__"
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.select([names[-1], *names[:-1]]), target)


def test_a_workflow_that_was_fitted_on_cudf(tutorial: Path, tmp_path: Path) -> None:
    stock = tutorial / "workflow" / "categories"
    for name in ("unique.item_id.parquet", "unique.category.parquet"):
        _as_cudf_writes(stock / name, tmp_path / "workflow" / "categories" / name)
    for place in (tutorial, tmp_path):
        adopt(place / "workflow", tmp_path / f"{place.name}-data", sessions=tutorial / "processed")
    folders = [tmp_path / f"{place.name}-data" for place in (tutorial, tmp_path)]
    catalogues = [Catalogue.load(folder / "catalogue") for folder in folders]
    assert catalogues[0].items.equals(catalogues[1].items)
    transforms = [json.loads((folder / "session_transform.json").read_text()) for folder in folders]
    assert transforms[0] == transforms[1]
    assert transforms[0]["features"]["category"]["kind"] == "categorical"
    lonely = tmp_path / "a vocabulary.parquet"  # its own name says nothing about the column
    _as_cudf_writes(stock / "unique.item_id.parquet", lonely)
    found = adopt(lonely, tmp_path / "data", sessions=tutorial / "processed", vocabulary_column="sku", dry_run=True)
    assert found["items"] == catalogues[0].n_items
    _as_cudf_writes(stock / "unique.item_id.parquet", lonely, first=1)
    with pytest.raises(SchemaError, match="starts at row 1; expected: row 3"):
        adopt(lonely, tmp_path / "data", sessions=tutorial / "processed")


def test_what_is_missing_is_named(tutorial: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sessions or --train"):
        adopt(tutorial / "workflow", tmp_path / "data")
    with pytest.raises(DataError, match=r"unique.item.parquet; found: .*unique.item_id.parquet.*--vocabulary-column"):
        adopt(tutorial / "workflow", tmp_path / "data", sessions="x", vocabulary_column="item")
    with pytest.raises(DataError, match=r"workflow.pkl, a pickle, which is never read; .*give .*/workflow\."):
        adopt(tutorial / "workflow" / "workflow.pkl", tmp_path / "data", sessions="x")
    lonely = tmp_path / "sessions.parquet"
    lonely.write_bytes((tutorial / "processed" / "part_0.parquet").read_bytes())
    with pytest.raises(SchemaError, match=r"no schema.pbtxt beside .*--schema"):
        adopt(tutorial / "workflow", tmp_path / "data", sessions=lonely)
    shutil.copy(tutorial / "processed" / "schema.pbtxt", tmp_path)
    sessions = pd.read_parquet(lonely)
    sessions.rename(columns={"item_id-list": "sku-list"}).to_parquet(lonely)
    words = r"ITEM_ID: \[\]; the schema tags \['item_id-list'\], the sessions have the lists \[.*'sku-list'"
    with pytest.raises(SchemaError, match=words):
        adopt(tutorial / "workflow", tmp_path / "data", sessions=lonely)
    sessions.assign(**{"item_id-list": sessions["item_id-list"].astype(str)}).to_parquet(lonely)
    with pytest.raises(SchemaError, match=r"'item_id-list' is tagged ITEM_ID and holds texts such as .*CONVERT_STRING"):
        adopt(tutorial / "workflow", tmp_path / "data", sessions=lonely)


def test_the_command(tutorial: Path, tmp_path: Path) -> None:
    arguments = ["catalogue", "adopt", "--workflow", tutorial / "workflow", "--sessions", tutorial / "processed"]
    ran = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "data")])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["adopted"]["items"] == said["items"] == _log()["item_id"].nunique()


@pytest.mark.parametrize("fixed", [True, False])
def test_vectors_per_event_come_along_and_are_an_event_feature(tutorial: Path, tmp_path: Path, fixed: bool) -> None:
    """A list of vectors beside the items, tagged EMBEDDING: padding and unknown items go with their vectors."""
    sessions = pq.read_table(tutorial / "processed" / "part_0.parquet")
    items = sessions["item_id-list"].combine_chunks()
    flat = np.asarray(items.flatten())
    vectors = np.stack([flat, flat * 2, -flat], 1).astype(np.float32)
    values = pa.array(vectors.ravel())
    ends = pa.array(np.arange(0, 3 * len(flat) + 1, 3, dtype=np.int32))
    inner = pa.FixedSizeListArray.from_arrays(values, 3) if fixed else pa.ListArray.from_arrays(ends, values)
    scenes = pa.ListArray.from_arrays(pa.array(items.offsets.to_numpy() - items.offsets[0].as_py()), inner)
    (tmp_path / "processed").mkdir()
    pq.write_table(sessions.append_column("scene-list", scenes), tmp_path / "processed" / "part_0.parquet")
    schema = (tutorial / "processed" / "schema.pbtxt").read_text()
    scene = 'feature { name: "scene-list" type: FLOAT annotation { tag: "embedding" tag: "list" } }'
    (tmp_path / "processed" / "schema.pbtxt").write_text(f"{schema}\n{scene}\n")
    adopt(tutorial / "workflow", tmp_path / "data", sessions=tmp_path / "processed")
    (column,) = event_columns(tmp_path / "data", "scene", 8)
    train = load_sessions(tmp_path / "data", "train", [column])
    assert column.kind == "pretrained"
    np.testing.assert_array_equal(train.features["scene"][:, 1], 2 * train.values)
    (measured,) = fit_event_columns([column], train)
    assert (measured.size, measured.std > 1) == (3, True)


def _with_items(tutorial: Path, folder: Path, lists: pa.Array) -> Path:
    """Write the sessions with other item lists; the columns beside are as long as before."""
    sessions = pq.read_table(tutorial / "processed" / "part_0.parquet", columns=["session_id"])
    folder.mkdir()
    pq.write_table(sessions.append_column("item_id-list", lists), folder / "part_0.parquet")
    shutil.copy(tutorial / "processed" / "schema.pbtxt", folder)
    return folder


def _rows(tutorial: Path) -> list[list[int]]:
    rows: list[list[int]] = pq.read_table(tutorial / "processed" / "part_0.parquet")["item_id-list"].to_pylist()
    return rows


@pytest.mark.parametrize("kind", [pa.list_(pa.uint64()), pa.large_list(pa.int32()), pa.list_(pa.float64()), "fixed"])
def test_lists_of_every_kind_are_the_same_sessions(kind: pa.DataType | str, tutorial: Path, tmp_path: Path) -> None:
    rows = _rows(tutorial)
    if kind == "fixed":
        length = max(map(len, rows))
        padded = [row + [0] * (length - len(row)) for row in rows]
        lists = pa.array(padded, pa.list_(pa.int64(), length))
    else:  # pandas writes integers beside a missing one as floats, the missing one as NaN
        lists = pa.array(
            [[float("nan"), *map(float, row)] for row in rows] if kind == pa.list_(pa.float64()) else rows, kind
        )
    adopt(tutorial / "workflow", tmp_path / "data", sessions=_with_items(tutorial, tmp_path / "processed", lists))
    test = Sessions.load(tmp_path / "data" / "test")
    assert [session.tolist() for session in test] == [row for row in rows if len(row) > 2]


@pytest.mark.parametrize(
    ("value", "words"), [("SKU-7", "string, such as 'SKU-7'.*rows of the workflow"), (3.5, "double, such as 3.5")]
)
def test_lists_that_hold_no_rows_are_refused(value: object, words: str, tutorial: Path, tmp_path: Path) -> None:
    sessions = _with_items(tutorial, tmp_path / "processed", pa.array([[value, value]] * len(_rows(tutorial))))
    with pytest.raises(SchemaError, match=words):
        adopt(tutorial / "workflow", tmp_path / "data", sessions=sessions)


def _described(file: Path, column: str) -> tuple[str, str]:
    """Return the description of a column in a schema.pbtxt, and that of all others."""
    described = re.split(r"(?m)^(?=feature \{)", file.read_text())
    (own,) = (text for text in described if f'name: "{column}"' in text)
    return own, "".join(text for text in described if text != own)


@pytest.mark.parametrize("key", ["only in the table", "only in the schema"])
def test_the_session_key_may_be_in_the_table_or_in_the_schema_alone(key: str, tutorial: Path, tmp_path: Path) -> None:
    sessions = _with_items(tutorial, tmp_path / "processed", pa.array(_rows(tutorial)))
    own, others = _described(sessions / "schema.pbtxt", "session_id")
    if key == "only in the table":
        (sessions / "schema.pbtxt").write_text(others)
    else:
        tagged = own.replace("annotation {", 'annotation {\n    tag: "id"\n    tag: "session"')
        (sessions / "schema.pbtxt").write_text(others + tagged)
        table = pq.read_table(sessions / "part_0.parquet")
        pq.write_table(table.drop_columns(["session_id"]), sessions / "part_0.parquet")
    adopt(tutorial / "workflow", tmp_path / "data", sessions=sessions)
    test = Sessions.load(tmp_path / "data" / "test")
    assert [session.tolist() for session in test] == [row for row in _rows(tutorial) if len(row) > 2]
    in_data = pq.read_schema(tmp_path / "data" / "test" / "part_0.parquet").names
    assert set(re.findall(r'(?m)^  name: "(.+)"', (tmp_path / "data" / "schema.pbtxt").read_text())) <= set(in_data)


def test_the_tagged_column_holds_the_items_whatever_others_are_called(tutorial: Path, tmp_path: Path) -> None:
    sessions = _with_items(tutorial, tmp_path / "processed", pa.array(_rows(tutorial)))
    table = pq.read_table(sessions / "part_0.parquet")
    others = pa.array([row[::-1] for row in _rows(tutorial)])
    pq.write_table(
        table.rename_columns(["session_id", "film"]).append_column("item_id-list", others), sessions / "part_0.parquet"
    )
    own, others_described = _described(sessions / "schema.pbtxt", "item_id-list")
    untagged = re.sub(r'    tag: "(item|id|item_id)"\n', "", own)
    (sessions / "schema.pbtxt").write_text(others_described + untagged + own.replace("item_id-list", "film"))
    adopt(tutorial / "workflow", tmp_path / "data", sessions=sessions)
    test = Sessions.load(tmp_path / "data" / "test")
    assert [session.tolist() for session in test] == [row for row in _rows(tutorial) if len(row) > 2]


def test_the_id_column_takes_the_name_of_another_one(tutorial: Path, items: tuple[Path, Path], tmp_path: Path) -> None:
    pd.read_parquet(items[0]).assign(item_id="other").to_parquet(items[0])
    report = adopt(
        tutorial / "workflow", tmp_path / "data", sessions=tutorial / "processed", items=items[0], item_column="sku"
    )
    assert ("column_name_taken", 1) in {(finding["check"], finding["count"]) for finding in report["findings"]}
    table = Catalogue.load(tmp_path / "data" / "catalogue").items
    assert table["title"][1].as_py() == f"item {table['item_id'][1].as_py()}"


def test_categories_keep_their_raw_values_whatever_their_list_is_called(tutorial: Path, tmp_path: Path) -> None:
    """NVTabular calls it ``category_list`` by default; the schema says which vocabulary its codes are of."""
    sessions, workflow = tmp_path / "processed", shutil.copytree(tutorial / "workflow", tmp_path / "workflow")
    sessions.mkdir()
    table = pq.read_table(tutorial / "processed" / "part_0.parquet")
    names = ["kind_list" if name == "category-list" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), sessions / "part_0.parquet")
    schema = (tutorial / "processed" / "schema.pbtxt").read_text()
    (sessions / "schema.pbtxt").write_text(schema.replace('"category-list"', '"kind_list"'))
    report = adopt(workflow, tmp_path / "data", sessions=sessions)
    transform = json.loads((tmp_path / "data" / "session_transform.json").read_text())
    assert sorted(transform["features"]["kind_list"]["values"]) == [1, 2, 3, 4, 5, 6, 7]
    assert report["findings"] == []

    (workflow / "categories" / "unique.category.parquet").unlink()
    (finding,) = adopt(workflow, tmp_path / "data", sessions=sessions)["findings"]
    assert (finding["check"], "codes of ['kind_list']" in finding["message"]) == ("categories_as_codes", True)


def test_users_are_told_apart_in_given_splits_and_keep_the_ids_of_a_named_column(
    tutorial: Path, tmp_path: Path
) -> None:
    """A session key of another name, without a tag, is not found; numbers must not join sessions of two splits."""
    whole = pq.read_table(tutorial / "processed" / "part_0.parquet")
    whole = whole.rename_columns(["visit" if name == "session_id" else name for name in whole.column_names])
    parts = {name: whole.slice(10 * start, 10) for start, name in enumerate(("train", "valid", "test"))}
    files = _splits(tutorial, tmp_path, **parts)
    report = adopt(tutorial / "workflow", tmp_path / "data", **files)  # type: ignore[arg-type]
    assert [(finding["check"], finding["count"]) for finding in report["findings"]] == [("numbered_sessions", 10)] * 3
    assert "--user-column" in report["findings"][0]["message"]
    assert len(user_sessions(tmp_path / "data")[0]) == 30

    report = adopt(tutorial / "workflow", tmp_path / "data", user_column="visit", **files)  # type: ignore[arg-type]
    assert report["findings"] == []
    assert sorted(user_sessions(tmp_path / "data")[0]) == sorted(whole["visit"].to_pylist()[:30])  # type: ignore[type-var]
    with pytest.raises(SchemaError, match=r"no column 'visitor' of users among .*'visit'.*--user-column"):
        adopt(tutorial / "workflow", tmp_path / "none", user_column="visitor", **files)  # type: ignore[arg-type]


def test_sessions_are_numbered_where_not_all_splits_have_the_same_key(tutorial: Path, tmp_path: Path) -> None:
    """The numbers of the others would be the keys of some, and two users one."""
    whole = pq.read_table(tutorial / "processed" / "part_0.parquet")
    keyed = whole.set_column(whole.column_names.index("session_id"), "session_id", pa.array(range(len(whole))))
    parts = {"valid": whole.slice(10, 10).drop_columns(["session_id"])}
    parts |= {name: keyed.slice(start, 10) for name, start in (("train", 0), ("test", 20))}
    report = adopt(tutorial / "workflow", tmp_path / "data", **_splits(tutorial, tmp_path, **parts))  # type: ignore[arg-type]
    assert len(user_sessions(tmp_path / "data")[0]) == 30
    told = [finding["message"] for finding in report["findings"] if finding["check"] == "numbered_sessions"]
    assert [message.split(":")[0] for message in told[1:]] == ["'session_id' is not the key of all splits"] * 2


def _daily(tutorial: Path, file: Path, rows: list[tuple[str, int, list[int]]], days: bool = True) -> Path:
    """Write rows of users: of a day each, as a Groupby on both gives them."""
    users, day, items = map(list, zip(*rows, strict=True))
    file.parent.mkdir(exist_ok=True)
    shutil.copy(tutorial / "processed" / "schema.pbtxt", file.parent)
    columns = {"user_id": users, "item_id-list": pa.array(items, pa.list_(pa.int64()))}
    pq.write_table(pa.table(columns | ({"day-first": day} if days else {})), file)
    return file


def _scored(data: Path) -> dict[str, list[int]]:
    """Return the rows of the items that `missrec score --data` asks for, by user."""
    ids = Catalogue.load(data / "catalogue").items["item_id"].to_pylist()
    with session_file_of(data) as file:
        table = pq.read_table(file)
    return {
        user: [3 + ids.index(item) for item in items] for user, items in zip(*table.to_pydict().values(), strict=True)
    }


@pytest.mark.parametrize("days", [True, False])
def test_no_day_of_a_user_is_lost_or_counted_twice(days: bool, tutorial: Path, tmp_path: Path) -> None:
    """`missrec score --data` asks for all events of a user, and `missrec export --recount` counts them once."""
    rows = [("ann", 2, [5, 6, 7]), ("bob", 1, [8, 9, 10, 11]), ("ann", 1, [12, 13, 14, 15]), ("ann", 3, [5])]
    sessions = _daily(tutorial, tmp_path / "days" / "all.parquet", rows, days)
    report = adopt(tutorial / "workflow", tmp_path / "data", sessions=sessions)
    ann = [12, 13, 14, 15, 5, 6, 7, 5] if days else [5, 6, 7, 12, 13, 14, 15, 5]
    assert _scored(tmp_path / "data") == {"ann": ann, "bob": [8, 9, 10, 11]}
    assert sorted(map(list, whole_sessions(tmp_path / "data"))) == sorted(items for _, _, items in rows)
    (finding,) = report["findings"]
    assert (finding["check"], finding["count"]) == ("users_with_several_sessions", 1)
    assert ("timestamp-first" in finding["message"]) is not days


def test_days_of_given_splits_are_joined_whatever_the_splits_have_in_common(tutorial: Path, tmp_path: Path) -> None:
    """Rows of other days, the same row in two splits, as in T4R's day folders, and beginnings of one."""
    train = [("ann", 1, [5, 6]), ("ann", 2, [5, 7, 8]), ("bob", 1, [9, 10, 11]), ("cat", 1, [12, 13])]
    splits = {
        "train": train,
        "valid": [("ann", 2, [5, 7, 8]), ("bob", 1, [9, 10, 11, 12]), ("cat", 2, [14, 15])],
        "test": [("ann", 3, [16, 17]), ("bob", 1, [9, 10, 11, 12, 13]), ("cat", 2, [14, 15, 16])],
    }
    files = {name: _daily(tutorial, tmp_path / "days" / f"{name}.parquet", rows) for name, rows in splits.items()}
    adopt(tutorial / "workflow", tmp_path / "data", **files)  # type: ignore[arg-type]
    whole = {"ann": [5, 6, 5, 7, 8, 16, 17], "bob": [9, 10, 11, 12, 13], "cat": [12, 13, 14, 15, 16]}
    assert _scored(tmp_path / "data") == whole
    counted = whole_sessions(tmp_path / "data")
    assert sorted(counted.values.tolist()) == sorted(row for items in whole.values() for row in items)
    assert [row.tolist() for row in Sessions.load(tmp_path / "data" / "train")] == [items for _, _, items in train]


_DAYS = [("ann", 2, [5, 6, 7, 4]), ("ann", 1, [8, 9, 10, 11])]


@pytest.mark.parametrize(
    ("column", "times"),
    [
        ("day", ["2024-10-01", "2024-02-01"]),
        ("day", ["10", "2"]),
        ("timestamp-list", [["2024-10-01T00:00:00Z"] * 4, ["2024-02-01 00:00"] * 4]),
        ("date-first", pa.array([20, 19], pa.date32())),
    ],
)
def test_days_are_in_their_order_however_they_are_written(
    column: str, times: list[object], tutorial: Path, tmp_path: Path
) -> None:
    file = _daily(tutorial, tmp_path / "days" / "all.parquet", _DAYS, days=False)
    table = pq.read_table(file).append_column(column, [times])
    pq.write_table(table.append_column("time", [["morning", "evening"]]), file)
    report = adopt(tutorial / "workflow", tmp_path / "data", sessions=file)
    assert _scored(tmp_path / "data") == {"ann": [8, 9, 10, 11, 5, 6, 7, 4]}
    assert [finding["message"].split("in the order of ")[-1] for finding in report["findings"]] == ["their times"]


@pytest.mark.parametrize("times", [["10/1/2024", "2/1/2024"], [float("nan"), 1.0]])
def test_what_is_no_time_orders_no_days(times: list[object], tutorial: Path, tmp_path: Path) -> None:
    file = _daily(tutorial, tmp_path / "days" / "all.parquet", _DAYS, days=False)
    pq.write_table(pq.read_table(file).append_column("day", [times]), file)
    report = adopt(tutorial / "workflow", tmp_path / "data", sessions=file)
    assert _scored(tmp_path / "data") == {"ann": [5, 6, 7, 4, 8, 9, 10, 11]}
    missing = sum(not isinstance(time, float) or time != time for time in times)
    assert f"files and rows: {missing} of 2 rows have no time" in report["findings"][0]["message"]


def test_a_guest_account_with_most_of_the_rows_takes_no_longer_than_others() -> None:
    """The rows of users whom the shop does not know have one id: each was compared with all before it."""
    rows = 20_000
    columns = {"user_id": ["guest"] * rows, "item_id-list": [[3, row] for row in range(rows)]}
    tables = {split: pa.table(columns | {BEGIN: range(number, number + rows)}) for number, split in enumerate(SPLITS)}
    started = time.process_time()
    numbered = number_sessions(tables, Findings())
    assert time.process_time() - started < 20  # 140 s before
    firsts = [table["session_id"][0].as_py() for table in numbered.values()]
    assert firsts == [0, 2, 5]  # in the order of time: after one row of train, after two of train and one of valid


def test_an_adopted_folder_is_extended_by_its_own_workflow(tutorial: Path, tmp_path: Path) -> None:
    adopt(tutorial / "workflow", tmp_path / "data", sessions=tutorial / "processed")
    _log().to_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match="no user state to update from.* run missrec catalogue adopt again"):
        update(tmp_path / "events.parquet", tmp_path / "data")


def test_a_file_of_training_sessions_is_no_test_split(tutorial: Path, tmp_path: Path) -> None:
    """As a folder that holds train.parquet and test.parquet would be, given for both."""
    _splits(tutorial, tmp_path)
    with pytest.raises(DataError, match=r"\.parquet is in --train and in --valid, whose targets would be trained"):
        adopt(tutorial / "workflow", tmp_path / "data", train=tmp_path, valid=tmp_path, test=tmp_path)


def _splits(tutorial: Path, folder: Path, **changed: pa.Table) -> dict[str, Path]:
    """Write the sessions as all three splits, or another table as one of them."""
    files = {name: folder / f"{name}.parquet" for name in ("train", "valid", "test")}
    for name, file in files.items():
        pq.write_table(changed.get(name, pq.read_table(tutorial / "processed" / "part_0.parquet")), file)
    shutil.copy(tutorial / "processed" / "schema.pbtxt", folder)
    return files


def test_splits_keep_the_columns_that_all_have(tutorial: Path, tmp_path: Path) -> None:
    whole = pq.read_table(tutorial / "processed" / "part_0.parquet")
    report = adopt(
        tutorial / "workflow",
        tmp_path / "data",
        **_splits(tutorial, tmp_path, valid=whole.drop_columns(["category-list"])),  # type: ignore[arg-type]
    )
    assert [column.name for column in event_columns(tmp_path / "data", "auto", 8)] == ["age_days"]
    (finding,) = report["findings"]
    assert (finding["check"], "['category-list'] are not in all" in finding["message"]) == (
        "list_column_left_out",
        True,
    )


def test_sessions_without_anything_before_the_target_are_no_examples(tutorial: Path, tmp_path: Path) -> None:
    whole = pq.read_table(tutorial / "processed" / "part_0.parquet", columns=["session_id", "item_id-list"])
    rows = _rows(tutorial)
    short = whole.set_column(1, "item_id-list", pa.array([rows[0][:1], *rows[1:]]))
    options = _splits(tutorial, tmp_path, train=whole, valid=short, test=whole)
    report = adopt(tutorial / "workflow", tmp_path / "data", **options)  # type: ignore[arg-type]
    assert (report["sessions"]["train"], report["sessions"]["valid"]) == (len(rows), len(rows) - 1)
    assert [finding["check"] for finding in report["findings"]] == ["sessions_of_one_item"]
    alone = whole.set_column(1, "item_id-list", pa.array([row[:1] for row in rows]))
    with pytest.raises(DataError, match="no session of valid has two items"):
        adopt(
            tutorial / "workflow",
            tmp_path / "none",
            **_splits(tutorial, tmp_path, train=whole, valid=alone, test=whole),
        )  # type: ignore[arg-type]


def test_two_inputs_that_contradict_are_refused(tutorial: Path, items: tuple[Path, Path], tmp_path: Path) -> None:
    sessions, others = tutorial / "processed", tmp_path / "others.parquet"
    with pytest.raises(ConfigError, match="--sessions beside --train, --valid, --test"):
        adopt(tutorial / "workflow", tmp_path / "data", sessions=sessions, **_splits(tutorial, tmp_path))  # type: ignore[arg-type]
    pd.read_parquet(items[0]).assign(sku=lambda table: table.sku + 1).to_parquet(others)
    with pytest.raises(DataError, match=r"none of the workflow's .* items is in the item table: .*--item-column"):
        adopt(tutorial / "workflow", tmp_path / "data", sessions=sessions, items=others, item_column="sku")


def test_sessions_too_short_for_a_split_are_refused_with_options_that_the_command_has(
    tutorial: Path, tmp_path: Path
) -> None:
    short = _with_items(tutorial, tmp_path / "processed", pa.array([row[:2] for row in _rows(tutorial)]))
    with pytest.raises(DataError, match="valid split has no session.*--train, --valid and --test") as refused:
        adopt(tutorial / "workflow", tmp_path / "data", sessions=short)
    assert "--split" not in str(refused.value)
