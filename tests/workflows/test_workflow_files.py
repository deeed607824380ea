"""`missrec etl --workflow FILE` and the files of workflows/: run as a team runs them, edited as a team edits them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from missrec_t4r.data.event_features import event_columns, load_sessions
from missrec_t4r.errors import ConfigError, DataError, MISSRecError, SchemaError
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.synthetic.shop import generate_shop
from tests import processes
from tests.workflows.tables import rows, write
from tests.workflows.test_sources import META_2018, REVIEWS_2018, _archive, _gzip

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
DEFAULT = (WORKFLOWS / "session_features.py").read_text(encoding="utf-8")
SCRIPTS = sorted(file.name for file in WORKFLOWS.glob("*.py"))


def _run(*command: Any) -> str:
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    generate_shop(folder / "raw", seed=3, users=40, items=100)
    return folder / "raw"


def _edited(folder: Path, *changes: tuple[str, str]) -> Path:
    """Return a copy of the default file, edited: old pieces of text and new ones."""
    text = DEFAULT
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    file = folder / "edited.py"
    file.write_text(text, encoding="utf-8")
    return file


def _same_rows(first: Path, second: Path) -> None:
    for split in ("train", "valid", "test"):
        assert rows(first, split) == rows(second, split)
    assert (first / "schema.pbtxt").read_text() == (second / "schema.pbtxt").read_text()
    transforms = [json.loads((data / "session_transform.json").read_text()) for data in (first, second)]
    assert transforms[0] == transforms[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(WORKFLOWS / script), run_name="__main__")
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("request.py", ["--data", "nowhere", "--items", "a"]),
        ("movielens.py", ["--archive", "nowhere.zip", "--out", "out"]),
        ("amazon_reviews.py", ["--reviews", "nowhere.gz", "--metadata", "nowhere.gz", "--out", "out"]),
    ],
)
def test_an_error_of_the_user_is_a_message_and_no_traceback(
    script: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(WORKFLOWS / script), run_name="__main__")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("DataError: ")
    assert "nowhere" in last
    assert "; expected: " in last


def test_the_default_file_does_what_missrec_etl_does(raw: Path, tmp_path: Path) -> None:
    tables = ["--interactions", raw / "interactions.parquet", "--items", raw / "items.parquet"]
    told = json.loads(_run(WORKFLOWS / "session_features.py", *tables, "--out", tmp_path / "file").splitlines()[-1])
    assert told["settings"]["workflow"]["file"] == "session_features.py"
    etl(raw / "interactions.parquet", raw / "items.parquet", tmp_path / "built-in")
    _same_rows(tmp_path / "file", tmp_path / "built-in")


def test_the_constants_of_the_default_file_equal_the_options(raw: Path, tmp_path: Path) -> None:
    file = _edited(
        tmp_path,
        ("TIME_FEATURES: list[str] = []", 'TIME_FEATURES = ["gap", "hour", "recency"]'),
        ("SESSION_GAP: float | None = None", "SESSION_GAP = 864000.0"),
        ("MAX_EVENTS: int | None = None", "MAX_EVENTS = 4"),
    )
    tables = (raw / "interactions.parquet", raw / "items.parquet")
    etl(*tables, tmp_path / "file", workflow=file, max_sequence_length=4, partitions=2)
    options: dict[str, Any] = {"time_features": "gap,hour,recency", "session_gap": "10d", "max_events": 4}
    etl(*tables, tmp_path / "options", max_sequence_length=4, **options)
    _same_rows(tmp_path / "file", tmp_path / "options")


def test_another_feature_reaches_parquet_schema_training_and_requests(tmp_path: Path) -> None:
    scaled = 'events["dwell"] >> ops.FillMissing(0) >> ops.Clip(min_value=1) >> ops.LogOp() >> ops.Normalize()'
    file = _edited(
        tmp_path,
        ("numbers = [*columns.numbers, ", 'numbers = [*columns.numbers, "scaled", '),
        ("    # 2.", f'    scaled = {scaled} >> ops.Rename(name="scaled")\n    # 2.'),
        ('(codes + events[[*key, "timestamp", *numbers]])', '(codes + events[[*key, "timestamp", "dwell"]] + scaled)'),
        ("*columns.numbers, *TIME_FEATURES]:", '*columns.numbers, "scaled", *TIME_FEATURES]:'),
    )
    data = tmp_path / "data"
    etl(*write(tmp_path), data, workflow=file)
    dwell = {user: columns["dwell"] for user, columns in rows(data, "test").items()}
    all_dwell = np.log1p(np.clip([1, 0.5, 2, 0, 3, 1, 4, 9, 7], 1, None))
    for user, columns in rows(data, "test").items():
        expected = (np.log1p(np.clip(dwell[user], 1, None)) - all_dwell.mean()) / all_dwell.std(ddof=1)
        assert columns["scaled"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert 'name: "scaled-list"' in (data / "schema.pbtxt").read_text()

    columns = {column.name: column for column in event_columns(data, "auto", 8)}
    assert set(columns) == {"event_type", "dwell", "scaled"}
    sessions = load_sessions(data, "test", [columns["scaled"]])
    stored = np.asarray(sessions.features["scaled"])[:4]
    assert columns["scaled"].encode(dwell["ann"]) == pytest.approx(stored, rel=1e-5)
    assert columns["scaled"].encode([None]) == pytest.approx(columns["scaled"].encode([1.0]))


def test_a_shorter_slice_shortens_requests(tmp_path: Path) -> None:
    file = _edited(tmp_path, ("MAX_EVENTS: int | None = None", "MAX_EVENTS = 3"))
    etl(*write(tmp_path), tmp_path / "data", workflow=file)
    assert json.loads((tmp_path / "data" / "session_transform.json").read_text())["max_sequence_length"] == 3
    assert rows(tmp_path / "data", "test")["ann"]["item_id"] == [3, 5, 4]


ALL_LISTS = '{name: ["list"] for name in listed}'
COLUMN = '        column = sessions[f"{name}-list"]\n'
USER = 'output = sessions["user_id"]'
END = "    return Workflow(output)"


IDENTITY = "ops.LambdaOp(lambda column: column)"
REVERSED = 'vocabs={**vocabularies, "item_id": vocabularies["item_id"][::-1]},'


def _with(column: str, operator: str) -> tuple[str, str]:
    """Return the change that puts an operator behind one list column."""
    return COLUMN, COLUMN + f'        column = column >> {operator} if name == "{column}" else column\n'


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ([("codes = events", f"codes = events[list(vocabularies)] >> {IDENTITY}\n    codes = events")], None, "unused"),
        ([(" >> ops.Categorify", f" >> {IDENTITY} >> ops.Categorify")], DataError, "LambdaOp"),
        ([(END, "    return Workflow(output >> ops.Filter(len))")], DataError, "Filter"),
        ([_with("dwell", "ops.ValueCount()")], DataError, "ValueCount.*'dwell-list'"),
        ([("vocabs=vocabularies,", REVERSED)], DataError, "other rows"),
        ([("vocabs=vocabularies,", "")], DataError, "other rows"),
        ([("vocabs=vocabularies,", "vocabs=vocabularies, num_buckets=5,")], DataError, "other rows"),
        ([(ALL_LISTS, f'{{**{ALL_LISTS}, "dwell": ["list", "last"]}}')], None, "unused"),
        (
            [
                (ALL_LISTS, f'{{**{ALL_LISTS}, "dwell": ["list", "count"]}}'),
                (USER, 'output = sessions["user_id", "dwell-count"]'),
            ],
            SchemaError,
            "count of 'dwell'",
        ),
        ([_with("dwell", "SessionSlice(-2)")], SchemaError, "'dwell-list'"),
        ([_with("item_id", "SessionSlice(0, 2)")], DataError, "SessionSlice"),
        ([("[Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL]", "[Tags.CATEGORICAL]")], SchemaError, "ITEM_ID"),
        ([(END, '    return Workflow(sessions["user_id"])')], SchemaError, "item_id-list"),
        ([(END, "    return output")], DataError, "returns Node"),
        ([(END, "    return 1 / 0")], DataError, "ZeroDivisionError"),
        ([('["user_id", "item_id", "timestamp", *', '["no_such", "item_id", "timestamp", *')], DataError, "no_such"),
        ([("import sys", "import no_such_module")], DataError, "no_such_module"),
        ([("def session_workflow", "def another")], ConfigError, "session_workflow"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_name(
    tmp_path: Path, changes: list[tuple[str, str]], error: type[MISSRecError] | None, words: str
) -> None:
    paths, file = (*write(tmp_path), tmp_path / "data"), _edited(tmp_path, *changes)
    if error is None:
        etl(*paths, workflow=file)
    else:
        with pytest.raises(error, match=words):
            etl(*paths, workflow=file)
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workflow": "no.py"}, "no.py"),
        ({"engine": "disk"}, "--engine disk"),
        ({"time_features": "gap", "max_events": 3}, "--time-features, --max-events"),
    ],
)
def test_options_beside_a_workflow_file(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        etl(*write(tmp_path), tmp_path / "data", **{"workflow": WORKFLOWS / "session_features.py", **options})


def test_the_value_of_the_first_event_may_stand_beside_the_lists(tmp_path: Path) -> None:
    first = f'{{**{ALL_LISTS}, "event_type": ["list", "first"]}}'
    file = _edited(tmp_path, (ALL_LISTS, first), (USER, 'output = sessions["user_id", "event_type-first"]'))
    etl(*write(tmp_path), tmp_path / "data", workflow=file)
    frame = pd.read_parquet(tmp_path / "data" / "test" / "part_0.parquet")
    assert dict(zip(frame["user_id"], frame["event_type-first"], strict=True)) == {"ann": 3, "ben": 3}


def test_request_shows_the_rows_of_a_session(raw: Path, tmp_path: Path) -> None:
    etl(raw / "interactions.parquet", raw / "items.parquet", tmp_path / "data")
    ids = pd.read_parquet(raw / "items.parquet")["item_id"].tolist()
    items = f"{ids[4]},no-such-item,{ids[0]}"
    told = json.loads(_run(WORKFLOWS / "request.py", "--data", tmp_path / "data", "--items", items))
    assert told["rows"] == [7, 2, 3]
    stored = json.loads((tmp_path / "data" / "session_transform.json").read_text())
    assert told["transform"] == {**stored, "features": {}}


def test_amazon_reviews_from_raw_files(tmp_path: Path) -> None:
    reviews = _gzip(tmp_path / "reviews.json.gz", REVIEWS_2018)
    files = ["--reviews", reviews, "--metadata", _gzip(tmp_path / "meta.json.gz", META_2018)]
    _run(WORKFLOWS / "amazon_reviews.py", "--edition", 2018, *files, "--k-core", 2, "--out", tmp_path / "out")
    sessions = rows(tmp_path / "out" / "data", "test")
    assert sessions["U1"]["rating"] == [1, 5, 5]
    gaps = np.log1p([0, 100, 100, 0, 10])  # of all five events: U1 at 100, 200, 300, U2 at 50, 60
    expected = (gaps[:3] - gaps.mean()) / gaps.std(ddof=1)
    assert sessions["U1"]["gap"] == pytest.approx(expected.tolist(), rel=1e-5)
    column = {column.name: column for column in event_columns(tmp_path / "out" / "data", "auto", 8)}["gap"]
    assert column.encode([0, 100, 100]) == pytest.approx(expected, rel=1e-5)


def test_movielens_from_an_archive(tmp_path: Path) -> None:
    archive = _archive(tmp_path, "ml-1m")
    _run(WORKFLOWS / "movielens.py", "--archive", archive, "--min-item-count", 0, "--out", tmp_path / "out")
    columns = {column.name: column for column in event_columns(tmp_path / "out" / "data", "auto", 8)}
    assert {name: column.kind for name, column in columns.items()} == dict.fromkeys(
        ["rating", "hour", "weekday"], "categorical"
    )
    assert columns["rating"].encode([0.5, 5, None, 7]).tolist() == [3, 12, 0, 2]


def test_nightly_builds_then_adds_and_stops_at_the_gate(raw: Path, tmp_path: Path) -> None:
    events = pd.read_parquet(raw / "interactions.parquet").sort_values("timestamp", ignore_index=True)
    events[:-20].to_parquet(tmp_path / "first.parquet", index=False)
    events[-20:].to_parquet(tmp_path / "second.parquet", index=False)
    common = ["--data", tmp_path / "data", "--items", raw / "items.parquet", "--report", tmp_path / "report"]
    script = WORKFLOWS / "nightly.py"
    _run(script, *common, "--interactions", tmp_path / "first.parquet")
    told = json.loads(_run(script, *common, "--interactions", tmp_path / "second.parquet"))
    assert told["version"] == 2
    assert told["events"] == len(events)
    (tmp_path / "gate.yaml").write_text("events: {min: 1000000}\n", encoding="utf-8")
    gated = ["--interactions", tmp_path / "second.parquet", "--gate", tmp_path / "gate.yaml"]
    refused = processes.run([script, *common, *gated])
    assert refused.returncode == 3, refused.stderr
