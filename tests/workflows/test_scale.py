"""The out-of-core engine equals the NVTabular workflow and the in-memory engine, in any partitions, even if killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.user_hash import hash_ids, partition_of
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.engine import executor, sessionize, shuffle, workdir
from missrec_t4r.etl.engine.executor import open_executor
from missrec_t4r.etl.engine.shuffle import cut_chunks
from missrec_t4r.etl.nvt.serialization import load_workflow
from missrec_t4r.etl.nvt.workflows import transform_dataset
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.io.atomic import exchange
from tests import processes
from tests.workflows.tables import EVENTS, ITEMS, items_of, write

SOME = settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"drop_duplicates": True, "unknown_items": "drop", "categorical_columns": ["aisle"]},
    {"k_core": 2, "max_events": 3},
    {"min_item_count": 2, "split": "time"},
    {"session_gap": "20s", "event_weights": "cart=3,gift=0", "time_features": "all"},
    {"split": "time", "time_features": "gap,hour", "drop_duplicates": True},
]


def shop(seed: int, size: int = 400) -> pd.DataFrame:
    """Random events with equal times, duplicates, nulls, text, integers, fractions and items that no table has."""
    chance = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "user_id": chance.choice([f"user {n}" for n in range(40)], size),
            "item_id": chance.choice([*ITEMS.item_id, "rug", "mat"], size, p=[0.3, 0.3, 0.2, 0.1, 0.06, 0.04]),
            "timestamp": chance.integers(0, 300, size),
            "event_type": chance.choice(["view", "cart", "gift", None], size, p=[0.6, 0.2, 0.1, 0.1]),
            "aisle": chance.integers(0, 5, size),
            "dwell": np.where(chance.random(size) < 0.1, np.nan, chance.random(size)),
            "note": chance.integers(0, 3, size).astype(float),
        }
    )
    if seed % 3 == 0:
        frame["timestamp"] = pd.to_datetime(frame["timestamp"] * 1000 + (seed % 2) * 500, unit="ms")
    if seed % 2:
        frame.loc[::37, "user_id"] = None
        frame.loc[::41, "item_id"] = None
    return frame


def table(data: Path, split: str) -> pa.Table:
    """Return a split in the order of its files, which is the order of the rows."""
    return pa.concat_tables([pq.read_table(file) for file in sorted((data / split).glob("*.parquet"))])


def ordered(data: Path, split: str) -> pa.Table:
    """Return a split in the order of users."""
    rows = table(data, split)
    keys = [(name, "ascending") for name in ("user_id", "session_id") if name in rows.column_names]
    return rows.sort_by(keys)


def same_folder(one: Path, other: Path) -> None:
    for split in ("train", "valid", "test"):
        first, second = ordered(one, split), ordered(other, split)
        assert first.column_names == second.column_names
        for name in first.column_names:
            assert first[name].to_pylist() == second[name].to_pylist(), (split, name)
            assert first[name].type.equals(second[name].type), (split, name)
    assert (one / "schema.pbtxt").read_text() == (other / "schema.pbtxt").read_text()
    assert (one / "session_transform.json").read_text() == (other / "session_transform.json").read_text()
    catalogues = [Catalogue.load(folder / "catalogue") for folder in (one, other)]
    assert catalogues[0].items.equals(catalogues[1].items)
    for name, modality in catalogues[0].modalities.items():
        np.testing.assert_array_equal(modality.vectors, catalogues[1].modalities[name].vectors)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_disk_equals_memory(tmp_path: Path, number: int) -> None:
    text = tmp_path / "text.npy"
    np.save(text, np.arange(8, dtype=np.float32).reshape(4, 2))
    files = write(tmp_path / "raw", shop(number))
    options = OPTIONS[number] | {"modality": {"text": text}}
    memory = etl(*files, tmp_path / "memory", engine="memory", **options)
    disk = etl(*files, tmp_path / "disk", engine="disk", partitions=3, workers=1, **options)
    same_folder(tmp_path / "memory", tmp_path / "disk")
    for name in set(memory) - {"data", "seconds", "findings", "settings"}:
        assert memory[name] == disk[name], name
    found = [
        {f["check"]: f["count"] for f in report["findings"] if f["check"] != "null_feature"}
        for report in (memory, disk)
    ]
    assert found[0] == found[1]
    for name in set(memory["settings"]) - {"newest"}:
        assert memory["settings"][name] == disk["settings"][name], name


@SOME
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(OPTIONS[2:]))
def test_fitted_workflow_gives_the_rows_of_the_out_of_core_engine(
    tmp_path_factory: pytest.TempPathFactory, seed: int, partitions: int, options: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("shop")
    events = shop(2 * seed, 60).assign(event_type="view", dwell=1.5)
    events["timestamp"] = np.arange(60) * 7 % 100
    events["user_id"] = events["user_id"].str[-1]  # ten users, so that some sessions are long enough to be split
    options = {name: value for name, value in options.items() if name not in ("k_core", "min_item_count", "split")}
    etl(*write(folder, events), folder / "disk", engine="disk", partitions=partitions, workers=1, **options)
    rows = table(folder / "disk", "train").to_pylist() + table(folder / "disk", "test").to_pylist()
    longest: dict[Any, dict[str, Any]] = {}
    for row in rows:  # with leave-one-out, the longest row of a session is the whole of it
        key = (row["user_id"], row.get("session_id", 0))
        if key not in longest or len(row["item_id-list"]) > len(longest[key]["item_id-list"]):
            longest[key] = row
    events = events.drop_duplicates(["user_id", "item_id", "timestamp"]) if options.get("drop_duplicates") else events
    frame = transform_dataset(load_workflow(folder / "disk" / "workflow"), events.reset_index(drop=True), 1, "user_id")
    got = {
        (row["user_id"], row.get("session_id", 0)): {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()
        }
        for row in frame.to_dict("records")
    }
    assert got == longest


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_pieces_and_workers_change_nothing(tmp_path: Path, scheduler: str) -> None:
    files = write(tmp_path, shop(5, 900))
    events, items = files
    frame = pq.read_table(events)
    pq.write_table(frame, events, row_group_size=100)
    etl(events, items, tmp_path / "one", engine="disk", partitions=1, workers=1, split="time")
    count = 2 if scheduler == "threads" else 1
    arguments = {"engine": "disk", "partitions": 7, "split": "time", "dask_scheduler": scheduler, "workers": count}
    etl(events, items, tmp_path / "many", **arguments)
    for split in ("train", "valid", "test"):
        assert table(tmp_path / "one", split).equals(table(tmp_path / "many", split))  # the order, too
    assert len(list((tmp_path / "many" / "train").glob("*.parquet"))) == 7


def test_a_killed_worker_does_not_lose_the_run(tmp_path: Path) -> None:
    def dies_once(place: str, number: int) -> int:
        import signal
        from pathlib import Path

        if number == 1 and not (Path(place) / "died").exists():
            (Path(place) / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    with open_executor("processes", 1) as machines:
        answers = machines.run(dies_once, [(str(tmp_path), number) for number in range(3)], "")
    assert answers == [0, 1, 4]
    assert (tmp_path / "died").exists()


def test_ctrl_c_of_a_held_key_counts_once_and_pressed_again_it_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, seconds = signal.signal(signal.SIGINT, signal.default_int_handler), iter([0.0, 0.7, 0.8, 0.9, 2.0])
    monkeypatch.setattr(executor.time, "monotonic", lambda: next(seconds))
    try:
        with executor._interrupted_once():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert caplog.messages == ["interrupted: stopping the processes; Ctrl-C again waits for none of them"]
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


INTERRUPTED = """
import signal, sys
from missrec_t4r.etl.engine.executor import open_executor

signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored

def waits(seen):
    import os, pathlib, time
    pathlib.Path(seen + "-").write_text(str(os.getpid()))
    pathlib.Path(seen + "-").rename(seen)
    time.sleep(100)

try:
    with open_executor("processes", 1) as machines:
        machines.run(waits, [(sys.argv[1],)], "")
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
"""


@pytest.mark.parametrize("answers", [True, False])
def test_ctrl_c_ends_the_worker_processes_without_a_word_of_theirs(answers: bool, tmp_path: Path) -> None:
    """A terminal sends it to the workers, too; one that hangs, as on a network disk, is not waited for."""
    port_in_use = "ignore:Port:UserWarning"  # by a cluster of another test
    command = [sys.executable, "-W", port_in_use, "-c", INTERRUPTED, str(tmp_path / "seen")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "seen").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if not answers:
        os.kill(int((tmp_path / "seen").read_text()), signal.SIGSTOP)
    for _ in range(3):  # a key that is held down
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.05)
    words = "interrupted: stopping the processes; Ctrl-C again waits for none of them\ninterrupted\n"
    assert run.communicate(timeout=300)[1] == words
    deadline = time.monotonic() + 120  # Python's own tracker of resources ends after them
    while left := processes.of_group(run.pid):
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.05)


def test_no_user_is_in_two_partitions() -> None:
    ids = pa.array([f"user {n}" for n in range(5000)])
    hashes = hash_ids(ids)
    assert len(np.unique(hashes)) == 5000
    np.testing.assert_array_equal(hash_ids(ids.slice(7, 100)), hashes[7:107])
    assert np.bincount(partition_of(hashes, 10)).min() > 400
    assert hash_ids(pa.array(["ann", "", "a user with a long name"])).tolist() == [
        11352257264734794409,
        16294208416658607535,
        12035079834129655826,
    ]  # pinned: folders that exist are updated by it
    assert hash_ids(pa.array([7], pa.int64())).tolist() == [7191089600892374487]


SMALL_CHUNKS = "from missrec_t4r.etl.engine import shuffle; shuffle.BATCH_ROWS = 400\n"
KILLED = """
import sys, time
from pathlib import Path
from missrec_t4r.etl.engine import sessionize
from missrec_t4r.etl.pipeline import etl

task, seen = sessionize.write_splits, Path(sys.argv[3])

def slow(work, index):
    if index == 2:
        seen.touch()
        time.sleep(60)
    return task(work, index)

sessionize.write_splits = slow
etl(sys.argv[1], sys.argv[2], sys.argv[4], engine="disk", partitions=4, workers=1)
"""


def test_a_killed_run_continues_from_what_was_finished(tmp_path: Path) -> None:
    events, items = write(tmp_path, shop(2, 900))
    pq.write_table(pq.read_table(events), events, row_group_size=300)
    arguments = [str(events), str(items), str(tmp_path / "seen"), str(tmp_path / "data")]
    run = processes.start(["-c", SMALL_CHUNKS + KILLED, *arguments])
    deadline = time.monotonic() + 300
    while not (tmp_path / "seen").exists() and time.monotonic() < deadline:
        assert run.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "data").exists()
    (work,) = (tmp_path / ".data-work").iterdir()
    finished = sorted((work / "split").glob("*.json"))
    assert finished
    again = processes.run(["-c", SMALL_CHUNKS + CONTINUED, *arguments])
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == [True] * len(finished)
    etl(events, items, tmp_path / "whole", engine="disk", partitions=4, workers=1)
    for split in ("train", "valid", "test"):
        assert table(tmp_path / "data", split).equals(table(tmp_path / "whole", split))
    assert not (tmp_path / ".data-work").exists()


CONTINUED = """
import json, sys
from pathlib import Path
from missrec_t4r.etl.engine import build as engine
from missrec_t4r.etl.pipeline import etl

work = Path(sys.argv[4]).with_name(".data-work")
before = {file: file.stat().st_mtime_ns for file in work.glob("*/split/*.json")}
finish = engine._finish

def look(*arguments):
    print(json.dumps([file.stat().st_mtime_ns == time for file, time in before.items()]))
    return finish(*arguments)

engine._finish = look
etl(sys.argv[1], sys.argv[2], sys.argv[4], engine="disk", partitions=4, workers=1)
"""


def test_a_run_that_lost_its_workers_continues_from_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its error says: only input and settings that were wrong begin anew."""
    files, out, run = write(tmp_path), tmp_path / "data", executor.ThreadExecutor.run

    def lose_workers(machines: executor.ThreadExecutor, task: Any, arguments: Any, description: str) -> list[Any]:
        if description == "writing the splits":
            raise executor.WorkerError("no worker was left", "at least one worker", "start some: it continues")
        return run(machines, task, arguments, description)

    with monkeypatch.context() as patched:
        patched.setattr(executor.ThreadExecutor, "run", lose_workers)
        with pytest.raises(DataError, match="it continues"):
            etl(*files, out, engine="disk", workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(shuffle, "read_batches", lambda *_: pytest.fail("the events are read again"))
        etl(*files, out, engine="disk", workers=1)
    etl(*files, tmp_path / "whole", engine="disk", workers=1)
    for split in ("train", "valid", "test"):
        assert table(out, split).equals(table(tmp_path / "whole", split))


def test_the_other_engine_leaves_nothing_of_a_run_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Killed(BaseException):
        """As a kill: no handler of ours catches it."""

    def die(*_: object) -> None:
        raise Killed

    files, out = write(tmp_path), tmp_path / "data"
    (tmp_path / ".other-work").mkdir()  # of another output
    with monkeypatch.context() as patched:
        patched.setattr(sessionize, "write_splits", die)
        with pytest.raises(Killed):
            etl(*files, out, engine="disk", workers=1)
    work = tmp_path / ".data-work"
    assert any(work.iterdir())
    with caplog.at_level("INFO"):
        etl(*files, out, engine="memory")
    assert f"removed {work}: a run was killed there, and {out} is written anew" in caplog.text
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".other-work"]
    caplog.clear()
    etl(*files, out, engine="memory")
    assert "removed" not in caplog.text


@pytest.mark.parametrize("replaces", [False, True])
def test_a_run_that_was_stopped_when_its_folder_was_in_place_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """What is left in the working folder has no splits then, or those of the folder that was replaced."""
    files, data = write(tmp_path, shop(2, 900)), tmp_path / "data"
    options: dict[str, Any] = {"engine": "disk", "partitions": 3, "workers": 1}
    if replaces:
        etl(*files, data, max_events=4, **options)

    def stopped(folder: Path, out: Path) -> None:
        if out.exists():
            exchange(folder, out)
        else:
            folder.rename(out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workdir, "move_into_place", stopped)
        with pytest.raises(KeyboardInterrupt):
            etl(*files, data, **options)
    etl(*files, data, **options)
    etl(*files, tmp_path / "whole", **options)
    same_folder(data, tmp_path / "whole")
    assert not (tmp_path / ".data-work").exists()


def test_bad_settings_and_outputs_are_refused_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path)
    for options, words in (
        ({"engine": "fast"}, "engine 'fast'.*auto, memory, disk or gpu"),
        ({"dask_scheduler": "yarn", "engine": "disk"}, "--dask-scheduler 'yarn'.*tcp://"),
        ({"session_gap": "soon"}, "--session-gap 'soon'.*30m"),
        ({"event_weights": "view=x"}, "--event-weights 'view=x'"),
        ({"time_features": "day"}, r"--time-features \['day'\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            etl(*files, tmp_path / "data", **options)
    for kind in ("memory", "disk"):
        with pytest.raises(SchemaError, match="no text column 'kind'.*--event-type-column"):
            etl(*files, tmp_path / "data", engine=kind, event_weights="a=1", event_type_column="kind")
        taken = write(tmp_path / kind, EVENTS.assign(gap=1))
        with pytest.raises(SchemaError, match=r"have columns \['gap'\] already"):
            etl(*taken, tmp_path / "data", engine=kind, time_features="gap")
        with pytest.raises(DataError, match="nobody's is not a data folder|exists and is not a data folder"):
            etl(*files, tmp_path / kind, engine=kind)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(executor, "CONNECT_TIMEOUT", 1)
    unreachable = open_executor("tcp://127.0.0.1:9")
    with pytest.raises(DataError, match="no Dask scheduler answers at tcp://127.0.0.1:9"), unreachable:
        pass


def test_csv_out_of_core_keeps_zeros(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n1,007,1\n1,07,2\n1,7,3\n")
    (tmp_path / "items.csv").write_text("item_id,title\n7,seven\n07,oh seven\n007,bond\n")
    etl(tmp_path / "events.csv", tmp_path / "items.csv", tmp_path / "data", engine="disk", workers=1)
    assert items_of(tmp_path / "data", "test") == {"1": [5, 4, 3]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "events.csv", "items.csv"]


def test_the_command_has_the_options_and_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    events, items = write(tmp_path)
    arguments = ["etl", "--interactions", str(events), "--items", str(items), "--out", str(tmp_path / "data")]
    options = ["--session-gap", "10s", "--event-weights", "cart=3", "--time-features", "hour", "--engine", "disk"]
    planned = CliRunner().invoke(app, [*arguments, *options, "--dry-run"])
    plan = json.loads(planned.stdout.splitlines()[-1])
    assert (plan["engine"], plan["events"], plan["items"], plan["would_replace"]) == ("disk", 9, 4, False)
    assert not (tmp_path / "data").exists()
    done = CliRunner().invoke(app, [*arguments, *options, "--workers", "1"])
    report = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, report["events"]) == (0, 9)
    names = table(tmp_path / "data", "train").column_names
    assert names[:2] == ["user_id", "session_id"]
    assert names[-2:] == ["weight-list", "hour-list"]
    refused = CliRunner().invoke(app, [*arguments, "--user-column", "who", "--dry-run"])
    assert refused.exit_code == 2


def test_large_parquet_uses_the_out_of_core_engine_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("missrec_t4r.etl.pipeline.OUT_OF_CORE_EVENTS", 5)
    etl(*write(tmp_path), tmp_path / "data", workers=1)
    assert (tmp_path / "data" / "state").is_dir()


def test_a_copy_of_a_csv_file_is_that_of_its_id_columns(tmp_path: Path) -> None:
    """What a killed run has converted with other columns as ids is not taken: the ids 007 and 7 would be one."""
    (tmp_path / "events.csv").write_text("user_id,shop,item_id,timestamp\n1,007,lamp,5\n")
    for user in ("user_id", "shop"):
        (copy,) = workdir.as_parquet([tmp_path / "events.csv"], tmp_path / "copies", [user, "item_id"])
        assert pq.read_schema(copy).field(user).type == pa.string()


def test_workers_in_another_directory_find_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path that a task gets is absolute."""
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [chunk.file for chunk in cut_chunks([Path("events.parquet")])] == [str(tmp_path / "events.parquet")]
    with workdir.working_folder(Path("data")) as (work, _):
        assert work == tmp_path / ".data-work"


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, engine: Literal["memory", "disk"]) -> None:
    """The data folder may be on another disk; what it names is replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data", target_is_directory=True)
    for _ in range(2):
        etl(*write(tmp_path), tmp_path / "data", engine=engine, workers=1)
        assert (tmp_path / "data").is_symlink()
        assert items_of(tmp_path / "disk" / "data", "train")["cem"] == [3, 6]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_chunks_follow_the_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(10)}), tmp_path / "a.parquet", row_group_size=2)
    assert [(chunk.row_groups, chunk.rows) for chunk in cut_chunks([tmp_path / "a.parquet"], batch_rows=8)] == [
        ([0, 1], 4),
        ([2, 3], 4),
        ([4], 2),
    ]
