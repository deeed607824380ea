"""Files as they come: mixed types, units and zones, bytes that are no text, cut short, full and read-only disks."""

import gzip
import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.data.session_files import read_rows
from missrec_t4r.errors import DataError, MISSRecError, SchemaError
from missrec_t4r.etl.arrow_columns import normal_time
from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.report import report
from missrec_t4r.etl.sources.json_lines import read_all
from missrec_t4r.etl.sources.synthetic.shop import generate_shop
from missrec_t4r.etl.sources.table import expand, read_table
from missrec_t4r.io.atomic import atomic_write_dir, atomic_write_file, translate_disk_errors
from missrec_t4r.runs.run_folder import require_run_folder
from tests import processes
from tests.workflows.tables import EVENTS, ITEMS, items_of, save_vectors, write

SHORT_TEXTS = (pa.binary(), pa.string())


def _lines(file: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


@pytest.mark.parametrize("name", ["events.jsonl", "events.json.gz", "events.csv.gz", "events.csv"])
def test_every_kind_of_file_gives_the_same_sessions(name: str, tmp_path: Path) -> None:
    parquet, items = write(tmp_path / "raw")
    if "json" in name:
        events = _lines(tmp_path / name, EVENTS.to_dict("records"))
    else:
        EVENTS.to_csv(events := tmp_path / name, index=False)
    etl(parquet, items, tmp_path / "expected")
    etl(str(tmp_path / "**" / name), items, tmp_path / "data")
    assert items_of(tmp_path / "data", "test") == items_of(tmp_path / "expected", "test")
    assert events.is_file()


def test_what_spark_and_merlin_write_beside_tables_is_not_read_as_one(tmp_path: Path) -> None:
    events, items = write(tmp_path / "raw")
    (folder := tmp_path / "events").mkdir()
    for name in ("part_0.parquet", "._part_0.parquet"):
        (folder / name).write_bytes(events.read_bytes() if name[0] == "p" else b"of a Mac")
    (folder / "_metadata.json").write_text('{"data_paths": []}')
    etl(folder, items, tmp_path / "data")
    etl(events, items, tmp_path / "expected")
    assert items_of(tmp_path / "data", "test") == items_of(tmp_path / "expected", "test")


def test_a_table_that_is_left_out_by_its_name_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events, items = write(tmp_path / "raw")
    (folder := tmp_path / "events").mkdir()
    (folder / "_metadata.json").write_text('{"data_paths": []}')
    (folder / "_jan.parquet").write_bytes(events.read_bytes())
    with pytest.raises(DataError, match="no interactions file at .*; expected: a parquet") as refused:
        etl(folder, items, tmp_path / "data")
    assert "subfolders" not in str(refused.value)
    assert "left out by its name: _jan.parquet; name it to read it, as in '" in caplog.text
    etl(caplog.text.split("as in '")[1].split("'")[0], items, tmp_path / "data")


@pytest.mark.parametrize("source", ["events", "events/*", "events/**/*.parquet", "*/*"])
def test_a_pattern_leaves_out_what_spark_and_notebooks_keep_beside_tables(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events, items = write(tmp_path / "raw")
    (folder := tmp_path / "shop" / "events").mkdir(parents=True)
    events.rename(folder / "part-0.parquet")
    others = ("_temporary/0/part-0.parquet", ".ipynb_checkpoints/part-0.parquet", "_SUCCESS", "_metadata")
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes((folder / "part-0.parquet").read_bytes())
    found = etl(tmp_path / "shop" / source, items, tmp_path / "data")
    assert found["events"] == len(EVENTS)
    assert ("left out by its name: _temporary; name it" in caplog.text) is ("**" in source)
    assert expand(tmp_path / "shop" / "events" / "_*" / "**" / "*.parquet", "events") == [folder / others[0]]


@pytest.mark.parametrize("source", ["", "*.parquet", "**/*.parquet", "../*/*.parquet"])
@pytest.mark.parametrize("partition", [".", "day=1"])
def test_a_delta_table_is_refused_with_what_writes_its_rows(source: str, partition: str, tmp_path: Path) -> None:
    """The files that an update or delete has replaced are still in the folder: their events would count again."""
    events, items = write(tmp_path / "raw")
    (table := tmp_path / "events" / "table" / "_delta_log").mkdir(parents=True)
    folder = table.parent / partition
    folder.mkdir(exist_ok=True)
    for name in ("part-0.parquet", "part-1.parquet"):
        (folder / name).write_bytes(events.read_bytes())
    (table / "00000000000000000010.checkpoint.parquet").write_bytes(events.read_bytes())
    words = r"table is a Delta Lake table: .*deltalake.DeltaTable\('.*table'\).*spark.read.format\('delta'\)"
    if partition == "." or source in ("", "**/*.parquet"):
        with pytest.raises(DataError, match=words):
            etl(table.parent / source, items, tmp_path / "data")
    assert etl(folder / "part-0.parquet", items, tmp_path / "data")["events"] == len(EVENTS)


def test_a_delta_table_that_is_left_out_by_its_name_is_in_nobodys_way(tmp_path: Path) -> None:
    events, items = write(tmp_path / "raw")
    (tmp_path / "shop" / "_archive" / "_delta_log").mkdir(parents=True)
    for folder in ("shop", "shop/_archive"):
        (tmp_path / folder / "part-0.parquet").write_bytes(events.read_bytes())
    assert etl(tmp_path / "shop" / "**" / "*.parquet", items, tmp_path / "data")["events"] == len(EVENTS)


@pytest.mark.parametrize("folder", [".cache/events", "_staging", "a/_b[1]/c"])
def test_a_folder_whose_own_path_has_such_a_name_is_read(folder: str, tmp_path: Path) -> None:
    events, items = write(tmp_path / "raw")
    (tmp_path / folder).mkdir(parents=True)
    events.rename(tmp_path / folder / "part-0.parquet")
    assert expand(tmp_path / folder, "events") == [tmp_path / folder / "part-0.parquet"]
    assert etl(tmp_path / folder, items, tmp_path / "data")["events"] == len(EVENTS)


def test_a_folder_of_folders_is_refused_with_the_pattern_that_reads_it(tmp_path: Path) -> None:
    events, items = write(tmp_path / "raw")
    (day := tmp_path / "events" / "day=1").mkdir(parents=True)
    events.rename(day / "part_0.parquet")
    with pytest.raises(DataError, match="no interactions file in .*, whose subfolders hold some") as refused:
        etl(tmp_path / "events", items, tmp_path / "data")
    pattern = str(refused.value).split("pass the pattern '")[1].split("'")[0]
    etl(pattern, items, tmp_path / "data")


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("name", ["user_id", "event_type"])
def test_a_column_that_is_there_twice_is_named(name: str, engine: str, tmp_path: Path) -> None:
    events, items = write(tmp_path)
    table = pq.read_table(events)
    pq.write_table(pa.table([*table.columns, table[name]], names=[*table.column_names, name]), events)
    with pytest.raises(SchemaError, match=rf"events.parquet has columns .*{name}'\]; expected: every name once"):
        etl(events, items, tmp_path / "data", engine=engine, workers=1)


def test_json_texts_that_end_within_a_character_are_repaired_and_numbers_beyond_64_bits_refused(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"title": "lamp \\ud83d"}\n{"title": "desk \\ud83d\\ude00"}\n')
    assert read_table(file, "items")["title"].to_pylist() == ["lamp ?", "desk \N{GRINNING FACE}"]
    file.write_text(f'{{"title": {2**70}}}\n{{"title": "lamp"}}\n')
    with pytest.raises(DataError, match="items.jsonl has values of several types, or too large ones"):
        read_table(file, "items")


def test_ids_of_mixed_types_become_texts(tmp_path: Path) -> None:
    """Numbers in one file and texts in another one, and both within one file of JSON lines."""
    rows = [{"user_id": user, "item_id": 7, "timestamp": 1} for user in (5, "x5", None)]
    assert read_table(_lines(tmp_path / "mixed.jsonl", rows), "events", text_columns=["user_id"])[
        "user_id"
    ].to_pylist() == ["5", "x5", None]
    for name, users in (("a", [5, 6]), ("b", ["x", "5"])):
        pd.DataFrame({"user_id": users}).to_parquet(tmp_path / f"{name}.parquet")
    table = read_table(str(tmp_path / "*.parquet"), "events", text_columns=["user_id"])
    assert table["user_id"].to_pylist() == ["5", "6", "x", "5"]


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Also where ids of mixed types make the slower reader read them."""
    (tmp_path / "events.jsonl").write_text('{"user_id": 1}\n{"user_id": "b"}\n', encoding="utf-8-sig")
    assert read_all(tmp_path / "events.jsonl", ["user_id"])["user_id"].to_pylist() == ["1", "b"]


def test_times_in_text_may_mix_units_dates_and_zones() -> None:
    moments = [
        "1577836800",
        "1577836800000",
        "1577836800000000",
        "2020-01-01",
        "2020-01-01T00:00:00",
        "2020-01-01T00:00:00Z",
        "2020-01-01 02:00:00+02:00",
        "2019-12-31T19:00:00-05:00",
    ]
    same = normal_time(pa.chunked_array([moments]), "timestamp")
    assert same.to_pylist() == [1_577_836_800] * len(moments)
    odd = normal_time(pa.chunked_array([["2020-01-01T00:00:00.250Z", "soon", None]]), "timestamp")
    assert odd.to_pylist() == [1_577_836_800.25, None, None]
    with pytest.raises(SchemaError, match="holds texts such as 'soon'; expected: unix seconds or a date"):
        normal_time(pa.chunked_array([["soon", "later"]]), "timestamp")
    with pytest.raises(SchemaError, match="holds texts such as '01/02/2020'.* --time-format"):  # day or month first?
        normal_time(pa.chunked_array([["01/02/2020", "31/12/2019"]]), "timestamp")
    zoned = pd.Series(pd.to_datetime(["2020-01-01 02:00"]).tz_localize("Europe/Helsinki"))
    assert normal_time(pa.chunked_array([pa.array(zoned)]), "timestamp").to_pylist() == [1_577_836_800]


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_numbers_in_two_units_are_refused(engine: Literal["memory", "disk"], tmp_path: Path) -> None:
    times = 1_600_000_000 + EVENTS["timestamp"]
    times[3] *= 1000
    with pytest.raises(DataError, match=r"1 of 9 times are milliseconds.*divide the larger ones by 1000"):
        etl(*write(tmp_path / "raw", EVENTS.assign(timestamp=times)), tmp_path / "data", engine=engine)
    assert not (tmp_path / "data").exists()


def test_what_is_odd_about_events_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MANY_EVENTS", 30)
    crawler = pd.DataFrame({"user_id": "bot", "item_id": ["lamp", "desk"] * 20, "timestamp": range(40)})
    odd = pd.DataFrame(
        {"user_id": [None, "ann", "", "ann"], "item_id": ["lamp", None, "lamp", "rug"], "timestamp": [1, 2, 3, None]}
    )
    events = pd.concat([EVENTS[["user_id", "item_id", "timestamp"]], EVENTS[:2], crawler, odd], ignore_index=True)
    report = etl(*write(tmp_path / "raw", events), tmp_path / "data", max_events=5)
    counted = {finding["check"]: finding["count"] for finding in report["findings"]}
    assert counted == {
        "null_user_id": 2,
        "null_item_id": 1,
        "null_timestamp": 1,
        "duplicate_events": 2,
        "time_backwards": 2,
        "very_long_users": 1,
    } | {name: count for name, count in counted.items() if name == "null_feature"}
    assert len(items_of(tmp_path / "data", "test")["bot"]) == 5


def _with_bytes(
    file: Path, table: pd.DataFrame, column: str, value: bytes, kinds: tuple[pa.DataType, ...] = SHORT_TEXTS
) -> Path:
    """Write a parquet file with a text that is no UTF-8 in its first row, as careless writers do."""
    texts = [value, *(None if pd.isna(text) else str(text).encode() for text in table[column][1:])]
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    broken = pa.array(texts, kinds[0]).view(kinds[1])
    pq.write_table(arrow.set_column(arrow.column_names.index(column), column, broken), file)
    return file


@pytest.mark.parametrize("kinds", [SHORT_TEXTS, (pa.large_binary(), pa.large_string())])
def test_text_that_is_not_utf8_is_repaired_and_such_ids_are_refused(
    kinds: tuple[pa.DataType, ...], tmp_path: Path
) -> None:
    events, items = write(tmp_path / "raw")
    _with_bytes(items, ITEMS, "title", b"caf\xe9 lamp", kinds)
    etl(events, items, tmp_path / "data")
    assert features(tmp_path / "data", text_columns=["title"])["modalities"]["text"]["items"] == 3
    titles = pq.read_table(tmp_path / "data" / "catalogue" / "items.parquet")["title"].to_pylist()
    assert titles[0] == "caf\ufffd lamp"
    with pytest.raises(SchemaError, match="1 ids in column 'item_id' are not UTF-8 text.*iconv"):
        etl(events, _with_bytes(tmp_path / "ids.parquet", ITEMS, "item_id", b"\xff", kinds), tmp_path / "data")
    (tmp_path / "items.csv").write_bytes(b"item_id,title\nlamp,caf\xe9\n")
    assert read_table(tmp_path / "items.csv", "items")["title"].to_pylist() == ["caf\ufffd"]
    (tmp_path / "items.csv").write_bytes(b"item_id,title\ncaf\xe9,lamp\n")
    with pytest.raises(DataError, match="items.csv cannot be read .*iconv"):
        etl(events, tmp_path / "items.csv", tmp_path / "data")


@pytest.mark.parametrize("kinds", [SHORT_TEXTS, (pa.binary(), pa.binary())])
@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_ids_that_are_not_utf8_are_refused_as_such_beside_integer_ids_in_another_file(
    kinds: tuple[pa.DataType, ...], engine: Literal["memory", "disk"], tmp_path: Path
) -> None:
    events, items = write(tmp_path / "raw", EVENTS.assign(user_id=range(len(EVENTS))))
    broken = _with_bytes(tmp_path / "broken.parquet", EVENTS, "user_id", b"\xff", kinds)
    with pytest.raises(SchemaError, match="1 ids in column 'user_id' are not UTF-8 text; expected: UTF-8.*iconv"):
        etl([events, broken], items, tmp_path / "data", engine=engine)


@pytest.mark.parametrize("name", ["events.parquet", "events.csv.gz", "events.json.gz"])
def test_empty_and_truncated_files_are_named(name: str, tmp_path: Path) -> None:
    events, items = write(tmp_path / "raw")
    many = pd.concat([EVENTS.assign(user_id=EVENTS["user_id"] + str(copy)) for copy in range(300)])
    if name == "events.csv.gz":
        many.to_csv(events := tmp_path / name, index=False)
    elif name == "events.json.gz":
        events = _lines(tmp_path / name, many.to_dict("records"))
    events.write_bytes(events.read_bytes()[: events.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"{name} (cannot be read|ends in the middle)"):
        etl(events, items, tmp_path / "data")
    events.write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} has no bytes"):
        etl(events, items, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 400 bytes, as on a full disk: writes fail with EFBIG.

    Over before the test ends: pytest's own log may be a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _files(folder: Path) -> list[tuple[str, float]]:
    return sorted((str(file), file.stat().st_mtime) for file in folder.rglob("*") if file.is_file())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    files = write(tmp_path / "raw")
    etl(*files, tmp_path / "out" / "data")
    before = _files(tmp_path / "out")
    with small_disk():
        with pytest.raises(DataError, match="the disk ran full while .*data was written"):
            etl(*files, tmp_path / "out" / "data")
        with pytest.raises(DataError, match="the disk ran full"):
            features(tmp_path / "out" / "data", text_columns=["title"])
        with pytest.raises(DataError, match="the disk ran full"), atomic_write_file(tmp_path / "out" / "one") as file:
            file.write_bytes(b"x" * 5_000)
        with (
            pytest.raises(DataError, match="the disk ran full while .*outer was written") as told,
            translate_disk_errors(tmp_path / "outer"),
            atomic_write_file(tmp_path / "out" / "inner") as file,
        ):
            file.write_bytes(b"x" * 5_000)
        assert str(told.value).count("the disk ran full") == 1
    assert _files(tmp_path / "out") == before


def test_a_read_only_place_is_named(tmp_path: Path) -> None:
    place = Path("/sys/missrec")  # read-only for root, too
    with pytest.raises(DataError, match="/sys/missrec cannot be written .*choose another --out"):
        etl(*write(tmp_path / "raw"), place)
    with pytest.raises(DataError, match="cannot be written"), atomic_write_dir(place, "x.json"):
        pass


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    files, file = write(tmp_path / "raw"), tmp_path / "file"
    file.write_text("x")
    for engine in ("memory", "disk"):
        with pytest.raises(DataError, match="file/data cannot be written .*folders above it"):
            etl(*files, file / "data", engine=engine, workers=1)
    etl(*files, tmp_path / "data", modality={"text": save_vectors(tmp_path / "v.npy", np.eye(4))})
    (tmp_path / "pictures" / "a.png").mkdir(parents=True)
    words = ["train", "--data", str(tmp_path / "data"), "--recipe", "tiny", "--device", "cpu", "--out"]
    for out, told in (
        (file, "file is a file; expected: a folder"),
        (file / "run", "file is a file; expected: a folder"),
        (tmp_path / "data", "is no folder of a run: it holds catalogue, request_workflow, schema.pbtxt, …; expected"),
        (tmp_path / "pictures", "is no folder of a run: it holds a.png; expected: a new folder, or that of a run. c"),
    ):
        for command in (words, ["pretrain", "--data", str(tmp_path / "data"), "--out"]):
            ran = CliRunner().invoke(app, [*command, str(out)])
            assert ran.exit_code == 2, ran.exception
            assert told in ran.stderr
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "left",
    ["", "log.jsonl", "state.safetensors", "checkpoint", "tensorboard", ".run.json-host-1-x", "logs", "lost+found"],
)
def test_a_run_goes_where_a_killed_one_was_and_beside_logs_and_settings(left: str, tmp_path: Path) -> None:
    """A script may redirect messages into the folder, and put the recipe there."""
    (tmp_path / "run" / left).mkdir(parents=True)
    for name in ("train.log", "slurm-7.out", "recipe.yaml", "job.json"):
        (tmp_path / "run" / name).touch()
    require_run_folder(tmp_path / "run")


def test_every_command_says_that_the_disk_is_full(tmp_path: Path) -> None:
    """Training writes with safetensors, which has errors of its own."""
    vectors = save_vectors(tmp_path / "v.npy", np.eye(4))
    etl(*write(tmp_path / "raw"), tmp_path / "data", modality={"text": vectors})
    words = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--recipe", "tiny"]
    with small_disk():
        ran = CliRunner().invoke(app, [*words, "--set", "train.epochs=1", "--device", "cpu"])
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "DataError: the disk ran full" in ran.stderr
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that this process may read and not write: it is not its owner, root or not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for place in folder.rglob("*"):
            if place.is_dir():
                place.chmod(0o755)


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Work as a user who owns nothing here; without root's rights, take those of the owner away."""
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_of_somebody_else_is_named_and_stays_as_it_is(locked: Path) -> None:
    files = write(locked / "raw")
    etl(*files, locked / "data", engine="disk", workers=1)
    report(locked / "data", locked / "report")
    before = _files(locked)
    attempts: list[Callable[[], object]] = [
        lambda: etl(*files, locked / "data", workers=1),
        lambda: etl(*files, locked / "data", engine="disk", workers=1),
        lambda: etl(*files, locked / "data" / "inside", engine="disk", workers=1),
        lambda: features(locked / "data", text_columns=["title"]),
        lambda: report(locked / "data", locked / "report"),
        lambda: generate_shop(locked / "shop", users=5, items=100),
    ]
    with nobody(locked):
        for attempt in attempts:
            with pytest.raises(DataError, match="cannot be written .*Permission denied"):
                attempt()
    assert _files(locked) == before


def test_sessions_are_read_in_a_folder_that_may_be_entered_and_not_listed(locked: Path) -> None:
    (locked / "train").mkdir()
    pq.write_table(pa.table({"item_id-list": [[3, 4]]}), locked / "train" / "part_0.parquet")
    locked.chmod(0o311)
    with nobody(locked / "train"):
        assert read_rows(locked / "train", ["item_id-list"]).num_rows == 1
    locked.chmod(0o755)


def test_what_a_killed_run_left_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    """Killed between its two renames: the old folder is back. Killed before: its unfinished folder is gone."""
    out = tmp_path / "data"
    with atomic_write_dir(out, "mark.json") as folder:
        (folder / "mark.json").write_text("1")
    script = (
        "import os, signal, sys; from pathlib import Path; from missrec_t4r.io.atomic import atomic_write_dir\n"
        "with atomic_write_dir(Path(sys.argv[1]), 'mark.json') as folder:\n"
        "    (folder / 'mark.json').write_text('2')\n"
        "    if sys.argv[2] == 'late': Path(sys.argv[1]).rename(str(folder) + '-old')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for when, left in (("early", 2), ("late", 2)):
        assert processes.run(["-c", script, out, when]).returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == left
        assert out.exists() == (when == "early")
    with pytest.raises(ValueError, match="stop"), atomic_write_dir(out, "mark.json"):
        raise ValueError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (out / "mark.json").read_text() == "1"


def _csv(file: Path, table: pd.DataFrame, encoding: str = "utf-8", **options: Any) -> Path:
    file.write_bytes(table.to_csv(index=False, **options).encode(encoding))
    return file


def _damaged(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[40:160] = bytes(byte ^ 0xFF for byte in content[40:160])
    file.write_bytes(content)
    return file


def _mixed(folder: Path) -> Path:
    """Two files of events: ids that are integers in one and texts in the other."""
    EVENTS[:4].to_parquet(folder / "ids_1.parquet")
    EVENTS[4:].assign(user_id=7).to_parquet(folder / "ids_2.parquet")
    return folder / "ids_?.parquet"


def _odd(folder: Path, name: str) -> Path:
    """Return one of the files that shops send."""
    folder.mkdir()
    file = folder / "events.parquet"
    changes: dict[str, dict[str, Any]] = {
        "infinite feature": {"dwell": [float("inf"), *EVENTS["dwell"][1:]]},
        "integers too large": {"dwell": np.full(len(EVENTS), 2**63 + 5, np.uint64)},
        "ids too large": {"user_id": np.full(len(EVENTS), 2**63 + 5, np.uint64)},
        "ids as bytes": {"user_id": EVENTS["user_id"].str.encode("utf-8")},
        "one user with very many events": {"user_id": "bot"},
        "lists and records": {"vector": [[1.0, 2.0]] * len(EVENTS), "dwell": [{"seconds": 1}] * len(EVENTS)},
        "milliseconds": {"timestamp": 10**12 + EVENTS["timestamp"]},
    }
    EVENTS.assign(**changes.get(name, {})).to_parquet(file, index=False)
    made: dict[str, Callable[[], object]] = {
        "no bytes": lambda: file.write_bytes(b""),
        "a page in its place": lambda: file.write_bytes(b"<html>please log in</html>"),
        "cut short": lambda: file.write_bytes(file.read_bytes()[:-700]),
        "damaged inside": lambda: _damaged(file),
        "text that is not UTF-8": lambda: _with_bytes(file, EVENTS, "event_type", b"caf\xe9"),
        "ids that are not UTF-8": lambda: _with_bytes(file, EVENTS, "user_id", b"caf\xe9"),
        "ids of two types in two files": lambda: _mixed(folder),
        "semicolons": lambda: _csv(folder / "events.csv", EVENTS, sep=";"),
        "a byte order mark": lambda: _csv(folder / "events.csv", EVENTS, "utf-8-sig"),
        "UTF-16": lambda: _csv(folder / "events.csv", EVENTS, "utf-16"),
        "latin-1 text": lambda: _csv(folder / "events.csv", EVENTS.assign(event_type="caf\xe9"), "latin-1"),
        "a latin-1 name": lambda: _csv(folder / "events.csv", EVENTS.rename(columns={"dwell": "dur\xe9e"}), "latin-1"),
        "a line too short": lambda: (folder / "events.csv").write_text(EVENTS.to_csv(index=False) + "ann,sofa\n"),
    }
    answer = made.get(name, lambda: None)()
    csv = folder / "events.csv"
    return answer if isinstance(answer, Path) else csv if csv.exists() else file


REFUSED = {
    "no bytes": "events.parquet (has no bytes|cannot be read)",
    "a page in its place": "events.parquet cannot be read .*magic bytes",
    "cut short": "events.parquet cannot be read",
    "damaged inside": "events.parquet cannot be read",
    "ids that are not UTF-8": "1 ids in column 'user_id' are not UTF-8 text.*iconv",
    "integers too large": "'dwell' holds integers beyond 64 bits",
    "ids too large": "'user_id' holds integers beyond 64 bits",
    "UTF-16": "events.csv cannot be read",
    "a latin-1 name": "events.csv cannot be read .*iconv",
    "a line too short": "events.csv cannot be read .*Expected 6 columns, got 2",
}
COUNTED = {
    "text that is not UTF-8": {"not_utf8": 1},
    "latin-1 text": {"not_utf8": 9},
    "infinite feature": {"null_feature": 1},
    "one user with very many events": {"very_long_users": 1, "duplicate_events": 1},
    "lists and records": {"event_column_left_out": 1},
    "milliseconds": {"time_out_of_range": 9},
    "ids as bytes": {},
    "ids of two types in two files": {},
    "semicolons": {},
    "a byte order mark": {},
}


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("name", [*REFUSED, *COUNTED])
def test_both_engines_say_the_same_about_odd_files(
    name: str, engine: Literal["memory", "disk"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the file or the column, nothing left; or taken, and what was done about it is counted."""
    monkeypatch.setattr(checks, "MANY_EVENTS", 8)
    _, items = write(tmp_path / "raw")
    events = _odd(tmp_path / "odd", name)
    out = tmp_path / "out" / "data"
    if name in REFUSED:
        with pytest.raises(MISSRecError, match=REFUSED[name]):
            etl(events, items, out, engine=engine, workers=1)
        assert not list(out.parent.glob("*"))
        return
    report = etl(events, items, out, engine=engine, workers=1)
    assert report["events"] == len(EVENTS)
    counted = {finding["check"]: finding["count"] for finding in report["findings"]}
    assert {check: counted.get(check) for check in COUNTED[name]} == COUNTED[name]
    assert not set(counted) - set(COUNTED[name]) - {"time_backwards", "orphan_items"}
    assert [path.name for path in out.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_milliseconds_are_refused_where_seconds_are_counted(engine: Literal["memory", "disk"], tmp_path: Path) -> None:
    _, items = write(tmp_path / "raw")
    events = _odd(tmp_path / "odd", "milliseconds")
    with pytest.raises(DataError, match="which is milliseconds or finer, and --session-gap counts in seconds"):
        etl(events, items, tmp_path / "data", engine=engine, workers=1, session_gap="30m")
    assert not (tmp_path / "data").exists()


def test_a_full_disk_on_the_fast_path_leaves_what_was_there(tmp_path: Path) -> None:
    files = write(tmp_path / "raw")
    EVENTS.to_csv(csv := tmp_path / "raw" / "events.csv", index=False)
    etl(*files, tmp_path / "out" / "data", engine="disk", workers=1)
    before = _files(tmp_path / "out")
    with small_disk():
        for events in (files[0], csv):
            with pytest.raises(DataError, match="the disk ran full while .*data was written"):
                etl(events, files[1], tmp_path / "out" / "data", engine="disk", workers=1)
    assert _files(tmp_path / "out") == before
