"""Values at the edges of their types: the engines keep them apart alike, or refuse them in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.data.event_features import EventColumn, event_columns
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.gpu import device as gpu
from missrec_t4r.etl.pipeline import etl
from tests.workflows.frame_kinds import PandasFiles
from tests.workflows.tables import EVENTS, ITEMS, items_of, rows, write

Engine = Literal["memory", "disk", "gpu"]
PLAIN = EVENTS[["user_id", "item_id", "timestamp"]]
LARGE = pd.array([2**24 + 1, None, 2**24 + 2] * 3, "Int64")


@pytest.fixture(params=["memory", "disk", "gpu"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Each engine; that of the GPU computes with pandas."""
    monkeypatch.setattr(gpu, "open_device", PandasFiles)
    kind: Engine = request.param
    return kind


def built(folder: Path, engine: Engine, events: pa.Table | pd.DataFrame, **options: Any) -> Path:
    files = write(folder / "raw")
    table = pa.Table.from_pandas(events, preserve_index=False) if isinstance(events, pd.DataFrame) else events
    pq.write_table(table, files[0])
    etl(*files, folder / "data", engine=engine, **options)
    return folder / "data"


def with_times(times: pa.Array) -> pa.Table:
    return pa.Table.from_pandas(PLAIN, preserve_index=False).set_column(2, "timestamp", times)


def values(data: Path, name: str = "shelf") -> list[Any]:
    features = json.loads((data / "session_transform.json").read_text())["features"]
    return list(features[name]["values"])


def test_integers_with_nulls_become_the_nearest_float32(tmp_path: Path, engine: Engine) -> None:
    """Whether or not a float32 holds them: 2**24 + 1 lies between two."""
    data = built(tmp_path, engine, PLAIN.assign(stock=LARGE))
    assert rows(data, "train")["ann"]["stock"] == [2**24, 2**24 + 2]
    assert rows(data, "train")["ben"]["stock"] == [2**24]


def test_categories_of_integers_with_nulls_stay_apart(tmp_path: Path, engine: Engine) -> None:
    data = built(tmp_path, engine, PLAIN.assign(shelf=LARGE), categorical_columns=["shelf"])
    assert values(data) == [0, 2**24 + 1, 2**24 + 2]
    assert {type(value) for value in values(data)} == {int}


def test_categories_beyond_the_integers_of_a_double_stay_apart(tmp_path: Path) -> None:
    for engine in ("memory", "disk"):
        shelf = pd.array([2**60 + 1, None, 2**60 + 2] * 3, "Int64")
        data = built(tmp_path / engine, engine, PLAIN.assign(shelf=shelf), categorical_columns=["shelf"])
        assert values(data) == [0, 2**60 + 1, 2**60 + 2]


def test_categories_of_floats_are_those_of_the_file(tmp_path: Path, engine: Engine) -> None:
    """0.1, not what a float32 makes of it, which no request would name; and a run that has read them is loaded."""
    data = built(tmp_path, engine, PLAIN.assign(shelf=[0.1, 2.5, np.nan] * 3), categorical_columns=["shelf"])
    assert values(data) == [0.0, 0.1, 2.5]
    (column,) = event_columns(data, "shelf", 8)
    assert EventColumn.from_dict(json.loads(json.dumps(column.to_dict()))) == column
    assert column.encode([2.5, 0.1, 0, 7]).tolist() == [5, 4, 3, 2]


def test_numbers_too_large_for_a_float32_are_counted_and_0(tmp_path: Path, engine: Engine) -> None:
    """Many systems write the largest double for "none"."""
    data = built(tmp_path, engine, PLAIN.assign(price=[1e39] * 3 + [2.0] * 6))
    assert [rows(data, "train")["ann"]["price"], rows(data, "train")["ben"]["price"]] == [[0.0, 0.0], [2.0]]
    (found,) = [
        one for one in json.loads((data / "etl.json").read_text())["findings"] if one["check"] == "null_feature"
    ]
    assert found["count"] == 3


@pytest.mark.skipif(int(pa.__version__.partition(".")[0]) < 15, reason="pyarrow 14 writes no parquet of 16 bits")
def test_numbers_of_16_bits_are_read(tmp_path: Path, engine: Engine) -> None:
    data = built(tmp_path, engine, PLAIN.assign(dwell=np.arange(9, dtype=np.float16)))
    assert rows(data, "train")["ann"]["dwell"] == [0.0, 2.0]


def test_the_year_9999_is_a_time(tmp_path: Path, engine: Engine) -> None:
    """In microseconds it is beyond the integers of a double; exports write it for "no end"."""
    times = pa.array([2, 1, 253_402_214_400] * 3, pa.timestamp("s"))
    data = built(tmp_path, engine, with_times(times))
    assert rows(data, "test")["ann"]["timestamp"] == [1, 2, 2, 253_402_214_400]
    odd = built(tmp_path, engine, with_times(pa.array([2_500, 1_000, 0] * 3, pa.timestamp("ms"))))
    assert rows(odd, "test")["ann"]["timestamp"] == [0.0, 1.0, 2.5, 2.5]


def test_times_beyond_64_bits_are_refused(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(SchemaError, match="'timestamp' holds integers beyond 64 bits"):
        built(tmp_path, engine, with_times(pa.array([2**63 + 5] * 9, pa.uint64())))


def test_item_ids_beyond_the_integers_of_a_double_stay_apart_beside_a_null(tmp_path: Path, engine: Engine) -> None:
    ids = [2**60 + number for number in range(1, 5)]
    events = PLAIN.assign(item_id=PLAIN.item_id.map(dict(zip(ITEMS.item_id, ids, strict=True))))
    files = write(tmp_path / "raw", events)
    pq.write_table(pa.table({"item_id": pa.array([ids[0], None, *ids[1:], ids[0]], pa.int64())}), files[1])
    report = etl(*files, tmp_path / "data", engine=engine)
    counts = {one["check"]: one["count"] for one in report["findings"]}
    assert (report["items"], counts["null_items"], counts["duplicate_items"]) == (4, 1, 1)
    assert "orphan_items" not in counts
    assert items_of(tmp_path / "data", "test")["ann"] == [5, 3, 5, 4]


@pytest.mark.parametrize(("kind", "first"), [("float64", 2**53), ("float32", 2**24)])
def test_ids_that_floats_cannot_tell_apart_are_refused(tmp_path: Path, engine: Engine, kind: str, first: int) -> None:
    """pandas makes floats of integers with nulls: neighbours have become one id before they are read."""
    users = PLAIN.user_id.map({"ann": first, "ben": 5, "cem": 6}).astype(kind)
    words = f"'user_id' holds ids up to {first} as {'double' if kind == 'float64' else 'float'}.*Int64 in pandas"
    with pytest.raises(SchemaError, match=words):
        built(tmp_path, engine, PLAIN.assign(user_id=users))
    data = built(tmp_path, engine, PLAIN.assign(user_id=users.replace(first, first - 1)))
    assert set(items_of(data, "train")) == {first - 1, 5, 6}


def test_event_types_of_weight_0_may_come_first_or_be_all_of_a_user(tmp_path: Path, engine: Engine) -> None:
    """NVTabular fails on a frame of which an operator leaves nothing: the first rows, or those of a partition."""
    unwanted = pd.concat([EVENTS.assign(event_type="shown", user_id=f"user {number}") for number in range(120)])
    events = pd.concat([unwanted, EVENTS])
    data = built(tmp_path, engine, events, event_weights="shown=0,cart=3", partitions=8)
    assert set(items_of(data, "train")) == {"ann", "ben", "cem"}
    with pytest.raises(DataError, match=r"weight 0.*raise a weight"):
        built(tmp_path / "none", engine, unwanted, event_weights="shown=0")


def test_a_thousand_users_of_weight_0_may_come_before_the_others(tmp_path: Path, engine: Engine) -> None:
    """Users are in the order of a hash; that of ann comes after those of 1,218 of the others."""
    shown = pd.DataFrame({"user_id": [f"user {n}" for n in range(2000)], "event_type": "shown", "timestamp": 1})
    events = pd.concat([shown.assign(item_id="lamp", dwell=0.0), EVENTS[EVENTS.user_id == "ann"]])
    assert set(items_of(built(tmp_path, engine, events, event_weights="shown=0"), "train")) == {"ann"}


@pytest.mark.parametrize("option", ["partitions", "workers"])
def test_numbers_of_parts_below_1_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{option} -1; expected: at least 1\."):
        etl(*write(tmp_path), tmp_path / "data", engine="disk", **{option: -1})  # type: ignore[arg-type]  # by name
