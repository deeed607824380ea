"""The application: how a command is registered, how it answers and how it fails; options that commands share."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from missrec_t4r.errors import ConfigError, DataError, GateError, MISSRecError
from missrec_t4r.io.atomic import is_disk_full, is_permission_denied

app = typer.Typer(
    help="Multi-modal sequential recommendation for NVIDIA Merlin: ETL, training, evaluation, Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Read when torch loads, which commands do later. By default threads spin for milliseconds while they wait for each
# other, and where another process needs their core, training took six times as long and more. GNU's library spins for
# some 20 microseconds, as long as many waits, before it sleeps: half as fast again on idle cores (docs/experiments.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Upstream says these at every start, whatever a user does; anything else still shows.
for _words in (
    "The legacy Dask DataFrame implementation",
    "Tensorflow dtype mappings did not load",
    "Initializing an NVTabular Dataset in CPU mode",
):
    warnings.filterwarnings("ignore", message=_words)

F = TypeVar("F", bound=Callable[..., Any])

_EXTRA = {
    **dict.fromkeys(("nvtabular", "merlin", "transformers4rec", "transformers", "pandas", "dask"), "merlin"),
    **dict.fromkeys(("sklearn", "PIL"), "features"),
}
"""Package that the base installation lacks -> extra that brings it."""


def command(function: F) -> F:
    """Register a command that prints its result as JSON and its curable errors as a paragraph."""
    return command_of(app)(function)


def command_of(group: typer.Typer) -> Callable[[F], F]:
    """Return what registers a command in a group, such as ``missrec catalogue``."""
    return functools.partial(_register, group)


def _register(group: typer.Typer, function: F) -> F:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            result = _translate_disk_errors(function, *args, **kwargs)
        except MISSRecError as error:
            Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False)
            if isinstance(error, GateError) and error.result:
                print(json.dumps(error.result, default=_plain))
            raise typer.Exit(error.exit_code) from None
        if os.environ.get("RANK", "0") == "0":  # under torchrun the first process answers for all
            print(json.dumps(result, default=_plain))

    group.command(name=function.__name__.replace("_", "-"))(run)
    return function


def _translate_disk_errors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Say in words what every command may meet: a full disk, and places that are another user's."""
    try:
        return _with_extras_named(function, *args, **kwargs)
    except MISSRecError:
        raise
    except Exception as error:
        if is_disk_full(error):
            cure = "free some space or choose another disk, then run the same command again"
            raise DataError(f"the disk ran full ({error})", "room for the whole output", cure) from error
        if is_permission_denied(error):
            raise DataError(f"this user may not do that ({error})", "files that this user may use") from error
        raise


def _with_extras_named(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        cure = f"pip install 'missrec-t4r[{_EXTRA[package]}]'"
        raise ConfigError(f"the package {package} is not installed", "it, for this command", cure) from error


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


Out = Annotated[Path, typer.Option(help="Folder to write.")]
Data = Annotated[Path, typer.Option(help="Data folder written by `missrec etl`.")]
Run = Annotated[Path, typer.Option(help="Run folder written by `missrec train`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]


def pairs(options: list[str], name: str) -> dict[str, str]:
    """Return the NAME=VALUE options as a mapping."""
    found = dict(option.partition("=")[::2] for option in options)
    for option in options:
        if "=" not in option:
            raise ConfigError(f"{name} {option!r}", f"{name} NAME=VALUE")
    return found


def listed(text: str | None) -> list[str] | None:
    """Return a comma-separated option as a list, None where it is not given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
