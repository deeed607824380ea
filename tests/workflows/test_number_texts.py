"""Numbers that a file holds as text, dates of other formats, and ids of two types: read, and told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from missrec_t4r.errors import SchemaError
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.quality.number_texts import Notations
from tests.project.packages import ROOT
from tests.workflows.tables import EVENTS, ITEMS, rows, write

ENGINES = pytest.mark.parametrize("engine", ["memory", "disk"])


def _findings(data: Path) -> dict[str, str]:
    return {finding["check"]: finding["message"] for finding in json.loads((data / "etl.json").read_text())["findings"]}


def _etl(tmp_path: Path, events: pd.DataFrame, items: pd.DataFrame = ITEMS, **options: object) -> Path:
    etl(*write(tmp_path / "raw", events, items), tmp_path / "data", **options)
    return tmp_path / "data"


@ENGINES
def test_one_missing_word_and_decimal_commas_leave_a_column_of_numbers(tmp_path: Path, engine: str) -> None:
    dwell = ["1,5" if value == 1.0 else "n/a" if value == 0.0 else f"{value:g}" for value in EVENTS["dwell"]]
    dwell[1] = "1.234,5"
    data = _etl(tmp_path, EVENTS.assign(dwell=dwell), engine=engine)
    assert rows(data, "test")["ann"]["dwell"] == [1.5, 2.0, 3.0, 4.0]
    assert rows(data, "test")["ben"]["dwell"] == [0.0, 9.0, 1234.5]
    found = _findings(data)
    assert "numbers with a decimal comma and are read as numbers" in found["number_as_text"]
    assert "--categorical-column dwell" in found["number_as_text"]
    assert "nulls and infinities became 0" in found["null_feature"]


@ENGINES
def test_numbers_as_text_stay_a_category_on_request(tmp_path: Path, engine: str) -> None:
    dwell = ["n/a", *(f"{value:g}" for value in EVENTS["dwell"][1:])]
    data = _etl(tmp_path, EVENTS.assign(dwell=dwell), engine=engine, categorical_columns=["dwell"])
    assert all(isinstance(code, int) for code in rows(data, "test")["ann"]["dwell"])
    assert "number_as_text" not in _findings(data)


@pytest.mark.parametrize(
    ("texts", "notation"),
    [
        (["1.5", "2", "1e3"], "point"),
        (["12,50", "7", "-3,0"], "comma"),
        (["1.234,5", "0,5"], "comma"),
        (["1,234.50", "7"], "thousands"),
        (["3", "N/A"], "point"),
        (["1,234", "5,678"], None),  # 1.234 or 1234
        (["1", "2"], None),  # codes
        (["1.5", "small"], None),
        (["n/a", ""], None),
        (["1.5", "2,5"], None),
    ],
)
def test_a_notation_fits_all_texts_or_none_is_chosen(texts: list[str], notation: str | None) -> None:
    seen = Notations()
    seen.add(texts)
    assert seen.chosen == notation


@ENGINES
def test_dates_of_another_format_are_read_with_its_name(tmp_path: Path, engine: str) -> None:
    days = [f"{10 + int(second) % 9:02}/11/2023 00:00:{int(second):02}" for second in EVENTS["timestamp"]]
    events = EVENTS.assign(timestamp=days)
    with pytest.raises(SchemaError, match="--time-format %d/%m/%Y"):
        _etl(tmp_path, events, engine=engine)
    data = _etl(tmp_path, events, engine=engine, time_format="%d/%m/%Y %H:%M:%S")
    newest = json.loads((data / "etl.json").read_text())["settings"]["newest"]
    assert newest == pd.Timestamp("2023-11-18 00:00:26", tz="UTC").timestamp()
    with pytest.raises(SchemaError, match="--time-format, and column 'timestamp' is of type int64"):
        _etl(tmp_path, EVENTS, engine=engine, time_format="%d/%m/%Y")


@ENGINES
def test_ids_of_two_types_are_told(tmp_path: Path, engine: str) -> None:
    numbers = {name: number for number, name in enumerate(ITEMS["item_id"], start=70)}
    items = ITEMS.assign(item_id=ITEMS["item_id"].map(numbers))
    events = EVENTS.assign(item_id=EVENTS["item_id"].map(numbers).astype(str))
    data = _etl(tmp_path, events, items, engine=engine)
    assert "texts in the interactions and integers in the item table" in _findings(data)["ids_as_text"]


@pytest.mark.parametrize("package", ["missrec_t4r.etl", "missrec_t4r.t4r"])
def test_a_dask_that_was_imported_first_is_refused_in_words(package: str) -> None:
    pytest.importorskip("dask_expr", reason="older dask has no query planning")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    environment["DASK_DATAFRAME__QUERY_PLANNING"] = "True"  # whatever etc/dask of this environment says
    code = f"import dask.dataframe, {package}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "dask.dataframe was imported with query planning, before missrec_t4r; expected:" in done.stderr
    assert "DASK_DATAFRAME__QUERY_PLANNING=False" in done.stderr


def test_the_file_of_the_installation_lets_dask_be_imported_first(tmp_path: Path) -> None:
    """`make install` and the wheel put it into etc/dask of the environment."""
    (tmp_path / "missrec-dask.yaml").write_bytes((ROOT / "requirements" / "missrec-dask.yaml").read_bytes())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    code = "import dask.dataframe, missrec_t4r.etl"
    environment["DASK_ROOT_CONFIG"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
