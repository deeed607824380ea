"""Messages and progress bars of long work: silent in a library call, shown by the command line.

A module logs with ``logging.getLogger(__name__)`` and wraps its long loops in `track`. Neither shows anything until
`reporting` is entered, as the command line does: then messages go to standard error, and loops draw bars on a terminal
and log a line every ten seconds elsewhere.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from missrec_t4r.errors import MISSRecError

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
_library, log = logging.getLogger("missrec_t4r"), logging.getLogger(__name__)
_console: list[Console] = []
"""Consoles of the active `reporting` blocks, the innermost last; without one, `track` shows nothing."""
_bars: list[Progress] = []
"""The bar that is being drawn."""


def track(iterable: Iterable[T], description: str, total: int | None = None, *, counted: bool = True) -> Iterator[T]:
    """Yield the elements of a long loop; under `reporting`, show how far it is.

    Parameters
    ----------
    iterable : iterable
        What the loop runs over.
    description : str
        What it does, such as ``encoding texts``.
    total : int, optional
        Number of elements, where the iterable has no length.
    counted : bool
        False: the loop waits, and only its time is shown.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not _console:
        return iter(iterable)
    if _console[-1].is_terminal:
        return _bar(iterable, description, total, _console[-1], counted)
    return _lines(iterable, description, total, counted)


@contextmanager
def reporting(*, messages: bool = True, verbose: bool = False, quiet: bool = False) -> Iterator[None]:
    """Log the package's messages to standard error and show the progress of loops.

    Parameters
    ----------
    messages : bool
        False: progress, warnings and errors only, for notebooks.
    verbose : bool
        Debug messages too, each with its time and module.
    quiet : bool
        Warnings and errors only, and no progress.
    """
    # A path may hold :key:, and rich imports its emoji late: a signal handler that logs must import nothing.
    console = Console(stderr=True, emoji=False)
    handler = _Handler(console)
    handler.setFormatter(_Formatter(verbose))
    level, propagate = _library.level, _library.propagate
    _library.addHandler(handler)
    _library.setLevel(logging.WARNING if quiet or not messages else logging.DEBUG if verbose else logging.INFO)
    _library.propagate = False  # a handler of the root logger would print each message again
    if not quiet:
        _console.append(console)
    try:
        yield
    finally:
        if not quiet:
            _console.remove(console)
        _library.removeHandler(handler)
        _library.setLevel(level)
        _library.propagate = propagate


def run_as_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's ``main`` with messages and progress; exit with its code, or after an error that the user can cure.

    For scripts beside the command line, such as those in `workflows/`.
    """
    try:
        with reporting():
            code = main()
    except MISSRecError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


class _Handler(logging.Handler):
    """Prints above a progress bar that is being drawn."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else None
        whole = not self.console.is_terminal  # in a file a message is one line
        self.console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=whole)


class _Formatter(logging.Formatter):
    """The message alone; from a warning on with its level, in detail with time and module."""

    def __init__(self, verbose: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(message)s")
        self.verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of one record."""
        text = super().format(record)
        plain = self.verbose or record.levelno < logging.WARNING
        return text if plain else f"{record.levelname.lower()}: {text}"


def _bar(iterable: Iterable[T], description: str, total: int | None, console: Console, counted: bool) -> Iterator[T]:
    count = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) if counted else (TimeElapsedColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *count)
    if _bars:  # a terminal draws one at a time; loops inside a drawn loop show nothing
        yield from iterable
        return
    with Progress(*columns, console=console, transient=True) as bar:
        _bars.append(bar)
        try:
            yield from bar.track(iterable, description=description, total=total)
        finally:
            _bars.remove(bar)


def _lines(iterable: Iterable[T], description: str, total: int | None, counted: bool) -> Iterator[T]:
    started = last = time.monotonic()
    for done, element in enumerate(iterable):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            far = position(done, total, now - started) if counted else _duration(now - started)
            log.info("%s: %s", description, far)
        yield element


def position(done: int, total: int | None, seconds: float) -> str:
    """Return how far a loop is, its rate, and the time left.

    >>> position(250, 1000, 10.0)
    '250/1,000 (25 %), 25.0 per second, 30 s left'
    >>> position(3, None, 60.0)
    '3, 20.0 s each'
    """
    rate = done / seconds if seconds > 0 else 0.0
    if rate >= 1:
        speed = f"{rate:,.1f} per second"
    else:
        speed = f"{seconds / done:.1f} s each" if done else "nothing yet"
    if not total:
        return f"{done:,}, {speed}"
    left = f", {_duration((total - done) / rate)} left" if rate > 0 else ""
    return f"{done:,}/{total:,} ({100 * done / total:.0f} %), {speed}{left}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
