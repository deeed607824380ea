"""Event columns: read from parquet, windowed, reversed and cut with their items; codes of other ETL runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from missrec_t4r.data.batching import collate, prefix_examples, window_examples
from missrec_t4r.data.event_features import EventColumn, event_columns, load_sessions
from missrec_t4r.data.schema_pbtxt import parse_text_message, read_schema
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import SchemaError
from tests.event_features import shop


def ten_times(lengths: list[int]) -> Sessions:
    """Sessions whose features are ten and a hundred times the item, so that a misplaced value shows."""
    values = np.arange(3, 3 + sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Sessions(
        values, offsets, {"ten": values * 10, "pair": np.stack([values, values * 100], 1).astype(np.float32)}
    )


@pytest.mark.parametrize("all_positions", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_batches_keep_every_value_beside_its_item(all_positions: bool, backwards: bool) -> None:
    sessions = ten_times([2, 5, 9])
    choose = window_examples if all_positions else prefix_examples
    examples = choose(sessions, 4, 0, np.random.default_rng(0))
    batch = collate(sessions, examples, 2, all_positions=all_positions, backwards=backwards)
    assert torch.equal(batch.event_features["ten"], batch.item_ids * 10)
    assert torch.equal(batch.event_features["pair"][..., 1], batch.item_ids * 100.0)
    hidden = set(batch.targets.flatten().tolist()) - {0}
    for row, targets in zip(batch.event_features["ten"].tolist(), batch.targets.tolist(), strict=True):
        if not all_positions:  # a prefix holds no value of what it shall predict
            assert not {10 * target for target in targets if target} & set(row)
    assert hidden


def test_cutting_dropping_and_taking_keep_them_aligned() -> None:
    sessions = ten_times([3, 4, 1])
    unknown = Sessions(np.where(sessions.values == 4, 2, sessions.values), sessions.offsets, sessions.features)
    known = unknown.known()
    histories, targets = known.split_last()
    chosen = known.take([2, 0])
    part = known.slice(1, 3)
    for some in (known, histories, chosen, part):
        assert (some.features["ten"] == some.values * 10).all()
        assert (some.features["pair"][:, 1] == some.values * 100).all()
    assert (known.lengths.tolist(), chosen.lengths.tolist(), part.lengths.tolist()) == ([2, 4, 1], [1, 2], [4, 1])
    assert targets.tolist() == [5, 9, 10]
    assert known.padded_features([1, 0], 3)["ten"].tolist() == (known.padded([1, 0], 3) * 10).tolist()


def test_parquet_with_holes(tmp_path: Path) -> None:
    table = {
        "item_id-list": pa.array([[3, 4], [5]]),
        "code-list": pa.array([[3, None], [4]]),
        "flag-list": pa.array([[True, False], [True]]),
        "dwell-list": pa.array([[1.5, None], [2.5]]),
        "scene-list": pa.array([[[1.0, 2.0], None], [[3.0, 4.0]]]),
    }
    pq.write_table(pa.table(table), tmp_path / "part_0.parquet")
    read = Sessions.load(tmp_path).features
    assert read["code"].tolist() == [3, 0, 4]
    assert read["flag"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(read["dwell"], [1.5, np.nan, 2.5])
    assert read["scene"].tolist() == [[1, 2], [0, 0], [3, 4]]
    assert {name: part.dtype.name for name, part in read.items()} == {
        "code": "int32",
        "flag": "int32",
        "dwell": "float32",
        "scene": "float32",
    }
    assert list(Sessions.load(tmp_path, ["dwell"]).features) == ["dwell"]
    pq.write_table(pa.table(table | {"dwell-list": pa.array([[1.5], [2.5]])}), tmp_path / "part_0.parquet")
    with pytest.raises(SchemaError, match="'dwell' has lists of other lengths than the items"):
        Sessions.load(tmp_path)


def test_the_schema_names_the_event_features(tmp_path: Path) -> None:
    data = shop.write(tmp_path / "data", sizes=(5, 5, 5))
    found = event_columns(data, "auto", 16)
    assert [(column.name, column.kind, column.size, column.width) for column in found] == [
        ("event_type", "categorical", 6, 16),
        ("dwell", "continuous", 1, 16),
        ("scene", "pretrained", 0, 16),
    ]
    assert event_columns(data, "none", 16) == ()
    assert event_columns(tmp_path, "auto", 16) == (), "no schema, no event features"


def test_merlins_own_schema_file_is_read_as_merlin_reads_it(tmp_path: Path) -> None:
    merlin = pytest.importorskip("merlin.schema", reason="Merlin is not installed")
    from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

    tags = merlin.Tags
    schema = merlin.Schema(
        [
            merlin.ColumnSchema(
                "item_id-list", dtype="int64", is_list=True, tags=[tags.ITEM_ID, tags.CATEGORICAL, "list"]
            ),
            merlin.ColumnSchema(
                'odd "name" {\\-list',
                dtype="int64",
                is_list=True,
                tags=[tags.CATEGORICAL, tags.LIST],
                properties={"domain": {"min": 0, "max": 41, "name": "odd"}},
            ),
            merlin.ColumnSchema("price-list", dtype="float32", is_list=True, tags=[tags.CONTINUOUS, tags.LIST]),
        ]
    )
    TensorflowMetadata.from_merlin_schema(schema).to_proto_text_file(str(tmp_path))
    facts = {column.name: column for column in read_schema(tmp_path / "schema.pbtxt")}
    assert list(facts) == schema.column_names
    assert facts['odd "name" {\\-list'].highest == 41
    assert [column.name for column in event_columns(tmp_path, "auto", 8)] == ['odd "name" {\\', "price"]


def test_text_messages_of_other_writers() -> None:
    text = """# a comment
    feature: < name: 'a', type: INT; int_domain { max: 7 } >
    feature { name: "b" presence { min_fraction: 1.0 } }"""
    assert parse_text_message(text)["feature"][0] == {"name": ["a"], "type": ["INT"], "int_domain": [{"max": [7]}]}


@pytest.mark.parametrize("text", ['feature { name: "a"', "feature {", "feature { type: INT }"])
def test_a_broken_schema_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "schema.pbtxt").write_text(text)
    with pytest.raises(SchemaError, match=r"schema.pbtxt cannot be read"):
        read_schema(tmp_path / "schema.pbtxt")


def test_categories_that_another_run_numbered_otherwise_are_translated(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    pq.write_table(
        pa.table({"item_id-list": [[3, 4, 5, 6]], "event-list": [[3, 4, 5, 2]]}), tmp_path / "test" / "part_0.parquet"
    )
    features = {"event": {"kind": "categorical", "values": ["gift", "buy", "view"]}}
    (tmp_path / "session_transform.json").write_text(json.dumps({"features": features}))
    model_column = EventColumn("event", "categorical", 5, values=("view", "buy"))
    read = load_sessions(tmp_path, "test", [model_column])
    assert read.features["event"].tolist() == [2, 4, 3, 2]  # gift is unknown to the model
    as_many = EventColumn("event", "categorical", 6, values=("view", "buy", "gift"))
    assert load_sessions(tmp_path, "test", [as_many]).features["event"].tolist() == [5, 4, 3, 2]
