"""Texts in parquet as Arrow's other types of text and as bytes, as polars, Spark and DuckDB write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.etl.pipeline import etl
from tests.workflows.tables import EVENTS, ITEMS, rows

ODD = EVENTS.assign(
    timestamp=[f"2026-01-01 00:00:{second}" for second in EVENTS["timestamp"]],
    dwell=[f"{number},5" for number in EVENTS["dwell"].astype(int)],
)
"""Events whose columns are texts: times and numbers too."""
KINDS = {
    "large_string": pa.large_string(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.large_string()),
}


def _as_kind(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast texts; to a dictionary without a cast, which pyarrow 14 lacks."""
    if not pa.types.is_dictionary(kind):
        return column.cast(kind)
    return column.cast(kind.value_type).dictionary_encode()


def _written(folder: Path, kind: pa.DataType, events: pd.DataFrame = ODD) -> tuple[Path, Path]:
    folder.mkdir()
    for name, frame in (("events", events), ("items", ITEMS)):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        for at, field in enumerate(table.schema):
            if field.type == pa.string():
                table = table.set_column(at, field.name, _as_kind(table[at], kind))
        pq.write_table(table, folder / f"{name}.parquet")
    return folder / "events.parquet", folder / "items.parquet"


def _read(data: Path, report: dict[str, Any]) -> tuple[Any, ...]:
    titles = pq.read_table(data / "catalogue/items.parquet")["title"]
    findings = [(finding["check"], finding["count"]) for finding in report["findings"]]
    return [rows(data, split) for split in ("train", "valid", "test")], titles.to_pylist(), str(titles.type), findings


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What comes of plain strings."""
    folder = tmp_path_factory.mktemp("plain")
    found = _read(folder / "data", etl(*_written(folder / "raw", pa.string()), folder / "data", engine="memory"))
    assert found[0][2]["ben"]["dwell"] == [0.5, 9.5, 0.5]
    return found


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_text_gives_the_sessions_of_strings(
    kind: str, engine: Any, plain: tuple[Any, ...], tmp_path: Path
) -> None:
    found = _read(tmp_path / "data", etl(*_written(tmp_path / "raw", KINDS[kind]), tmp_path / "data", engine=engine))
    assert found == plain


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_files_of_several_types_of_text_are_one_table(engine: Any, plain: tuple[Any, ...], tmp_path: Path) -> None:
    parts = [ODD.iloc[:4], ODD.iloc[4:6], ODD.iloc[6:]]
    files = [_written(tmp_path / name, kind, part) for (name, kind), part in zip(KINDS.items(), parts, strict=False)]
    report = etl([events for events, _ in files], files[0][1], tmp_path / "data", engine=engine)
    assert _read(tmp_path / "data", report) == plain


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_bytes_that_are_no_text_are_repaired_and_counted(engine: Any, tmp_path: Path) -> None:
    events, items = _written(tmp_path / "raw", pa.large_binary())
    table = pq.read_table(events)
    kinds = pa.array([b"view\xff" if value == b"cart" else value for value in table["event_type"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("event_type"), "event_type", kinds), events)
    report = etl(events, items, tmp_path / "data", engine=engine)
    assert {finding["check"]: finding["count"] for finding in report["findings"]}["not_utf8"] == 2


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_a_time_that_is_not_utf8_is_left_out_and_counted(engine: Any, kind: pa.DataType, tmp_path: Path) -> None:
    events, items = _written(tmp_path / "raw", pa.binary())
    table = pq.read_table(events)
    times = pa.array([b"\xff", *table["timestamp"].to_pylist()[1:]]).cast(kind, safe=False)
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), events)
    report = etl(events, items, tmp_path / "data", engine=engine)
    found = {finding["check"]: finding["count"] for finding in report["findings"]}
    assert (found["not_utf8"], found["null_timestamp"]) == (1, 1)
