"""Updates: equal to a full run on all events, only what is touched is written, and the old version survives a kill."""

from __future__ import annotations

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.engine import append
from missrec_t4r.etl.engine.append import update
from missrec_t4r.etl.engine.compact import compact
from missrec_t4r.etl.nvt.serialization import load_workflow
from missrec_t4r.etl.pipeline import etl
from tests import processes
from tests.meanwhile import beginning_inside
from tests.workflows.increments import NEW_ITEMS, OPTIONS, SOME, raw_rows, shop
from tests.workflows.tables import ITEMS, save_vectors, write


@SOME
@given(st.integers(0, 1000), st.sampled_from(OPTIONS), st.integers(1, 5))
def test_an_update_equals_a_full_run_on_all_events(
    tmp_path_factory: pytest.TempPathFactory, seed: int, options: dict[str, Any], partitions: int
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    first, second = shop(seed, 120), shop(seed + 1, 30, 10, ("lamp", "rug", "mat", "lute"))
    write(folder / "old", first)
    write(folder / "new", second, NEW_ITEMS)
    text = folder / "text.npy"
    np.save(text, np.arange(1, 9, dtype=np.float32).reshape(4, 2))
    common = options | {"engine": "disk", "workers": 1, "partitions": partitions}
    etl(folder / "old/events.parquet", folder / "old/items.parquet", folder / "data", modality={"text": text}, **common)
    before = Catalogue.load(folder / "data" / "catalogue")
    boundaries = json.loads((folder / "data" / "etl.json").read_text())["settings"]
    update(folder / "new/events.parquet", folder / "data", items=folder / "new/items.parquet", workers=1)
    after = Catalogue.load(folder / "data" / "catalogue")
    assert after.ids_of(range(3, before.n_rows)) == before.ids_of(range(3, before.n_rows))  # rows never move
    np.testing.assert_array_equal(after.modalities["text"].vectors[: before.n_rows], before.modalities["text"].vectors)

    all_items = pd.concat([ITEMS, NEW_ITEMS]).drop_duplicates("item_id", keep="last")
    _, items = write(folder / "all", second, all_items)
    if options.get("split") == "time":
        common |= {name: boundaries[name] for name in ("valid_from", "test_from")}
    if options.get("unknown_items") == "drop":  # what was dropped stays so when the item gets its line later
        first = first[first.item_id.isin(ITEMS.item_id)]
    kept, _ = write(folder / "kept", first)
    files = [kept, folder / "new/events.parquet"]
    etl(files, items, folder / "full", **common)
    for split in ("train", "valid", "test"):
        assert raw_rows(folder / "data", split) == raw_rows(folder / "full", split), split
    full = Catalogue.load(folder / "full" / "catalogue")
    counts = [
        {item["item_id"]: (item["train_count"], item["title"], item["price"]) for item in catalogue.items.to_pylist()}
        for catalogue in (after, full)
    ]
    assert counts[0] == counts[1]
    reports = [json.loads((folder / name / "etl.json").read_text()) for name in ("data", "full")]
    for name in ("events", "users", "items", "cold_items", "sessions"):
        assert reports[0][name] == reports[1][name], name
    assert (folder / "data" / "train" / "schema.pbtxt").read_text() == (folder / "data" / "schema.pbtxt").read_text()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "old", shop(3, 400, 60))
    etl(
        tmp_path / "old/events.parquet",
        tmp_path / "old/items.parquet",
        tmp_path / "data",
        engine="disk",
        partitions=8,
        workers=1,
    )
    return tmp_path / "data"


def _day(folder: Path, users: int = 1) -> Path:
    frame = shop(3, 4).assign(user_id=[f"user {n % users}" for n in range(4)], timestamp=[301, 302, 303, 304])
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / "day.parquet", index=False)
    return folder / "day.parquet"


def test_untouched_partitions_are_the_same_files(data: Path, tmp_path: Path) -> None:
    (data / "notes.txt").write_text("of the team")
    before = {file.relative_to(data): file.stat().st_ino for file in data.rglob("*.parquet") if "part_" in file.name}
    told = update(_day(tmp_path / "day"), data, workers=1)
    after = {file.relative_to(data): file.stat().st_ino for file in data.rglob("*.parquet") if "part_" in file.name}
    written = {int(name.stem[5:]) for name in after if after[name] != before.get(name)}
    assert len(told["added"]["partitions"]) == 1
    assert written == set(told["added"]["partitions"])
    assert (told["version"], told["added"]["events_added"], told["events"]) == (2, 4, 404)
    assert (data / "notes.txt").read_text() == "of the team"
    versions = json.loads((data / "versions.json").read_text())
    assert [change["version"] for change in versions["changes"]] == [2]
    workflow = load_workflow(data / "workflow")
    assert workflow.output_schema["item_id-list"].int_domain.max == Catalogue.load(data / "catalogue").n_rows - 1


def test_the_same_file_twice_changes_nothing(data: Path, tmp_path: Path) -> None:
    day = _day(tmp_path / "day")
    update(day, data, workers=1)
    report = (data / "etl.json").read_bytes()
    again = update(day, data, workers=1)
    assert (again["updated"], again["version"]) == (False, 2)
    assert (data / "etl.json").read_bytes() == report
    assert update(_day(tmp_path / "more", 3), data, workers=1)["version"] == 3


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_files_of_the_first_run_are_not_added_again(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a job that names its whole folder every time: only what is new there is added."""
    events, items = write(tmp_path / "raw", shop(1, 60))
    folder = tmp_path / "events"
    folder.mkdir()
    first, day = folder / f"a.{suffix}", _day(tmp_path / "day")
    frame = pd.read_parquet(events)
    frame.to_parquet(first) if suffix == "parquet" else frame.to_csv(first, index=False)
    etl(folder, items, tmp_path / "data", engine="disk", workers=1)
    caplog.set_level("INFO")
    assert update(folder, tmp_path / "data", workers=1)["updated"] is False
    assert "a." in caplog.text
    assert "added before: skipped" in caplog.text
    for delta, number in ((False, 2), (True, 3)):
        other = pd.read_parquet(day).assign(user_id=f"user {number}")
        other.to_parquet(folder / f"day-{number}.parquet")
        told = update(folder, tmp_path / "data", delta=delta, workers=1)
        assert (told["version"], told["added"]["events_added"]) == (number, 4)
    compact(tmp_path / "data", workers=1)
    assert update(folder, tmp_path / "data", workers=1)["updated"] is False


def test_a_killed_update_leaves_the_old_version_and_continues(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    day = _day(tmp_path / "day", 4)
    code = """
import sys, time
from pathlib import Path
from missrec_t4r.etl.engine import build as engine
from missrec_t4r.etl.engine.append import update

def slow(*_):
    Path(sys.argv[3]).touch()
    time.sleep(60)

engine._finish = slow
update(sys.argv[1], Path(sys.argv[2]), workers=1)
"""
    before = {file.relative_to(data): file.read_bytes() for file in data.rglob("*") if file.is_file()}
    run = processes.start(["-c", code, day, data, tmp_path / "seen"])
    deadline = time.monotonic() + 300
    while not (tmp_path / "seen").exists() and time.monotonic() < deadline:
        assert run.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert {file.relative_to(data): file.read_bytes() for file in data.rglob("*") if file.is_file()} == before
    with caplog.at_level("INFO"):
        assert update(tmp_path / "old/events.parquet", data, workers=1)["updated"] is False  # those of the first run
    assert f"{data.parent / '.data-work'} holds what a killed run had done: its command goes on" in caplog.text
    assert update(day, data, workers=1)["events"] == 404
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_cannot_be_updated_is_said(data: Path, tmp_path: Path) -> None:
    day = _day(tmp_path / "day")
    etl(*write(tmp_path), tmp_path / "memory", engine="memory")
    with pytest.raises(DataError, match="memory has no user state to update from.*--engine disk"):
        update(day, tmp_path / "memory")
    etl(*write(tmp_path), tmp_path / "core", engine="disk", k_core=1, workers=1)
    with pytest.raises(ConfigError, match="filtered by k-core"):
        update(day, tmp_path / "core")
    shop(1, 5).drop(columns="dwell").to_parquet(tmp_path / "less.parquet", index=False)
    with pytest.raises(SchemaError, match=r"columns \['event_type'\].*\['event_type', 'dwell'\] as before"):
        update(tmp_path / "less.parquet", data, workers=1)
    before = (data / "etl.json").read_bytes()
    shop(1, 5).assign(timestamp=[1.5] * 5).to_parquet(tmp_path / "broken.parquet", index=False)
    with pytest.raises(SchemaError, match="'timestamp' does not fit.*int64"):
        update(tmp_path / "broken.parquet", data, workers=1)
    assert (data / "etl.json").read_bytes() == before


def test_new_events_in_another_unit_of_time_are_refused(tmp_path: Path) -> None:
    moments = shop(0, 60).assign(timestamp=lambda frame: frame.timestamp + 1_700_000_000)
    etl(*write(tmp_path, moments), tmp_path / "data", engine="disk", workers=1)
    moments.assign(timestamp=moments.timestamp * 1000).to_parquet(tmp_path / "day.parquet", index=False)
    for delta in (False, True):
        with pytest.raises(
            DataError, match="60 of the new times are milliseconds or finer; expected: seconds, as in the folder"
        ):
            update(tmp_path / "day.parquet", tmp_path / "data", delta=delta, workers=1)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing/data has no user state to update from"):
        update(_day(tmp_path), tmp_path / "missing" / "data")


@pytest.mark.parametrize("delta", [False, True])
def test_files_without_a_row_add_nothing(data: Path, tmp_path: Path, delta: bool) -> None:
    before = {split: raw_rows(data, split) for split in ("train", "valid", "test")}
    shop(1, 5).head(0).to_parquet(tmp_path / "empty.parquet", index=False)
    assert update(tmp_path / "empty.parquet", data, delta=delta, workers=1)["added"]["events_added"] == 0
    assert {split: raw_rows(data, split) for split in before} == before


def test_integers_that_a_float32_lacks_are_added_to_a_column_of_floats(data: Path, tmp_path: Path) -> None:
    shop(1, 5).assign(dwell=2**24 + 1).to_parquet(tmp_path / "day.parquet", index=False)
    assert update(tmp_path / "day.parquet", data, workers=1)["added"]["events_added"] == 5


def _late(folder: Path) -> tuple[dict[str, Any], Path]:
    """Write events of six users in many partitions, and new ones that push a user's oldest events out of a row."""
    users = [f"user {number}" for number in range(6)]
    moments = list(zip(ITEMS.item_id, (10, 20, 110, 210), strict=True))
    names = ["user_id", "item_id", "timestamp"]
    old = pd.DataFrame([(user, *moment) for user in users for moment in moments], columns=names)
    new = pd.DataFrame([("user 1", "lamp", 300), ("user 1", "desk", 310)], columns=names)
    for name, events in (("old", old), ("new", new), ("all", pd.concat([old, new]))):
        write(folder / name, events)
    options = {"engine": "disk", "split": "time", "valid_from": 100, "test_from": 200, "workers": 1}
    return options | {"max_events": 3, "partitions": 64}, folder / "new/events.parquet"


@pytest.mark.parametrize("delta", [False, True])
def test_a_row_that_an_update_takes_away_is_gone(tmp_path: Path, delta: bool) -> None:
    """Of the last three events none is before validation: the user, alone in a partition, has no training row now."""
    options, new = _late(tmp_path)
    for name in ("old", "all"):
        etl(tmp_path / name / "events.parquet", tmp_path / name / "items.parquet", tmp_path / f"{name}-data", **options)
    data = tmp_path / "old-data"
    assert ("user 1", 0) in raw_rows(data, "train")
    update(new, data, delta=delta, workers=1)
    if delta:
        compact(data, workers=1)
    for split in ("train", "valid", "test"):
        assert raw_rows(data, split) == raw_rows(tmp_path / "all-data", split)
        assert len(raw_rows(data, split)) == json.loads((data / "etl.json").read_text())["sessions"][split]


def test_one_process_may_update_a_folder_twice(tmp_path: Path) -> None:
    """Another folder stands there the second time; the new events and all settings are the same."""
    day, data = _day(tmp_path / "day", 3), tmp_path / "data"
    swap = {"view": "cart", "cart": "view"}  # the other type is the more frequent one then, and has the code 3
    for name, old in (("first", shop(0, 60)), ("second", shop(0, 60).replace({"event_type": swap}))):
        etl(*write(tmp_path / "old", old), tmp_path / name, engine="disk", workers=1)
    for name in ("first", "second"):
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(tmp_path / name, data)
        update(day, data, workers=1)
    both = write(tmp_path / "both", pd.concat([old, pd.read_parquet(day)]))
    etl(*both, tmp_path / "full", engine="disk", workers=1)
    assert raw_rows(data, "test") == raw_rows(tmp_path / "full", "test")


@pytest.mark.parametrize("delta", [False, True])
def test_known_items_take_the_values_of_their_rows(tmp_path: Path, delta: bool) -> None:
    events, items = write(tmp_path / "old", shop(0, 60))
    first = {"text": save_vectors(tmp_path / "first.npy", np.full((4, 2), 1))}
    etl(events, items, tmp_path / "data", engine="disk", workers=1, modality=first)
    before = {item["item_id"]: item for item in Catalogue.load(tmp_path / "data/catalogue").items.to_pylist()}
    gone, *_, changed = ITEMS.item_id
    tonight = ITEMS[1:].assign(price=[*ITEMS.price[1:3], 0.5], in_stock=[None, None, True])
    _, items = write(tmp_path / "new", shop(1, 3), tonight)
    second = {"text": save_vectors(tmp_path / "second.npy", np.full((3, 2), 2))}
    again = {"items": items, "modality": second, "delta": delta}
    told = update(_day(tmp_path / "day"), tmp_path / "data", workers=1, **again)
    catalogue = Catalogue.load(tmp_path / "data/catalogue")
    after = {item["item_id"]: item for item in catalogue.items.to_pylist()}
    assert (told["added"]["items_added"], told["added"]["items_changed"]) == (0, 1)
    assert (after[changed]["price"], after[changed]["in_stock"]) == (0.5, True)
    for name in set(before) - {changed}:
        assert (after[name]["title"], after[name]["price"]) == (before[name]["title"], before[name]["price"])
    assert after[gone]["in_stock"] is None
    text = dict(zip(after, catalogue.modalities["text"].vectors[3:, 0].tolist(), strict=True))
    assert [text[name] for name in ITEMS.item_id] == [2 if name == changed else 1 for name in ITEMS.item_id]
    assert {finding["check"]: finding["count"] for finding in told["findings"]}["vectors_kept"] == 2
    assert update([], tmp_path / "data", workers=1, **again)["updated"] is False


@pytest.mark.parametrize("delta", [False, True])
def test_columns_of_an_update_mean_what_they_meant(data: Path, tmp_path: Path, delta: bool) -> None:
    """A category that comes as numbers is refused; nothing but the known columns is read, in any order."""
    before, day = (data / "etl.json").read_bytes(), tmp_path / "day.parquet"
    frame = shop(3, 4).assign(timestamp=[301, 302, 303, 304])
    frame.assign(event_type=range(4)).to_parquet(day, index=False)
    with pytest.raises(SchemaError, match="'event_type' holds int64; expected: texts as before"):
        update(day, data, delta=delta, workers=1)
    assert (data / "etl.json").read_bytes() == before
    frame.rename(columns={"user_id": "customer"}).to_parquet(day, index=False)
    with pytest.raises(SchemaError, match="a column 'user_id', as in the first run. rename yours"):
        update(day, data, delta=delta, workers=1)
    frame = frame.assign(event_type=None, user_id=range(4), coupon="new")[["dwell", "coupon", *frame.columns[:-1]]]
    frame.to_parquet(day, index=False)
    told = update(day, data, delta=delta, workers=1)
    assert "event_column_left_out" in {finding["check"] for finding in told["findings"]}
    rows = raw_rows(data, "train")
    assert [row["event_type-list"] for (user, _), row in rows.items() if user == "3"] == [[""]]


def test_user_ids_of_an_update_are_of_the_folders_type(tmp_path: Path) -> None:
    numbered = shop(0, 60).assign(user_id=lambda frame: frame.user_id.str[5:].astype(int))
    etl(*write(tmp_path / "old", numbered), tmp_path / "data", engine="disk", workers=1)
    numbered.head(3).assign(timestamp=999).astype({"user_id": str}).to_csv(tmp_path / "day.csv", index=False)
    assert update(tmp_path / "day.csv", tmp_path / "data", workers=1)["added"]["users_added"] == 0
    shop(1, 3).to_parquet(tmp_path / "day.parquet", index=False)
    with pytest.raises(SchemaError, match="'user_id' are texts such as 'user .'; expected: integers as in the folder"):
        update(tmp_path / "day.parquet", tmp_path / "data", workers=1)


@pytest.mark.parametrize("named_before", [True, False])
def test_an_update_reads_the_item_table_by_the_name_of_its_id_column(tmp_path: Path, named_before: bool) -> None:
    first, names = {"item_id": "sku"} if named_before else {}, {"item_id": "sku"}
    events, items = write(tmp_path / "old", shop(0, 30), ITEMS.rename(columns=first))
    chosen = {"catalogue_item_column": first.get("item_id")}
    etl(events, items, tmp_path / "data", engine="disk", **chosen)
    _, items = write(tmp_path / "new", shop(1, 3), pd.concat([ITEMS, NEW_ITEMS]).rename(columns=names))
    again = {} if named_before else {"catalogue_item_column": "sku"}
    etl([], items, tmp_path / "data", update=True, **again)
    known = Catalogue.load(tmp_path / "data" / "catalogue").items["item_id"].to_pylist()
    assert set(known) == {*ITEMS.item_id, *NEW_ITEMS.item_id}


def test_the_command_updates(data: Path, tmp_path: Path) -> None:
    arguments = ["etl", "--update", "--interactions", str(_day(tmp_path / "day")), "--out", str(data)]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert json.loads(planned.stdout.splitlines()[-1])["updated"] is False
    refused = CliRunner().invoke(app, [*arguments, "--k-core", "5"])
    assert refused.exit_code == 2
    done = CliRunner().invoke(app, [*arguments, "--workers", "1"])
    assert json.loads(done.stdout.splitlines()[-1])["version"] == 2
    lonely = CliRunner().invoke(
        app, ["etl", "--interactions", str(_day(tmp_path / "day")), "--out", str(tmp_path / "x")]
    )
    assert lonely.exit_code == 2


def test_two_updates_at_once_are_both_in_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        partial(etl, _day(tmp_path / name, users), None, data, update=True, dask_scheduler="threads", workers=1)
        for name, users in (("one", 1), ("two", 2))
    )
    with beginning_inside("load_version", append, second, monkeypatch, caplog):
        first()
    assert [change["events_added"] for change in json.loads((data / "versions.json").read_text())["changes"]] == [4, 4]
