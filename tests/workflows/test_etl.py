"""Raw tables in, whole data folder out."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from merlin.schema import Tags
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.pipeline import etl
from tests.workflows.tables import EVENTS, ITEMS, items_of, rows, save_vectors, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    text = save_vectors(tmp_path / "text.npy", [[1, 0], [0, 2], [0, 0], [3, 3]])
    etl(*write(tmp_path), tmp_path / "data", modality={"text": text}, max_sequence_length=2)
    return tmp_path / "data"


def test_the_whole_result_of_a_small_table(data: Path) -> None:
    # event_type: view (6 events) is 3, cart (2) is 4
    assert rows(data, "test") == {
        "ann": {
            "item_id": [5, 3, 5, 4],
            "timestamp": [10, 20, 30, 40],
            "event_type": [3, 3, 4, 3],
            "dwell": [1, 2, 3, 4],
        },
        "ben": {"item_id": [5, 3, 4], "timestamp": [30, 40, 50], "event_type": [3, 3, 4], "dwell": [0, 9, 0.5]},
    }
    assert rows(data, "valid") == {
        "ann": {"item_id": [5, 3, 5], "timestamp": [10, 20, 30], "event_type": [3, 3, 4], "dwell": [1, 2, 3]},
        "ben": {"item_id": [5, 3], "timestamp": [30, 40], "event_type": [3, 3], "dwell": [0, 9]},
    }
    assert rows(data, "train") == {
        "ann": {"item_id": [5, 3], "timestamp": [10, 20], "event_type": [3, 3], "dwell": [1, 2]},
        "ben": {"item_id": [5], "timestamp": [30], "event_type": [3], "dwell": [0]},
        "cem": {"item_id": [3, 6], "timestamp": [25, 26], "event_type": [3, 3], "dwell": [1, 7]},
    }


def test_the_catalogue_follows_the_item_table(data: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    assert catalogue.items.to_pylist() == [
        {"item_id": "lamp", "train_count": 2, "title": "a lamp", "price": 10.0},
        {"item_id": "desk", "train_count": 0, "title": "a desk", "price": 200.0},
        {"item_id": "sofa", "train_count": 2, "title": None, "price": 900.0},
        {"item_id": "vase", "train_count": 1, "title": "a vase", "price": 5.0},
    ]
    text = catalogue.modalities["text"]
    assert text.present.tolist() == [False, False, False, True, True, False, True]  # the all-zero row lacks the text
    np.testing.assert_array_equal(text.vectors[3:], [[1, 0], [0, 2], [0, 0], [3, 3]])
    assert text.encoder == {"name": "precomputed", "file": "text.npy"}


def test_schema_names_item_and_domain(data: Path) -> None:
    for folder in (data, data / "train", data / "valid", data / "test"):
        schema = TensorflowMetadata.from_proto_text_file(str(folder)).to_merlin_schema()
        item = schema["item_id-list"]
        assert {Tags.ITEM, Tags.ID, Tags.CATEGORICAL, Tags.LIST, Tags.SEQUENCE} <= set(item.tags)
        assert (item.int_domain.min, item.int_domain.max) == (0, 6)  # 3 reserved rows and 4 items
        assert (item.is_list, item.is_ragged, item.value_count.max) == (True, True, 4)
        assert schema.select_by_tag(Tags.ITEM_ID).column_names == ["item_id-list"]
        assert schema.select_by_tag(Tags.CATEGORICAL).column_names == ["item_id-list", "event_type-list"]
        assert schema.select_by_tag(Tags.CONTINUOUS).column_names == ["dwell-list"]
        assert schema.select_by_tag(Tags.USER_ID).column_names == ["user_id"]
    assert str(data.parent) not in (data / "schema.pbtxt").read_text()  # no build-time path


def test_request_transform_is_compiled_from_the_workflow(data: Path) -> None:
    assert json.loads((data / "session_transform.json").read_text()) == {
        "format": 1,
        "item_id": {
            "column": "item_id",
            "type": "string",
            "items": 4,
            "null_row": 1,
            "unknown_row": 2,
            "first_row": 3,
        },
        "max_sequence_length": 2,
        "features": {
            "dwell": {"kind": "continuous"},
            "event_type": {"kind": "categorical", "values": ["view", "cart"]},
        },
    }


def test_report_counts_and_findings(data: Path) -> None:
    report = json.loads((data / "etl.json").read_text())
    assert report["sessions"] == {"train": 3, "valid": 2, "test": 2}
    assert (report["events"], report["users"], report["items"], report["cold_items"]) == (9, 3, 4, 1)
    assert [(finding["check"], finding["count"]) for finding in report["findings"]] == [("time_backwards", 1)]


def test_sessions_of_the_package_read_the_folder(data: Path) -> None:
    histories, targets = Sessions.load(data / "test").split_last()
    assert [list(history) for history in histories] == [[5, 3, 5], [5, 3]]
    assert targets.tolist() == [4, 4]


def test_integer_ids_and_csv_with_other_names(tmp_path: Path) -> None:
    numbers = {"lamp": 30, "desk": 10, "sofa": 40, "vase": 20}
    events = EVENTS.assign(
        item_id=EVENTS.item_id.map(numbers), user_id=EVENTS.user_id.map({"ann": 1, "ben": 2, "cem": 3})
    )
    events = events.rename(columns={"user_id": "who", "item_id": "what", "timestamp": "when"})
    events.to_csv(tmp_path / "a.csv", index=False)
    items = ITEMS.assign(item_id=ITEMS.item_id.map(numbers)).rename(columns={"item_id": "what"})
    items.to_parquet(tmp_path / "items.parquet", index=False)
    etl(
        tmp_path / "*.csv",
        tmp_path / "items.parquet",
        tmp_path / "data",
        user_column="who",
        item_column="what",
        time_column="when",
        drop_columns=["split", "dwell", "event_type"],
    )
    assert rows(tmp_path / "data", "test") == {
        "1": {"item_id": [5, 3, 5, 4], "timestamp": [10, 20, 30, 40]},
        "2": {"item_id": [5, 3, 4], "timestamp": [30, 40, 50]},
    }
    catalogue = Catalogue.load(tmp_path / "data" / "catalogue")
    assert catalogue.id_type == "int64"
    assert catalogue.ids_of([3, 4, 5, 6]) == [30, 10, 40, 20]
    assert json.loads((tmp_path / "data" / "session_transform.json").read_text())["item_id"]["type"] == "int64"


def test_text_ids_keep_their_zeros(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n1,007,1\n1,07,2\n1,7,3\n")
    (tmp_path / "items.csv").write_text("item_id,title\n7,seven\n07,oh seven\n007,bond\n")
    etl(tmp_path / "events.csv", tmp_path / "items.csv", tmp_path / "data")
    assert items_of(tmp_path / "data", "test") == {"1": [5, 4, 3]}


def test_several_files_and_dates(tmp_path: Path) -> None:
    events = EVENTS.drop(columns=["split", "event_type", "dwell"])
    events = events.assign(timestamp=pd.to_datetime(events.timestamp, unit="s"))
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    events[:4].to_parquet(first), events[4:].to_parquet(second)
    _, items = write(tmp_path / "items")
    etl([first, second], items, tmp_path / "data")
    assert rows(tmp_path / "data", "test")["ann"] == {"item_id": [5, 3, 5, 4], "timestamp": [10, 20, 30, 40]}


def test_time_split(tmp_path: Path) -> None:
    etl(*write(tmp_path), tmp_path / "data", split="time", valid_from=30, test_from=40, drop_columns=["split"])
    # [30, 40): ann's sofa at 30 is a target; ben's sofa at 30 has no history. From 40 on: ann's desk, ben's desk.
    assert items_of(tmp_path / "data", "train") == {"ann": [5, 3], "cem": [3, 6]}
    assert items_of(tmp_path / "data", "valid") == {"ann": [5, 3, 5]}
    assert items_of(tmp_path / "data", "test") == {"ann": [5, 3, 5, 4], "ben": [5, 3, 4]}


def test_boundaries_of_a_time_split_may_be_dates(tmp_path: Path) -> None:
    days = pd.Timestamp("2026-03-01") + pd.to_timedelta(EVENTS.timestamp - 30, unit="D")
    files = write(tmp_path, EVENTS.assign(timestamp=days))
    report = etl(*files, tmp_path / "data", split="time", valid_from="2026-03-01", test_from="2026-03-11T00:00Z")
    assert report["settings"]["valid_from"] == pd.Timestamp("2026-03-01").timestamp()
    assert items_of(tmp_path / "data", "valid") == {"ann": [5, 3, 5]}
    assert items_of(tmp_path / "data", "test") == {"ann": [5, 3, 5, 4], "ben": [5, 3, 4]}
    with pytest.raises(ConfigError, match="--valid-from '01/03/2026'; expected: a date such as 2026-03-01"):
        etl(*files, tmp_path / "other", split="time", valid_from="01/03/2026", test_from="2026-03-11")


def test_items_that_only_events_know_are_appended_or_dropped(tmp_path: Path) -> None:
    extra = pd.DataFrame([("ann", "rug", 5, "view", 0.0, "x")], columns=EVENTS.columns)
    text = save_vectors(tmp_path / "text.npy", np.ones((4, 2)))
    files = write(tmp_path, pd.concat([EVENTS, extra]))
    report = etl(*files, tmp_path / "appended", modality={"text": text})
    assert items_of(tmp_path / "appended", "test")["ann"] == [7, 5, 3, 5, 4]
    assert ("orphan_items", 1) in [(finding["check"], finding["count"]) for finding in report["findings"]]
    catalogue = Catalogue.load(tmp_path / "appended" / "catalogue")
    assert (catalogue.ids_of([7]), catalogue.modalities["text"].present[7]) == (["rug"], False)
    etl(*files, tmp_path / "dropped", unknown_items="drop")
    assert items_of(tmp_path / "dropped", "test")["ann"] == [5, 3, 5, 4]


def test_rows_without_ids_and_repeats_are_reported(tmp_path: Path) -> None:
    odd = pd.DataFrame(
        [(None, "lamp", 1), ("ann", None, 2), ("ann", "", 2), ("ann", "lamp", None), ("ben", "desk", 50)],
        columns=["user_id", "item_id", "timestamp"],
    )
    events = pd.concat([EVENTS[odd.columns], odd])
    files = write(tmp_path, events, pd.concat([ITEMS, ITEMS[1:2], pd.DataFrame({"item_id": [None]})]))
    report = etl(*files, tmp_path / "data", drop_duplicates=True)
    found = {finding["check"]: finding["count"] for finding in report["findings"]}
    assert found == {
        "null_user_id": 1,
        "null_item_id": 2,
        "null_timestamp": 1,
        "duplicate_events": 1,
        "duplicate_items": 1,
        "null_items": 1,
        "time_backwards": 1,
    }
    assert items_of(tmp_path / "data", "test") == {"ann": [5, 3, 5, 4], "ben": [5, 3, 4]}


def test_event_columns_with_nulls_and_integer_categories(tmp_path: Path) -> None:
    events = EVENTS.assign(dwell=EVENTS.dwell.where(EVENTS.dwell < 9), aisle=[7, 7, 8, 7, 8, 7, 7, 9, 7])
    events.loc[0, "event_type"] = None
    etl(*write(tmp_path, events), tmp_path / "data", categorical_columns=["aisle"])
    ann, ben = (rows(tmp_path / "data", "test")[user] for user in ("ann", "ben"))
    assert ann["event_type"] == [5, 3, 4, 3]  # view 6, cart 2, "" 1
    assert ann["aisle"] == [3, 4, 4, 3]  # 7 is most frequent, then 8, then 9
    assert ben["dwell"] == [0, 0, 0.5]


def test_sessions_can_be_cut(tmp_path: Path) -> None:
    etl(*write(tmp_path), tmp_path / "data", max_events=3)
    assert items_of(tmp_path / "data", "test") == {"ann": [3, 5, 4], "ben": [5, 3, 4]}
    assert items_of(tmp_path / "data", "train") == {"ann": [3], "ben": [5], "cem": [3, 6]}


def test_partitions_change_nothing(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    events = pd.DataFrame(
        {
            "user_id": chance.integers(0, 12, 900).astype(str),
            "item_id": chance.choice(ITEMS.item_id, 900),
            "timestamp": chance.integers(0, 5, 900),  # many ties: their input order must survive the shuffle
            "note": chance.choice(["a", "b", None], 900),
            "position": np.arange(900),
        }
    )
    files = write(tmp_path, events)
    etl(*files, tmp_path / "one", partitions=1)
    etl(*files, tmp_path / "many", partitions=12)  # some partitions stay empty
    for split in ("train", "valid", "test"):
        one, many = rows(tmp_path / "one", split), rows(tmp_path / "many", split)
        assert list(one) == list(many)
        assert one == many


def test_running_again_replaces_the_folder_with_the_same(tmp_path: Path) -> None:
    files = write(tmp_path)
    first = etl(*files, tmp_path / "data")
    before = {split: rows(tmp_path / "data", split) for split in ("train", "valid", "test")}
    (tmp_path / "data" / "stale").touch()
    second = etl(*files, tmp_path / "data")
    assert {split: rows(tmp_path / "data", split) for split in before} == before
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert not (tmp_path / "data" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "events.parquet", "items.parquet"]
