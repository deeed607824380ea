"""The ETL's code for frames gives pandas' rows on a stand-in for cuDF with the names of docs/howto/gpu.md alone.

Where there is a GPU, the same tests run on cuDF itself.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from nvtabular.ops.operator import ColumnSelector

from missrec_t4r.etl import inputs
from missrec_t4r.etl.gpu import device as gpu
from missrec_t4r.etl.gpu import read, tasks
from missrec_t4r.etl.nvt import event_ops
from missrec_t4r.etl.nvt.event_ops import EventWeights, KCore, SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.etl.splits import default_boundaries
from missrec_t4r.etl.task import Run
from tests.workflows import strict_cudf
from tests.workflows.frame_kinds import HAS_CUDF, PandasFiles
from tests.workflows.tables import write as write_tables
from tests.workflows.test_scale import shop, table

GUIDE = Path(__file__).parents[2] / "docs" / "howto" / "gpu.md"
AGGS = {"item": ["list", "first", "last", "count"], "note": ["list", "count"], "price": ["list", "first"]}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_CUDF:
        return
    for name, module in strict_cudf.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("merlin.core.dispatch.build_cudf_list_column", strict_cudf.ListColumn)


def events(users: str = "text") -> pd.DataFrame:
    """Events with ties in time, nulls in keys, lists, numbers and texts."""
    chance, size = np.random.default_rng(4), 120
    names = pd.Series([f"u{number}" for number in chance.integers(0, 9, size)], dtype=object)
    return pd.DataFrame(
        {
            "user": names.where(chance.random(size) > 0.1, None) if users == "text" else chance.integers(0, 9, size),
            "time": chance.integers(1_600_000_000, 1_600_300_000, size) // 9000 * 9000,
            "item": chance.integers(0, 7, size),
            "price": np.where(chance.random(size) < 0.2, np.nan, chance.integers(0, 50, size)),
            "note": pd.Series(chance.choice(["a", "b", "c"], size)).where(chance.random(size) > 0.2, None),
        }
    )


def plain(frame: Any) -> dict[str, list[Any]]:
    """Columns as lists, every null and NaN as None."""

    def value(one: Any) -> Any:
        if isinstance(one, list | np.ndarray):
            return [value(element) for element in one]
        return None if one is None or pd.isna(one) else one

    made = {}
    for name in frame.columns:
        column = frame[name]
        made[name] = [
            value(one)
            for one in (column.tolist() if isinstance(frame, pd.DataFrame) else column.to_arrow().to_pylist())
        ]
    return made


def both(operator: Any, frame: pd.DataFrame) -> tuple[Any, Any]:
    """Return what an operator makes of the frame in pandas and in the stand-in; both are compared."""
    selector = ColumnSelector(list(frame.columns))
    there = gpu.CudfDevice().from_arrow(pa.Table.from_pandas(frame, preserve_index=False))
    here, there = operator.transform(selector, frame), operator.transform(selector, there)
    assert plain(here) == plain(there)
    return here, there


@pytest.mark.parametrize("users", ["text", "integers"])
@pytest.mark.parametrize("ascending", [True, False])
def test_sessions_and_their_slices(users: str, ascending: bool) -> None:
    keep_nulls = events(users).astype({"price": "float64"})
    here, there = both(SessionGroupby(["user"], ["time"], AGGS, "-", ascending), keep_nulls)
    assert len(here) == 9
    lists = ColumnSelector(["item-list", "note-list", "price-list"])
    for start, end in ((-3, None), (2, None), (1, -1), (-4, 2), (50, None)):
        cut = SessionSlice(start, end)
        assert plain(cut.transform(lists, here)) == plain(cut.transform(lists, there)), (start, end)
    for column, value in (("item-list", 9), ("price-list", 0.5)):
        pad, selected = SessionSlice(-20, pad=True, pad_value=value), ColumnSelector([column])
        padded = pad.transform(selected, here)
        assert plain(padded) == plain(pad.transform(selected, there))
        assert {len(row) for row in padded[column]} == {20}
    texts = SessionSlice(-20, pad=True).transform(ColumnSelector(["note-list"]), there)
    assert {len(row) for row in plain(texts)["note-list"]} == {20}  # pandas pads texts with the number 0, cuDF with "0"


@pytest.mark.parametrize("times", ["int64", "float64"])
def test_operators_on_events(times: str) -> None:
    frame = events("integers").astype({"time": times})
    frame["note"] = frame["note"].fillna("none")
    both(SessionGap("user", "time", 20_000.0), frame)
    both(TimeFeatures("user", "time", newest=1.7e9, clock=7200), frame)
    weighed, _ = both(EventWeights("note", {"a": 2.0, "b": 0.0}, 1.5), frame)
    assert set(weighed["weight"]) == {2.0, 1.5}


def test_nulls_in_times_and_types_pass_as_in_pandas() -> None:
    frame = events("integers").astype({"time": "float64"})
    frame.loc[::11, "time"] = np.nan
    both(SessionGap("user", "time", 20_000.0), frame)
    both(EventWeights("note", {"a": 2.0, "b": 0.0}, 1.5), frame)
    timed = TimeFeatures("user", "time", ["gap", "recency"], 1.7e9)
    both(timed, frame)


@pytest.mark.parametrize("users", ["text", "integers"])
def test_k_core(users: str) -> None:
    frame = events(users).iloc[:60].reset_index(drop=True)
    core = KCore(["user", "item"], 5)
    there = gpu.CudfDevice().from_arrow(pa.Table.from_pandas(frame, preserve_index=False))
    for one in (frame, there):  # counted in either library, the core is the same
        parts = [event_ops._combinations(one, core.columns)]
        core.fit_finalize(event_ops._survivors(parts, core.columns, core.least))
        left, _ = both(core, frame)
        assert 0 < len(left) < len(frame)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("split", ["leave_one_out", "time"])
def test_from_parquet_to_parquet(tmp_path: Path, seed: int, split: str) -> None:
    """Reading, cleaning, filters, categories and splits; the sessions in between are NVTabular's on a real GPU."""
    raw = shop(seed, 900).assign(item=np.arange(900) % 4)
    raw["user_id"] = raw["user_id"].str[-2:]
    raw.loc[::50, "dwell"] = np.inf
    raw["gift"] = pd.Series(np.arange(900) % 3 == 0, dtype="boolean").mask(np.arange(900) % 7 == 0)
    raw["timestamp"] = raw["timestamp"] if seed else raw["timestamp"].astype("datetime64[us]")
    events_file, items_file = write_tables(tmp_path, raw)
    names = {name: name for name in ("user_id", "item_id", "timestamp")}
    made: list[Any] = []
    for device in (PandasFiles(), gpu.CudfDevice()):
        findings = Findings()
        plan = {"drop_columns": ["split"], "categorical_columns": ["aisle", "gift"]}
        run = Run(files=[events_file], names=names, settings=plan, modality_files={})
        items = pa.parquet.read_table(items_file)
        frame, summary = inputs.clean_inputs(
            read.read_events(device, [events_file], read.plan_columns(run, items, findings), findings),
            inputs.with_normal_ids(items),
            {},
            {
                "drop_duplicates": bool(seed % 2),
                "unknown_items": "drop" if seed > 1 else "append",
                "k_core": 3,
                "min_item_count": 4,
                "categorical_columns": ["aisle", "gift"],
            },
            findings,
        )
        aggs = {name: ["list"] for name in ("item", "timestamp", "dwell", "event_type")}
        sessions = SessionGroupby(["user_id"], ["timestamp"], aggs, "-").transform(
            ColumnSelector(list(frame.columns)), frame
        )
        sessions = sessions.rename(columns={"item-list": "item_id-list"})
        settings: dict[str, Any] = {"split": split, "valid_from": None, "test_from": None}
        if split == "time":
            boundaries = default_boundaries(device.array(frame["timestamp"]), device.xp)
            settings |= dict(zip(("valid_from", "test_from"), boundaries, strict=True))
        folder = tmp_path / type(device).__name__
        folder.mkdir()
        written = tasks.write_rows(device, sessions, settings, folder, 9)
        categories = {name: values.tolist() for name, values in summary.categories.items()}
        made.append(
            (
                plain(frame), summary.items.to_pylist(), findings.to_list(), categories, settings, dict(written.rows),
                written.longest, written.train_counts.tolist(),
                *(table(folder, name).to_pylist() for name in written.rows),
            )
        )  # fmt: skip
    for here, there in zip(*made, strict=True):
        assert here == there
    types = [table(tmp_path / name, "train").schema.remove_metadata() for name in ("PandasFiles", "CudfDevice")]
    assert types[0] == types[1]


def test_a_file_is_read_by_its_name_and_not_by_a_pattern(tmp_path: Path) -> None:
    """cuDF takes paths for patterns: it would read another file, or leave one out."""
    files = [tmp_path / name for name in ("day[1].parquet", "day1.parquet", "day?.parquet")]
    for number, file in enumerate(files):
        pa.parquet.write_table(pa.table({"user_id": [number]}), file)
    device = gpu.CudfDevice()
    for number, file in enumerate(files):
        assert plain(device.read_parquet([file], ["user_id"])) == {"user_id": [number]}
    assert plain(device.read_parquet(files, ["user_id"])) == {"user_id": [0, 1, 2]}
    (tmp_path / "[a]").mkdir()
    device.write_parquet(device.read_parquet(files[1:2], ["user_id"]), tmp_path / "[a]" / "*.parquet")
    assert plain(device.read_parquet([tmp_path / "[a]" / "*.parquet"], ["user_id"])) == {"user_id": [1]}


def test_texts_that_are_no_utf8_are_left_to_the_cpu(tmp_path: Path) -> None:
    broken = pa.array([b"ann", b"b\xff"]).view(pa.string())
    for name in ("user_id", "kind"):
        rows = pa.table({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2], "kind": ["v", "w"]})
        rows = rows.set_column(rows.column_names.index(name), name, broken)
        pa.parquet.write_table(rows, tmp_path / "events.parquet")
        names = {key: key for key in ("user_id", "item_id", "timestamp")}
        files = [tmp_path / "events.parquet"]
        settings = {"drop_columns": [], "categorical_columns": []}
        run = Run(files=files, names=names, settings=settings, modality_files={})
        columns = read.plan_columns(run, pa.table({"item_id": ["lamp"]}), Findings())
        with pytest.raises(read.NotPlainError, match=f"{name}.*UTF-8"):
            read.read_events(gpu.CudfDevice(), files, columns, Findings())


def _names() -> dict[str, Any]:
    """Every public name of the stand-in that our code can use, and what cuDF calls it."""
    found: dict[str, Any] = {}
    for kind in (strict_cudf.DataFrame, strict_cudf.Series):
        found |= {f"{kind.__name__}.{name}": value for name, value in vars(kind).items() if not name.startswith("_")}
    return found | {name: value for name, value in strict_cudf.CUDF.items() if not isinstance(value, type)}


def test_the_guide_lists_every_name_of_the_stand_in() -> None:
    listed = set(re.findall(r"[A-Za-z_]+", GUIDE.read_text(encoding="utf-8").partition("## cuDF")[2]))
    assert {name.rpartition(".")[2] for name in _names()} - listed == set()
    assert {*strict_cudf.CUPY, "concatenate", "bincount", "asnumpy"} - listed == set()


@pytest.mark.skipif(importlib.util.find_spec("cudf") is None, reason="needs cuDF; no GPU")
def test_the_stand_in_has_cudfs_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in strict_cudf.modules() if not HAS_CUDF else ():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("RAPIDS_NO_INITIALIZE", "1")  # cuDF imports without a device then
    import cudf

    for name, ours in _names().items():
        theirs: Any = cudf
        for part in name.split("."):
            theirs = inspect.getattr_static(theirs, part)
            theirs = getattr(theirs, "__func__", theirs)
        if callable(ours):
            parameters = inspect.signature(theirs).parameters
            passed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            assert passed_on or set(inspect.signature(ours).parameters) <= set(parameters), name
