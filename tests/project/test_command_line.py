"""The command line: its options come from the functions, nothing that a user could type is lost, and help is cheap."""

import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import missrec_t4r
from missrec_t4r import commands, progress
from missrec_t4r.cli.answer import summary
from missrec_t4r.cli.app import COMMANDS, app, loaded
from missrec_t4r.cli.options import options_of, parameter_help
from missrec_t4r.commands.in_python import in_python, named_in_python
from missrec_t4r.errors import ConfigError, GateError
from missrec_t4r.progress import reporting, track

BEFORE = json.loads(Path(__file__).with_name("options_before_the_redesign.json").read_text(encoding="utf-8"))
"""Command -> option -> default or REQUIRED, as they were before options were read from signatures."""


DATA_SETS = ("amazon-2018", "amazon-2023", "movielens")
COMMAND_LINE = re.compile(r"missrec ((?:(?:catalogue|bundle|tune|import) )?[a-z0-9-]+)((?:(?!missrec )[^`|#\n])*)")
"""A command in a text or a script, and the rest of its line."""


@pytest.fixture(scope="module")
def options() -> dict[str, list[Any]]:
    pytest.importorskip("nvtabular", reason="the ETL's functions need the extra merlin")
    return {command.name: [*click_command.params] for command, click_command in loaded()}


def test_every_option_of_before_is_still_there_with_its_default(options: dict[str, list[Any]]) -> None:
    assert len(BEFORE) == 26
    lost = []
    for command, before in BEFORE.items():
        now = {flag: option for option in options[command] for flag in [*option.opts, *option.secondary_opts]}
        for flags, default in before.items():
            for flag in flags.split(" / "):
                option = now.get(flag)
                same = option is not None and _default(option) == (None if default == [] or default == "" else default)
                if not same:
                    lost.append((command, flag, default, option and _default(option)))
    assert lost == []


def _default(option: Any) -> Any:
    if option.required:
        return "REQUIRED"
    if option.default is None or option.default in ((), [], ""):
        return None
    return (
        list(option.default)
        if isinstance(option.default, tuple)
        else json.loads(json.dumps(option.default, default=str))
    )


def test_every_option_that_a_page_or_a_script_names_exists(options: dict[str, list[Any]], repository: Path) -> None:
    flags = {
        name: {flag for one in known for flag in [*one.opts, *one.secondary_opts]} for name, known in options.items()
    }
    pages = [repository / name for name in ("README.md", "docker-compose.yml", "triton_models/README.md")]
    pages += [*repository.glob("docs/**/*.md"), *repository.glob("workflows/*.py"), *repository.glob("examples/*.py")]
    named = [
        (page.name, found[1], flag)
        for page in pages
        for found in COMMAND_LINE.finditer(page.read_text(encoding="utf-8").replace("\\\n", " "))
        if found[1] in flags
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", found[2])
    ]
    assert len(named) > 200
    assert [one for one in named if one[2] not in flags[one[1]]] == []


ANY_NUMBER = {("report", "--now"), *(("import " + name, "--min-rating") for name in DATA_SETS)}
"""Options for which every number means something."""


def test_every_option_refuses_numbers_that_mean_nothing(options: dict[str, list[Any]], tmp_path: Path) -> None:
    """Before anything is read: the paths of the required options do not exist."""
    accepted = []
    for command in COMMANDS:
        required = [word for one in options[command.name] if one.required for word in _given(one, tmp_path)]
        for option in options_of(getattr(commands, command.function), command.options, command.fixed):
            flag, annotation = f"--{option.name.replace('_', '-')}", str(option.parameter.annotation)
            if not re.search(r"\b(int|float)\b", annotation) or (command.name, flag) in ANY_NUMBER:
                continue
            for wrong in ["-1", "nan"] if "float" in annotation else ["-1"]:
                done = CliRunner().invoke(app, [*command.name.split(), *required, f"{flag}={wrong}"])
                if done.exit_code != 2 or flag not in done.output or "expected: " not in done.output:
                    accepted.append((command.name, flag, wrong, done.exit_code, done.output[-200:]))
    assert accepted == [], "\n".join(map(str, accepted))
    assert list(tmp_path.iterdir()) == []


def _given(option: Any, folder: Path) -> list[str]:
    value = str(folder / "nowhere")
    return [f"{option.opts[0]}={value}"] if option.opts[0].startswith("-") else [value, value]


def test_every_command_and_option_says_what_it_does(options: dict[str, list[Any]]) -> None:
    assert [command.name for command in COMMANDS if len(command.help()) < 20] == []
    silent = [
        (command, option.opts[0])
        for command, known in options.items()
        for option in known
        if "--help" not in option.opts and len(option.help or "") < 9
    ]
    assert silent == []


def test_a_command_is_the_python_function_of_its_name() -> None:
    from missrec_t4r.runs.evaluate import evaluate

    assert inspect.unwrap(commands.evaluate) is evaluate
    assert {command.function for command in COMMANDS} <= set(dir(commands))
    with pytest.raises(AttributeError, match="commands: adopt"):
        commands.nothing  # noqa: B018


def test_help_and_version_import_neither_torch_nor_merlin() -> None:
    code = (
        "import sys\nfrom missrec_t4r.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'nvtabular', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    for arguments, words in (("--help", "Rank the whole catalogue"), ("--version", missrec_t4r.__version__)):
        done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True)
        assert words in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["typer", "numpy"])
def test_ctrl_c_ends_a_command_in_one_line_from_its_first_import_on(
    package: str, repository: Path, tmp_path: Path
) -> None:
    code = f"""import sys

class Interrupts:
    def find_spec(self, name, *rest):
        if name == {package!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
from missrec_t4r.__main__ import main
main()"""
    command = [sys.executable, "-c", code, "generate", f"--out={tmp_path / 'shop'}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, "interrupted\n", "")
    code = "import sys, missrec_t4r.__main__; print('importlib.metadata' in sys.modules)"  # the slowest import of old
    ended = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=repository)
    assert ended.stdout == "False\n", ended.stderr


def test_help_of_a_group_lists_its_commands() -> None:
    shown = CliRunner().invoke(app, ["catalogue", "--help"]).output
    assert all(name in shown for name in ("adopt", "update", "rollback"))


@pytest.mark.parametrize(
    ("words", "near"), [(["ettl"], "'etl'"), (["catalogue", "updat"], "'update'"), (["xyz"], None)]
)
def test_a_mistyped_command_is_answered_with_the_nearest(words: list[str], near: str | None) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"No such command {words[-1]!r}" in done.output
    assert ("did you mean" in done.output) == (near is not None)
    assert near is None or f"did you mean {near}?" in done.output


def test_an_unquoted_pattern_is_answered_with_quotes(tmp_path: Path) -> None:
    """The shell makes files of it: the first is the option's value, and no option takes the others."""
    (tmp_path / "events").mkdir()
    files = [str(tmp_path / "events" / f"{day}.parquet") for day in range(6)]
    for file in files:
        Path(file).touch()
    for first in (["--interactions", files[0]], [f"--interactions={files[0]}"]):
        done = CliRunner().invoke(app, ["etl", *first, *files[1:], "--items", "items.parquet", "--out", "o"])
        assert done.exit_code == 2
        assert f"({files[1]} {files[2]} {files[3]} and 2 more), which are files: the shell replaces" in done.output
        assert f"Quote it, such as --interactions '{tmp_path / 'events' / '*.parquet'}'" in done.output
    others = ["more", ".", "/", "", "x" * 300, str(tmp_path / "events"), files[0]]  # none came of a pattern
    for other in others:
        done = CliRunner().invoke(app, ["etl", "--items", "items.parquet", "--out", "o", other])
        assert done.exit_code == 2
        assert "which are files" not in done.output
    flag = ["--items", "i", "--out", "o", "--interactions", files[0], "--dry-run"]
    done = CliRunner().invoke(app, ["etl", *flag, files[1]])
    assert f"Got unexpected extra arguments ({files[1]})\n" in done.output


def test_an_option_is_documented_where_it_is_declared() -> None:
    text = "Head.\n\nParameters\n----------\na, b : int, optional\n    One `line`,\n  two.\n\nReturns\n-------\nint"
    assert parameter_help(text) == {"a": "One line, two.", "b": "One line, two."}


def test_a_piped_command_ends_with_json_and_a_terminal_with_a_summary(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "--out", str(tmp_path / "shop"), "--users", "5", "--items", "100"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    lines = _drawn(summary("generate", result))
    assert any("users" in line and "5" in line for line in lines)


def test_a_summary_shows_recommendations_as_a_table() -> None:
    answer = {"recommendations": [{"item_id": "a", "score": 0.25, "title": "Lamp"}], "fallback": False}
    lines = _drawn(summary("recommend", answer))
    assert any("Lamp" in line and "0.25" in line for line in lines)
    assert any("fallback" in line and "no" in line for line in lines)


def test_the_summary_of_a_data_report_shows_the_bounds_of_the_gate() -> None:
    gate = [{"measure": "events", "value": 5, "bounds": {"min": 10}, "passed": False}]
    lines = _drawn(summary("report", {"measures": {"events": 5}, "gate": gate, "passed": False}))
    assert any("events" in line and "10" in line and "violated" in line for line in lines)


def test_the_library_is_silent_until_progress_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    log = logging.getLogger("missrec_t4r.anything")

    def work() -> str:
        log.info("begun in :key:")
        log.warning("odd")
        log.debug("detail")
        assert list(track(range(3), "counting")) == [0, 1, 2]
        assert list(track(range(2), "waiting", counted=False)) == [0, 1]
        return capsys.readouterr().err

    silent = work()
    assert "begun" not in silent
    assert "counting" not in silent
    with reporting():
        shown = work().splitlines()
    assert shown[:2] == ["begun in :key:", "warning: odd"]
    assert shown[3].startswith("counting: 1/3 (33 %), ")
    assert shown[-1] == "waiting: 0 s"
    with reporting(quiet=True):
        assert work() == "warning: odd\n"
    with reporting(verbose=True):
        assert "DEBUG missrec_t4r.anything: detail" in work()
    assert "counting" not in work()
    with reporting():
        log.info("word " * 50 + "end")
    assert capsys.readouterr().err == "word " * 50 + "end\n"  # in a log file a message is one line


def _drawn(content: Any) -> list[str]:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=100)
    console.print(content)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO


def test_every_option_that_an_error_names_is_an_argument_in_python() -> None:
    for command, click_command in loaded():
        function = getattr(commands, command.function)
        options = {option: one.name for one in click_command.params for option in (*one.opts, *one.secondary_opts)}
        for option, name in options.items():
            if option.startswith("--") and name in inspect.signature(function).parameters:
                told = in_python(f"leave {option}, or not", function, {}).replace("`", "")
                assert told.startswith((f"leave {name},", f"leave {name}=")), command.name


def test_errors_name_options_on_the_command_line_and_arguments_in_python(tmp_path: Path) -> None:
    given = {"interactions": "events.parquet", "items": "items.parquet", "out": tmp_path / "data"}
    cases: list[tuple[dict[str, Any], list[str], str, str]] = [
        (
            {"valid_from": "1"},
            ["--valid-from", "1"],
            "set --valid-from and --test-from",
            "set `valid_from` and `test_from`",
        ),
        ({"delta": True}, ["--delta"], "--delta without --update", "delta=True without update=True"),
        (
            {"update": True, "min_item_count": 2, "drop_columns": ["note"], "drop_duplicates": True},
            ["--update", "--min-item-count", "2", "--drop-column", "note", "--drop-duplicates"],
            "--update with --drop-column, --drop-duplicates, --min-item-count; expected: the settings of the first run",
            "update=True with `drop_columns`, drop_duplicates=True, `min_item_count`; expected: the settings of the",
        ),
        (
            {"valid_from": 1, "test_from": 2},
            ["--valid-from", "1", "--test-from", "2"],
            "expected: --split time",
            "expected: split='time'",
        ),
    ]
    line = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    for arguments, options, on_the_command_line, in_a_script in cases:
        assert on_the_command_line in CliRunner().invoke(app, ["etl", *line, *options]).stderr
        with pytest.raises(ConfigError, match=re.escape(in_a_script)):
            commands.etl(**given, **arguments)


def test_an_error_in_python_keeps_command_lines_and_the_result_of_a_gate() -> None:
    def command(*, restart: bool = False, settings: Mapping[str, Any] | None = None) -> None:
        raise GateError("--set train.epochs=3", "`missrec train --restart`", "or run missrec etl --update", {"a": 1})

    with pytest.raises(GateError) as raised:
        named_in_python(command)()
    words = "settings={'train.epochs': '3'}; expected: `missrec train --restart`. or run missrec etl --update."
    assert (str(raised.value), raised.value.result) == (words, {"a": 1})
