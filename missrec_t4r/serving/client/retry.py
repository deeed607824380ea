"""When a client asks again: only what failed before it was answered, with growing pauses, never beyond its timeout.

Recommending changes nothing on the server, so asking twice is always safe; what is not worth asking twice is a refusal
(the second answer would be the same) and a timeout (a slow server gets slower by being asked more). What is left is
`UnavailableError`: no connection, a connection that broke, a server that is starting or whose queue is full.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from missrec_t4r.errors import ConfigError, UnavailableError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and after which pauses to ask again.

    Examples
    --------
    >>> list(Retries(attempts=4, first_wait=0.1, jitter=0).waits())
    [0.1, 0.2, 0.4]
    """

    attempts: int = 3
    """Requests at most, the first one included; 1 never asks again."""
    first_wait: float = 0.05
    """Seconds before the second request; every further pause is twice as long."""
    longest_wait: float = 2.0
    """Seconds; no pause is longer."""
    jitter: float = 0.5
    """Share of every pause that is drawn at random, 0 to 1, so that clients do not come back all at once."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait < 0 or self.longest_wait < 0 or not 0 <= self.jitter <= 1:
            raise ConfigError(f"{self}", "at least 1 attempt, pauses of 0 s or more, a jitter from 0 to 1")

    def waits(self) -> Iterator[float]:
        """Yield the pauses between the attempts, in seconds."""
        for attempt in range(self.attempts - 1):
            wait = min(self.first_wait * 2**attempt, self.longest_wait)
            yield wait * (1 - self.jitter * random.random())

    def call(self, ask: Callable[[], T], timeout: float) -> T:
        """Ask, and ask again while the server is not there; the last error is raised.

        Parameters
        ----------
        ask : callable
        timeout : float
            Seconds; no pause begins that would end after them.

        Raises
        ------
        UnavailableError
            The server was not there in any attempt.
        """
        deadline = time.monotonic() + timeout
        for wait in self.waits():
            try:
                return ask()
            except UnavailableError:
                if time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait)
        return ask()

    async def acall(self, ask: Callable[[], Awaitable[T]], timeout: float) -> T:
        """Do what `call` does, without blocking the event loop."""
        deadline = time.monotonic() + timeout
        for wait in self.waits():
            try:
                return await ask()
            except UnavailableError:
                if time.monotonic() + wait > deadline:
                    raise
            await asyncio.sleep(wait)
        return await ask()
