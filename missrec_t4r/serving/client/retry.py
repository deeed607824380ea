"""Retries of requests that failed before they were answered: exponential back-off with jitter, within the timeout.

Recommending changes nothing on the server, so a retry is always safe. Not retried are a refusal (the second response
would be the same) and a timeout (retries make a slow server slower). What remains is `UnavailableError`: no connection,
a connection that broke, a server that is starting or whose queue is full.
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
    """Number of attempts and the pauses between them.

    Examples
    --------
    >>> list(Retries(attempts=4, first_wait=0.1, jitter=0).waits())
    [0.1, 0.2, 0.4]
    """

    attempts: int = 3
    """Most requests, including the first one; 1 disables retries."""
    first_wait: float = 0.05
    """Seconds before the second request; every further pause is twice as long."""
    longest_wait: float = 2.0
    """Longest pause in seconds."""
    jitter: float = 0.5
    """Random share of every pause, 0 to 1, so that clients do not retry all at once."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait < 0 or self.longest_wait < 0 or not 0 <= self.jitter <= 1:
            raise ConfigError(f"{self}", "at least 1 attempt, pauses of 0 s or more, a jitter from 0 to 1")

    def waits(self) -> Iterator[float]:
        """Yield the pauses between the attempts, in seconds."""
        for attempt in range(self.attempts - 1):
            wait = min(self.first_wait * 2**attempt, self.longest_wait)
            yield wait * (1 - self.jitter * random.random())

    def call(self, send: Callable[[], T], timeout: float) -> T:
        """Return the result of ``send``, retried while the server is unavailable.

        Parameters
        ----------
        send : callable
            Sends the request once.
        timeout : float
            Seconds; no pause begins that would end later.

        Raises
        ------
        UnavailableError
            Of the last attempt.
        """
        deadline = time.monotonic() + timeout
        for wait in self.waits():
            try:
                return send()
            except UnavailableError:
                if time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait)
        return send()

    async def acall(self, send: Callable[[], Awaitable[T]], timeout: float) -> T:
        """Return the result of ``send`` as `call` does, without blocking the event loop."""
        deadline = time.monotonic() + timeout
        for wait in self.waits():
            try:
                return await send()
            except UnavailableError:
                if time.monotonic() + wait > deadline:
                    raise
            await asyncio.sleep(wait)
        return await send()
