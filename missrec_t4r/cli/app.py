"""The commands of ``missrec``: which function each one calls, how its result is printed and how it fails.

A command's module is imported when the command is used: ``missrec --help`` reads the one-line descriptions from the
sources, so that it needs neither torch nor NVTabular.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

import missrec_t4r
from missrec_t4r import commands
from missrec_t4r.cli.answer import summary
from missrec_t4r.cli.options import Option, options_of, plain
from missrec_t4r.errors import ConfigError, DataError, GateError, MISSRecError
from missrec_t4r.io.atomic import is_disk_full, is_in_the_way, is_permission_denied
from missrec_t4r.io.json_files import to_plain
from missrec_t4r.progress import reporting

# Read when torch loads, which commands do later. By default threads spin for milliseconds while they wait for each
# other, and where another process needs their core, training took six times as long and more. GNU's library spins for
# some 20 microseconds, as long as many waits, before it sleeps: half as fast again on idle cores (docs/experiments.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

log = logging.getLogger(__name__)

_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it, also where something was saved."""


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    """As typed, with its group: ``catalogue update``."""
    function: str
    """Name in `missrec_t4r.commands`."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Parameters whose type does not say how they are given."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that the command gives itself; they are not options."""
    about: str = ""
    """One line, where the docstring's first line is not that of this command."""

    def help(self) -> str:
        """Return the first paragraph of the function's docstring, read from the source."""
        module, _, name = commands.HOME[self.function].partition(":")
        file = Path(missrec_t4r.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name and not self.about:
                return plain((ast.get_docstring(node) or "").partition("\n\n")[0])
        return self.about


_RECIPE = {"recipe": Option(text=True), "settings": Option(yaml=True)}

COMMANDS = (  # in the order of the work
    Command("demo", "demo"),
    Command("generate", "generate"),
    Command("etl", "etl", {"interactions": Option(required=False)}),
    Command("features", "features"),
    Command("report", "report"),
    Command("pretrain", "pretrain", _RECIPE, {"reuse": True}),
    Command("train", "train", _RECIPE, {"reuse": True}),
    Command("evaluate", "evaluate"),
    Command("page", "run_page"),
    Command("compare", "compare", {"systems": Option(argument=True), "out": Option(required=True)}),
    Command("export", "export"),
    Command("serve", "serve"),
    Command("recommend", "recommend"),
    Command("playground", "playground"),
    Command("deploy", "deploy"),
    Command("rollback", "rollback"),
    Command("shadow", "shadow"),
    Command("score", "score", {"out": Option(required=True)}),
    Command("similar", "similar"),
    Command("vectors", "vectors"),
    Command(
        "import amazon-2018",
        "import_amazon",
        fixed={"edition": "2018"},
        about="Import a category of the Amazon reviews of 2018, prepared as the published benchmarks do.",
    ),
    Command(
        "import amazon-2023",
        "import_amazon",
        fixed={"edition": "2023"},
        about="Import a category of the Amazon reviews of 2023; items are the parent products.",
    ),
    Command("import movielens", "import_movielens"),
    Command("tune train", "tune_train", _RECIPE),
    Command("tune serving", "tune_serving"),
    Command("catalogue adopt", "adopt"),
    Command("catalogue update", "catalogue_update"),
    Command("catalogue rollback", "catalogue_rollback"),
    Command("bundle verify", "verify"),
    Command("bundle merlin", "merlin"),
)
_GROUPS = {
    "import": "Convert public data sets to interactions.parquet and items.parquet for missrec etl.",
    "catalogue": "Build a catalogue on an existing NVTabular workflow; change the catalogue that is served.",
    "tune": "Search for better settings by measuring them.",
    "bundle": "Verify or convert a serving bundle.",
}
_EXTRA = {
    **dict.fromkeys(("nvtabular", "merlin", "transformers4rec", "dask", "distributed"), "merlin"),
    "transformers": "features",
    "optuna": "tune",
}
"""Package that the base installation lacks -> extra that brings it."""


COMMON = (
    ("json", ("--json",), "End with one line of JSON, as when the output is piped."),
    ("verbose", ("--verbose", "-v"), "Log in detail."),
    ("quiet", ("--quiet", "-q"), "Log warnings only, and draw no progress bars."),
)
"""Options of every command: name, flags, help text."""
_COMMON_PARAMETERS = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, typer.Option(*flags, help=text)]
    )
    for name, flags, text in COMMON
]


class _Commands(TyperGroup):
    """Commands that are imported when they are used."""

    prefix = ""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of this group's commands, and of the groups in it."""
        names = [command.name.removeprefix(self.prefix) for command in COMMANDS if command.name.startswith(self.prefix)]
        return [name for name in names if " " not in name] + super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command and return it with its options."""
        for command in COMMANDS:
            if command.name == self.prefix + cmd_name:
                return _load(command)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command of the arguments; a mistyped one is answered with the nearest."""
        near = difflib.get_close_matches(args[0], names := self.list_commands(ctx), 1)
        if near and args[0] not in names:
            ctx.fail(f"No such command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one line per command without importing any."""
        about = {command.name: command.help() for command in COMMANDS} | _GROUPS
        with formatter.section("Commands"):
            formatter.write_dl([(name, about[self.prefix + name]) for name in self.list_commands(ctx)])


class _Command(TyperCommand):
    """A command that tells what an unquoted pattern looks like, which the shell has replaced by its files."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the arguments of ``args`` that no option takes: none, else the command ends."""
        given = list(args)
        ctx.allow_extra_args = True  # told here
        extra: list[str] = super().parse_args(ctx, args)
        if extra and not ctx.resilient_parsing:
            shown = " ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
            ctx.fail(f"Got unexpected extra arguments ({shown}){_unquoted(given, extra)}")
        return extra


def _unquoted(given: Sequence[str], extra: Sequence[str]) -> str:
    """Return what to do where the arguments without an option are files, as is the value of the option before them."""
    before = given[: given.index(extra[0])]
    option, equals, value = next((word for word in reversed(before) if word.startswith("-")), "").partition("=")
    if not option or not all(map(os.path.isfile, [value if equals else before[-1], *extra])):  # a long text is none
        return ""
    file = Path(extra[0])
    pattern = f"{option} {str(file.with_name(f'*{file.suffix}'))!r}"
    return f", which are files: the shell replaces a pattern by its files. Quote it, such as {pattern}"


def _version(requested: bool) -> None:
    if requested:
        print(f"missrec {missrec_t4r.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    help="Multi-modal sequential recommendation for NVIDIA Merlin: ETL, training, evaluation, Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _about in _GROUPS.items():
    _kind = type(f"_{_name.title()}", (_Commands,), {"prefix": f"{_name} "})
    app.add_typer(typer.Typer(cls=_kind, help=_about, no_args_is_help=True, rich_markup_mode=None), name=_name)


@app.callback()
def _main(
    version: Annotated[  # its callback answers
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def loaded() -> Iterator[tuple[Command, Any]]:
    """Yield every command with its click command, all imported."""
    for command in COMMANDS:
        yield command, _load(command)


def _load(command: Command) -> Any:
    """Return the click command of a function: its parameters as options, its docstring as help."""
    function = _or_exit(lambda: commands.function_of(command.function))
    options = options_of(function, command.options, command.fixed)

    def run(**given: Any) -> None:
        as_json, verbose, quiet = (given.pop(name) for name in ("json", "verbose", "quiet"))
        first = os.environ.get("RANK", "0") == "0"  # under torchrun the first process answers for all

        def call() -> Any:
            return function(**{option.name: option.convert(given[option.name]) for option in options}, **command.fixed)

        with reporting(verbose=verbose, quiet=quiet or not first):
            log.debug("missrec %s %s with %s", missrec_t4r.__version__, command.name, given)
            result = _or_exit(call, lambda refused: _answer(command, refused, as_json))
        if first:
            _answer(command, result, as_json)
        if isinstance(result, Mapping) and result.get("stopped_by") == "interrupt":
            raise typer.Exit(_INTERRUPTED)

    parameters = [option.parameter for option in options] + _COMMON_PARAMETERS
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(command.name.rpartition(" ")[2], cls=_Command, help=command.help())(run)
    return typer.main.get_command(single)


def _answer(command: Command, result: Any, as_json: bool) -> None:
    if as_json or not sys.stdout.isatty():
        print(json.dumps(result, default=to_plain))
    else:
        Console(emoji=False).print(summary(command.name, result))


def _or_exit(call: Callable[[], Any], answer: Callable[[Any], None] | None = None) -> Any:
    """Return a call's result; print an error that the user can cure as a paragraph and exit with its code.

    ``answer`` prints the result of a command whose gate failed.
    """
    try:
        return call()
    except Exception as raised:
        if (error := _curable(raised)) is None:
            raise
        words = f"{type(error).__name__}: {error}"  # not wrapped: a path of the message can be copied
        Console(stderr=True, emoji=False).print(words, style="red", highlight=False, markup=False, soft_wrap=True)
        if isinstance(error, GateError) and error.result and answer:
            answer(error.result)
        raise typer.Exit(error.exit_code) from None


def _curable(error: Exception) -> MISSRecError | None:
    """Return an error of ours, or one that any command may meet in three parts; None for a bug."""
    if isinstance(error, MISSRecError):
        return error
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in _EXTRA:
        cure = f"pip install 'missrec-t4r[{_EXTRA[package]}]'"
        return ConfigError(f"the package {package} is not installed", "it, for this command", cure)
    if is_disk_full(error):
        cure = "free some space or choose another disk, then run the same command again"
        return DataError(f"the disk ran full ({error})", "room for the whole output", cure)
    if is_permission_denied(error):
        return DataError(f"this user may not do that ({error})", "files that this user may use")
    if is_in_the_way(error):
        return DataError(f"a file is where a folder is meant, or a folder for a file ({error})", "another path")
    return None
