"""Increments as delta files: readers see what plain updates and a full run give, compacted or not, also after kills."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.data.session_files import delta_files
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.user_hash import hash_ids
from missrec_t4r.etl.engine import append, delta, sessionize, workdir
from missrec_t4r.etl.engine import compact as compaction
from missrec_t4r.etl.engine.append import update
from missrec_t4r.etl.engine.compact import compact
from missrec_t4r.etl.engine.user_state import load_users
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.io.arrow_files import read_arrow, write_arrow
from missrec_t4r.schema import SPLITS
from tests import processes
from tests.workflows.increments import NEW_ITEMS, OPTIONS, SOME, content, counted, increment, raw_rows, same, shop
from tests.workflows.tables import ITEMS, write


@pytest.fixture(autouse=True, scope="module")
def _no_compaction_by_itself() -> Iterator[None]:
    """Deltas of tiny shops would be compacted after every increment."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compaction, "MAX_DELTA_SHARE", 100.0)
        yield


def first_run(folder: Path, seed: int, **options: Any) -> Path:
    write(folder / "old", shop(seed, 120))
    np.save(folder / "text.npy", np.arange(1, 9, dtype=np.float32).reshape(4, 2))
    arguments = {"engine": "disk", "workers": 1, "partitions": 3, **options}
    etl(
        folder / "old/events.parquet",
        folder / "old/items.parquet",
        folder / "data",
        modality={"text": folder / "text.npy"},
        **arguments,
    )
    return folder / "data"


@hypothesis_settings(SOME, max_examples=4)
@given(st.integers(0, 1000), st.sampled_from(OPTIONS), st.lists(st.booleans(), min_size=3, max_size=3))
def test_increments_in_a_row_equal_a_full_run(
    tmp_path_factory: pytest.TempPathFactory, seed: int, options: dict[str, Any], tidy: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    data = first_run(folder, seed, **options)
    boundaries = json.loads((data / "etl.json").read_text())["settings"]
    increments = [increment(folder, number, seed) for number in range(3)]
    for number, file in enumerate(increments):
        update(file, data, delta=True)
        if tidy[number]:
            compact(data, workers=1)
    if options.get("split") == "time":
        options = options | {name: boundaries[name] for name in ("valid_from", "test_from")}
    files = [folder / "old/events.parquet", *increments]
    etl(files, folder / "old/items.parquet", folder / "full", engine="disk", workers=1, partitions=2, **options)
    for split in SPLITS:
        assert raw_rows(data, split) == raw_rows(folder / "full", split), split
    mine, full = counted(data), counted(folder / "full")
    assert mine | {"modalities": full["modalities"]} == full
    before = content(data)
    compact(data, workers=1)
    assert not (data / "deltas").exists()
    assert not (data / "state" / "deltas").exists()
    same(before, content(data))


@pytest.mark.parametrize("number", [0, 3])
def test_deltas_equal_plain_updates_to_the_byte(tmp_path: Path, number: int) -> None:
    data = first_run(tmp_path, 5, **OPTIONS[number], save_nvtabular_workflow=True)
    shutil.copytree(data, tmp_path / "plain")
    new_items = write(tmp_path / "new", shop(1, 3), NEW_ITEMS)[1]
    for step in (1, 2):
        file = increment(tmp_path, step, 40)
        more = {"items": new_items} if step == 1 else {}
        told = update(file, data, delta=True, **more)
        plain = update(file, tmp_path / "plain", workers=1, **more)
        same(content(data), content(tmp_path / "plain"))
        assert (told["version"], told["plain_version"]) == (step + 1, 1)
        assert plain["plain_version"] == step + 1
        assert told["added"]["items_added"] == plain["added"]["items_added"]
        assert told["added"]["events_added"] == plain["added"]["events_added"]
        assert told["findings"] == plain["findings"]
    for folder in ("workflow", "request_workflow"):
        for file in (data / folder / "categories").iterdir():
            assert file.read_bytes() == (tmp_path / "plain" / folder / "categories" / file.name).read_bytes()
    assert json.loads((data / "nvtabular_workflow" / "metadata.json").read_text())
    compact(data, workers=1)
    for split in SPLITS:
        files = sorted((data / split).glob("*.parquet"))
        assert [file.name for file in files] == [f.name for f in sorted((tmp_path / "plain" / split).glob("*.parquet"))]
        assert all(pq.read_table(f).equals(pq.read_table(tmp_path / "plain" / split / f.name)) for f in files)
    file = increment(tmp_path, 3, 41)
    update(file, data, workers=1)
    update(file, tmp_path / "plain", workers=1)
    same(content(data), content(tmp_path / "plain"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two delta files; tests take copies."""
    folder = tmp_path_factory.mktemp("kept")
    data = first_run(folder, 11)
    for number in range(2):
        update(increment(folder, number, 11), data, delta=True)
    return data


@pytest.fixture
def data(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "data"))


def test_plain_parquet_stays_the_version_before(kept: Path, data: Path, tmp_path: Path) -> None:
    versions = json.loads((data / "versions.json").read_text())
    assert (versions["version"], versions["plain_version"]) == (3, 1)
    fresh = first_run(tmp_path / "again", 11)
    for split in SPLITS:
        for file in (fresh / split).glob("*.parquet"):
            assert (data / split / file.name).read_bytes() == file.read_bytes()
    first = (kept.parent / "old/events.parquet", *sorted(kept.parent.glob("increment-*.parquet")))
    events = pd.concat([pd.read_parquet(file) for file in first])
    assert len(Sessions.load(data / "train")) == events.user_id.nunique() > len(Sessions.load(fresh / "train"))


def test_every_reader_sees_the_deltas(data: Path) -> None:
    from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

    from missrec_t4r.etl.quality.statistics import ReportData, compute_statistics
    from missrec_t4r.t4r.reading import read_sessions

    schema = TensorflowMetadata.from_proto_text_file(str(data), "schema.pbtxt").to_merlin_schema()

    def seen() -> list[Any]:
        loaded = [Sessions.load(data / split) for split in SPLITS]
        loaded += [read_sessions(str(data / split), schema) for split in SPLITS]
        arrays = [[part.values, part.offsets, *part.features.values()] for part in loaded]
        return [*arrays, compute_statistics(ReportData.load(data), 1e9)[0]]

    with_deltas = seen()
    assert compact(data, workers=1)["deltas"] == 2
    for one, other in zip(with_deltas[:-1], seen()[:-1], strict=True):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))
    assert with_deltas[-1] == seen()[-1]
    assert compact(data, workers=1)["compacted"] is False


def test_training_and_evaluation_are_equal_before_and_after_compaction(data: Path, tmp_path: Path) -> None:
    from missrec_t4r.commands import evaluate, train

    def trained(name: str) -> Any:
        train(data, tmp_path / name, recipe="tiny", settings={"train.epochs": 1}, device="cpu")
        found = evaluate(tmp_path / name, data=data)
        return {part: found[part] for part in set(found) - {"run", "seconds", "data", "file"}}

    one = trained("with-deltas")
    compact(data, workers=1)
    assert trained("compacted") == one


def test_the_same_increment_twice_changes_nothing(data: Path, kept: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in data.rglob("*") if file.is_file()}
    again = update([kept.parent / "increment-1.parquet", kept.parent / "increment-0.parquet"], data, delta=True)
    assert (again["updated"], again["version"]) == (False, 3)
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*") if file.is_file()} == before


class Killed(BaseException):
    """Simulates a kill: no handler of ours catches it."""


def _dies(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, after: bool = False) -> None:
    original: Callable[..., Any] = getattr(module, name)

    def die(*given: Any, **named: Any) -> Any:
        if after:
            original(*given, **named)
        raise Killed

    monkeypatch.setattr(module, name, die)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "step", ["write_arrow", "_extend_encodings", "_write_catalogue", "link_unchanged", "move_into_place"]
)
def test_an_increment_killed_anywhere_is_complete_or_absent(data: Path, tmp_path: Path, step: str, late: bool) -> None:
    old, file = content(data), increment(tmp_path, 2, 11)
    modules = {"link_unchanged": append, "move_into_place": workdir}
    with pytest.MonkeyPatch.context() as patched:
        _dies(patched, modules.get(step, delta), step, after=late)
        with pytest.raises(Killed):
            update(file, data, delta=True)
    done = step == "move_into_place" and late
    if not done:
        same(content(data), old)
    assert update(file, data, delta=True)["updated"] is not done
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert content(data)["counted"]["events"] == 210


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", ["merge_state", "write_splits", "write_json", "link_unchanged", "move_into_place"])
def test_a_compaction_killed_anywhere_changes_nothing(data: Path, step: str, late: bool) -> None:
    old = content(data)
    with pytest.MonkeyPatch.context() as patched:
        _dies(patched, {"write_splits": sessionize, "move_into_place": workdir}.get(step, compaction), step, after=late)
        with pytest.raises(Killed):
            compact(data, workers=1)
    same(content(data), old)
    assert compact(data, workers=1)["compacted"] is not (step == "move_into_place" and late)
    assert not delta_files(data)
    assert [path.name for path in data.parent.iterdir() if path.name.startswith(".")] == []
    same(content(data), old)


def test_a_real_kill_between_increment_and_compaction(data: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from missrec_t4r.etl.engine import compact, sessionize
from missrec_t4r.etl.engine.append import update

compact.MAX_DELTAS = 2
sessionize.write_splits = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
update(sys.argv[1], Path(sys.argv[2]), delta=True, workers=1)
"""
    file = increment(tmp_path, 2, 11)
    assert processes.run(["-c", code, file, data]).returncode == -signal.SIGKILL
    assert len(delta_files(data)) == 3
    seen = content(data)
    compact(data, workers=1)
    same(content(data), seen)
    assert not list(tmp_path.glob(".*"))


def test_compaction_runs_automatically_when_due(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "MAX_DELTAS", 2)
    told = update(increment(tmp_path, 2, 11), data, delta=True, workers=1)
    assert (told["version"], told["plain_version"], delta_files(data)) == (4, 4, [])
    monkeypatch.setattr(compaction, "MAX_DELTA_SHARE", 0.01)
    assert update(increment(tmp_path, 3, 11), data, delta=True, workers=1)["plain_version"] == 5


def test_an_increment_too_large_for_memory_is_added_without_delta(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append, "MAX_DELTA_EVENTS", 10)
    told = update(increment(tmp_path, 2, 11), data, delta=True, workers=1)
    assert (told["version"], told["plain_version"], delta_files(data)) == (4, 4, [])
    assert told["events"] == 210


def test_items_alone_can_be_added(data: Path, tmp_path: Path) -> None:
    before = content(data)
    _, items = write(tmp_path / "new", shop(1, 3), pd.concat([ITEMS, NEW_ITEMS]).drop_duplicates("item_id"))
    told = update([], data, items=items)
    after = content(data)
    assert (told["version"], told["added"]["events_added"], told["added"]["items_added"]) == (4, 0, 1)
    assert after["rows"]["train"].equals(before["rows"]["train"])
    assert [row["item_id"] for row in after["items"].to_pylist()][-1] == "lute"
    compact(data, workers=1)
    assert update([], data, items=items)["updated"] is False  # they are in
    _, more = write(tmp_path / "more", shop(1, 3), NEW_ITEMS[:1].assign(item_id="oboe"))
    assert update([], data, items=more)["updated"] is True
    assert json.loads((data / "versions.json").read_text())["plain_version"] == 5  # nothing stands beside the files
    titles = {row["item_id"]: row["title"] for row in after["items"].to_pylist()}
    assert (titles["rug"], titles["desk"]) == ("a rug", "a desk")  # only events knew the rug; the desk had a line


def test_users_are_found_without_reading_the_others(data: Path) -> None:
    users = pa.array(["user 3", "nobody", "user 1"])
    hashes = hash_ids(users)
    order = np.argsort(hashes)
    found = load_users(data, 3, users.take(pa.array(order)), hashes[order])
    assert found is not None
    sizes = dict(zip(found["user_id"].to_pylist(), found["item_id-list"].to_pylist(), strict=True))
    whole = raw_rows(data, "test")
    assert {user: len(events) for user, events in sizes.items()} == {
        user: len(whole[user, 0]["item_id-list"]) for user in ("user 1", "user 3")
    }


def test_a_folder_without_stored_hashes_accepts_increments(tmp_path: Path) -> None:
    data = first_run(tmp_path, 11)
    for file in (data / "state").glob("*.arrow"):
        table = read_arrow(file).drop_columns(["user_hash"])
        file.unlink()
        write_arrow(table, file)
    update(increment(tmp_path, 0, 11), data, delta=True)
    before = content(data)
    fresh = first_run(tmp_path / "fresh", 11)
    update(tmp_path / "increment-0.parquet", fresh, delta=True)
    same(before, content(fresh))
    compact(data, workers=1)
    same(before, content(data))


def test_the_command_adds_increments_and_compacts(data: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> Any:
        run = CliRunner().invoke(app, ["etl", "--out", str(data), *arguments])
        return json.loads(run.stdout.splitlines()[-1]) if run.exit_code == 0 else run.exit_code

    file = str(increment(tmp_path, 2, 11))
    assert said("--update", "--delta", "--interactions", file)["plain_version"] == 1
    planned = said("--compact", "--dry-run")
    assert (planned["deltas"], planned["compacted"]) == (3, False)
    assert said("--compact", "--workers", "1")["plain_version"] == 4
    assert said("--delta", "--interactions", file) == 2
    assert said("--compact", "--interactions", file) == 2
    assert said("--compact", "--k-core", "2") == 2
