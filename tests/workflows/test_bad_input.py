"""What is wrong is named with its cure, and nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from missrec_t4r.errors import ConfigError, DataError, MISSRecError, ModalityError, SchemaError
from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.nvt import data_folder
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.synthetic.shop import generate_shop
from missrec_t4r.etl.sources.table import expand
from tests.workflows.tables import EVENTS, ITEMS, save_vectors, write


def _refused(tmp_path: Path, kind: type[MISSRecError], words: str, *files: Path, **options: Any) -> None:
    files = files or write(tmp_path / "raw")
    with pytest.raises(kind, match=words):
        etl(*files, tmp_path / "out" / "data", **options)
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert left == []


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"user_column": "user"}, SchemaError, r"a column 'user'.*--user-column user_id"),
        (
            {"time_column": "event_type"},
            SchemaError,
            "'event_type' is of type string .*'view'; expected: unix seconds or a date",
        ),
        ({"item_column": "dwell"}, SchemaError, "'dwell' holds fractions"),
        ({"user_column": "item_id"}, ConfigError, "three different columns"),
        ({"drop_columns": ["dwel"]}, SchemaError, r"no event column 'dwel' to drop; expected: one of \['dwell'\]"),
        ({"categorical_columns": ["x"]}, SchemaError, r"categorical columns \['x'\] are not event columns"),
        ({"split": "random"}, ConfigError, "split 'random'; expected: leave_one_out or time"),
        ({"unknown_items": "dorp"}, ConfigError, "--unknown-items 'dorp'; expected: append or drop"),
        ({"split": "time", "valid_from": 5}, ConfigError, "only one boundary"),
        ({"split": "time", "valid_from": "soon", "test_from": 9}, ConfigError, "'soon'; expected: a date such as"),
        ({"valid_from": 5, "test_from": 9}, ConfigError, "boundaries are set for a leave-one-out split"),
        ({"split": "time", "valid_from": 9, "test_from": 5}, ConfigError, "the first before the second"),
        ({"split": "time", "valid_from": 1, "test_from": 25}, DataError, "the train split has no session"),
        ({"max_sequence_length": 0}, ConfigError, "--max-sequence-length 0; expected: at least 1"),
        ({"modality": {"text": Path("none.npy")}}, ModalityError, "modality 'text' cannot be read from none.npy"),
        ({"modality": {"presence": Path("none.npy")}}, ModalityError, "not 'presence'"),
    ],
)
def test_settings(tmp_path: Path, options: dict[str, Any], kind: type[MISSRecError], words: str) -> None:
    _refused(tmp_path, kind, words, **options)


def test_dates_of_a_time_split_are_shown_as_dates(tmp_path: Path) -> None:
    options = {"split": "time", "valid_from": "2024-12-01", "test_from": "2024-06-01"}
    _refused(tmp_path, ConfigError, r"--valid-from \d+ \(2024-12-01\) and --test-from \d+ \(2024-06-01\)", **options)


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_event_weights_of_types_that_no_event_has_are_told(tmp_path: Path, engine: str) -> None:
    """A mistyped type keeps its weight of 1: returns that should be left out would stay."""
    found = etl(*write(tmp_path / "raw"), tmp_path / "data", event_weights="view=1,veiw=0,buy=2", engine=engine)
    (finding,) = (one for one in found["findings"] if one["check"] == "event_type_absent")
    assert finding["count"] == len({"veiw", "buy"} - {*EVENTS.event_type})
    assert "names veiw" in finding["message"]
    assert "there are view" in finding["message"]


def test_a_scheduler_that_the_engine_does_not_use_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    etl(*write(tmp_path / "raw"), tmp_path / "data", dask_scheduler="tcp://gone:8786", engine="memory")
    assert "--dask-scheduler and --workers have no effect with --engine memory" in caplog.text


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events, items = write(tmp_path / "raw")
    found = etl([events, tmp_path / "raw" / "*events*", events], items, tmp_path / "data")
    assert found["events"] == len(EVENTS)
    assert "2 of the interactions files are named twice" in caplog.text


def test_a_file_that_is_named_twice_keeps_its_first_place(tmp_path: Path) -> None:
    """Of an item in two files the first row counts."""
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.touch()
    second.touch()
    assert expand([first, second, first], "items") == [first, second]


@pytest.mark.parametrize("options", [{}, {"engine": "disk"}, {"dry_run": True}])
def test_a_missing_column_is_named_with_its_option_in_every_run(tmp_path: Path, options: dict[str, Any]) -> None:
    events = EVENTS.rename(columns={"user_id": "user no"})
    files = write(tmp_path / "raw", events)
    words = "expected: a column 'user-no'. name yours with --user-column, for example --user-column 'user no'"
    _refused(tmp_path, SchemaError, words, *files, user_column="user-no", **options)
    files = write(tmp_path / "raw", EVENTS, ITEMS.rename(columns={"item_id": "sku"}))
    _refused(tmp_path, SchemaError, "expected: a column 'item_id'. name yours with --catalogue-item", *files, **options)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda events, items: (events[:0], items), DataError, "has no rows"),
        (lambda events, items: (events, items[:0]), DataError, "items table .* has no rows"),
        (lambda events, items: (events.assign(item_id=None), items), SchemaError, "type null"),
        (lambda events, items: (events.assign(user_id=1.5), items), SchemaError, "'user_id' holds fractions"),
        (lambda events, items: (events.assign(item_id=7), items), SchemaError, "int64 in the interactions and string"),
        (lambda events, items: (events[:2], items), DataError, "the valid split has no session"),
        (lambda events, items: (events, items.drop(columns="item_id")), SchemaError, "--catalogue-item-column"),
        (lambda events, items: (events.assign(item_id="x"), items), DataError, "no event is on an item"),
    ],
)
def test_tables(tmp_path: Path, change: Callable[..., Any], kind: type[MISSRecError], words: str) -> None:
    _refused(tmp_path, kind, words, *write(tmp_path / "raw", *change(EVENTS, ITEMS)), unknown_items="drop")


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (np.ones((3, 2)), r"shape \(3, 2\) in .*expected: 4 rows, one per item of the item table"),
        (np.ones(4), r"shape \(4,\)"),
        (np.array([[1.0], [np.nan], [0], [0]]), "NaN or infinity in row 1"),
    ],
)
def test_vectors(tmp_path: Path, vectors: np.ndarray, words: str) -> None:
    file = save_vectors(tmp_path / "v.npy", vectors)
    _refused(tmp_path, ModalityError, words, modality={"text": file})


def test_missing_unreadable_and_unknown_files(tmp_path: Path) -> None:
    events, items = write(tmp_path / "raw")
    _refused(tmp_path, DataError, "no interactions file at .*nowhere.parquet", tmp_path / "nowhere.parquet", items)
    _refused(tmp_path, DataError, "no items file at", events, tmp_path / "nowhere.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(events.read_bytes()[:100])
    _refused(tmp_path, DataError, "broken.parquet cannot be read", broken, items)
    (tmp_path / "events.xlsx").touch()
    _refused(tmp_path, DataError, "of an unknown kind", tmp_path / "events.xlsx", items)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"user_id": ["a"]}).to_parquet(other)
    with pytest.raises(SchemaError, match="differ in columns"):
        etl([events, other], items, tmp_path / "out" / "data")


def test_a_failure_half_way_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "raw")
    etl(*files, tmp_path / "out" / "data")
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_folder, "write_request", interrupt)
    with pytest.raises(KeyboardInterrupt):
        etl(*files, tmp_path / "out" / "data", max_events=3)
    assert sorted(path.relative_to(tmp_path) for path in (tmp_path / "out").rglob("*")) == before


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for attempt in (lambda: etl(*write(tmp_path / "raw"), tmp_path / "out"), lambda: generate_shop(tmp_path / "out")):
        with pytest.raises(DataError, match="choose another --out"):
            attempt()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_features_names_what_is_missing(tmp_path: Path) -> None:
    etl(*write(tmp_path / "raw"), tmp_path / "data")
    with pytest.raises(ConfigError, match="neither texts nor images"):
        features(tmp_path / "data")
    with pytest.raises(SchemaError, match="a column 'titel'.*--text-columns title"):
        features(tmp_path / "data", text_columns=["titel"])
    with pytest.raises(DataError, match="there is no folder"):
        features(tmp_path / "data", images=tmp_path / "none")
    with pytest.raises(ModalityError, match="0 of 4 items have a usable image"):
        features(tmp_path / "data", images=tmp_path / "raw")
    with pytest.raises(DataError, match="missrec etl"):
        features(tmp_path / "raw", text_columns=["title"])


def test_a_shop_needs_enough_items(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--items 10; expected: at least 100"):
        generate_shop(tmp_path / "shop", items=10)


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_row_index_that_pandas_left_in_a_file_is_no_feature(tmp_path: Path, engine: str, kind: str) -> None:
    interactions, items = write(tmp_path / "raw")
    events = EVENTS.sort_values("timestamp", kind="stable")
    assert not events.index.equals(EVENTS.index)
    if kind == "parquet":
        events.to_parquet(interactions)
        ITEMS.iloc[::-1].to_parquet(items)
    else:
        interactions = interactions.with_suffix(".csv")
        events.to_csv(interactions)
    found = etl(interactions, items, tmp_path / "data", engine=engine)  # type: ignore[arg-type]  # from the parameters
    assert "row_index" in {finding["check"] for finding in found["findings"]}
    columns = pd.concat(map(pd.read_parquet, (tmp_path / "data" / "train").glob("*.parquet"))).columns
    assert {"event_type-list", "dwell-list"} <= set(columns)
    assert not [name for name in columns if name.startswith(("__", "-", "Unnamed"))]
    assert "__index_level_0__" not in pd.read_parquet(tmp_path / "data" / "catalogue" / "items.parquet").columns


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_a_row_index_that_is_asked_for_is_read(tmp_path: Path, engine: str) -> None:
    interactions, items = write(tmp_path / "raw")
    EVENTS.set_index(pd.Index(EVENTS.timestamp.to_numpy())).drop(columns="timestamp").to_parquet(interactions)
    options = {"engine": engine, "time_column": "__index_level_0__"}
    assert etl(interactions, items, tmp_path / "data", **options)["events"] == len(EVENTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_item_ids_that_are_the_row_index_of_a_file_are_found_by_the_hint(tmp_path: Path, engine: str) -> None:
    interactions, items = write(tmp_path / "raw")
    ITEMS.set_index("item_id").rename_axis(None).to_parquet(items)
    options: dict[str, Any] = {"engine": engine}
    with pytest.raises(SchemaError, match="--catalogue-item-column __index_level_0__, the index that pandas wrote"):
        etl(interactions, items, tmp_path / "data", **options)
    options["catalogue_item_column"] = "__index_level_0__"
    assert etl(interactions, items, tmp_path / "data", **options)["items"] == len(ITEMS)


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_a_row_index_of_a_csv_file_that_is_asked_for_is_read(tmp_path: Path, engine: str) -> None:
    _, items = write(tmp_path / "raw")
    EVENTS.rename(columns={"timestamp": "Unnamed: 0"}).to_csv(tmp_path / "events.csv")
    options = {"engine": engine, "time_column": "Unnamed: 0"}
    found = etl(tmp_path / "events.csv", items, tmp_path / "data", **options)  # type: ignore[arg-type]
    assert found["events"] == len(EVENTS)
    assert [finding["count"] for finding in found["findings"] if finding["check"] == "row_index"] == [1]
