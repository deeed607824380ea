"""How long work reports: bars on a terminal, plain lines in a log, nothing when it is called as a library."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a long-running function calls."""

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the elements and show how far it is."""

    def say(self, message: str) -> None:
        """Show one line."""


class Quiet:
    """Shows nothing."""

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:  # noqa: ARG002
        """Yield the elements."""
        return iter(iterable)

    def say(self, message: str) -> None:
        """Keep silent."""


class TerminalProgress:
    """Bars where somebody watches, a line every ten seconds where a log file does.

    Parameters
    ----------
    console : rich.console.Console, optional
        Standard error by default, so that standard output keeps the JSON line alone.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the elements and show a bar, or lines."""
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        return (
            self._bar(iterable, description, total)
            if self.console.is_terminal
            else self._lines(iterable, description, total)
        )

    def say(self, message: str) -> None:
        """Show one line."""
        self.console.print(message, highlight=False)

    def _bar(self, iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichBar(*columns, console=self.console, transient=True) as bar:
            yield from bar.track(iterable, description=description, total=total)

    def _lines(self, iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        last = time.monotonic()
        for done, element in enumerate(iterable):
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(f"{description}: {done}/{total if total is not None else '?'}")
            yield element


quiet: Progress = Quiet()
"""The default of every ``progress`` argument."""
