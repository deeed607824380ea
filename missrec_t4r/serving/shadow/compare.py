"""A share of real requests also asks a candidate, behind the client's back, and both answers are compared.

The candidate can neither delay nor fail a client: requests wait for it in a bounded queue, and what does not fit is
dropped and counted. The doors that clients use are `shadow` (HTTP) and `shadow_grpc`.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.serving.triton.ports import LOOPBACK

COMPARED = ("item_id", "score", "n_items")
"""Outputs that are compared."""
TIMEOUT = 30.0
"""Seconds that a candidate may take."""
_QUEUE = 256

Tensors = Mapping[str, npt.NDArray[Any]]


class Mirrored(NamedTuple):
    """A request that the candidate shall answer too."""

    current: Callable[[], Tensors]
    """Reads the answer that the client got."""
    candidate: Callable[[], Tensors]
    """Asks the candidate; raises a `ServingError` if it refuses or does not answer."""
    milliseconds: float
    """What the client waited."""


@dataclass
class Comparison:
    """What the mirrored requests showed, so far."""

    overlap: list[float] = field(default_factory=list)
    """Per session: the share of the items that both answers hold."""
    same_first: list[bool] = field(default_factory=list)
    """Per session: whether the best item is the same."""
    score_differences: list[float] = field(default_factory=list)
    """Per session: mean absolute difference of the scores of the items that both hold."""
    current_ms: list[float] = field(default_factory=list)
    candidate_ms: list[float] = field(default_factory=list)
    failed: int = 0
    """Mirrored requests that the candidate refused or did not answer."""
    dropped: int = 0
    """Requests that were not mirrored because the candidate fell behind."""

    def add(self, current: Tensors, candidate: Tensors) -> None:
        """Compare two answers to one request, session by session."""
        for ours, theirs in zip(_lists(current), _lists(candidate), strict=True):
            shared = ours.keys() & theirs.keys()
            longest = max(len(ours), len(theirs))
            self.overlap.append(len(shared) / longest if longest else 1.0)
            self.same_first.append(next(iter(ours), None) == next(iter(theirs), None))
            if shared:
                self.score_differences.append(sum(abs(ours[item] - theirs[item]) for item in shared) / len(shared))

    def report(self) -> dict[str, Any]:
        """Return the figures as one mapping."""
        return {
            "mirrored_sessions": len(self.overlap),
            "overlap_at_k": _mean(self.overlap),
            "same_first_item": _mean(self.same_first),
            "mean_abs_score_difference": _mean(self.score_differences),
            "max_abs_score_difference": round(max(self.score_differences, default=0.0), 6),
            "current_ms": _percentiles(self.current_ms),
            "candidate_ms": _percentiles(self.candidate_ms),
            "failed": self.failed,
            "dropped": self.dropped,
        }


class Mirror:
    """Asks the candidate in a thread of its own while the ``with`` block runs.

    Parameters
    ----------
    share : float
        Of the requests, 0 to 1.
    seed : int, optional
        Of the choice of requests.
    """

    def __init__(self, share: float, seed: int | None = None) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"--share {share}", "0 to 1")
        self._share, self._chance = share, random.Random(seed)
        self._queue: queue.Queue[Mirrored | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.comparison = Comparison()

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        self._thread.join(TIMEOUT)

    def offer(self, job: Mirrored) -> None:
        """Mirror an answered request, if chance wants it."""
        if self._chance.random() >= self._share:
            return
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self.comparison.dropped += 1

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            started = time.perf_counter()
            try:
                answer = job.candidate()
            except ServingError:
                self.comparison.failed += 1
                continue
            took = (time.perf_counter() - started) * 1e3
            self.comparison.add(job.current(), answer)
            self.comparison.current_ms.append(job.milliseconds)
            self.comparison.candidate_ms.append(took)


def _lists(answer: Tensors) -> list[dict[Any, float]]:
    return [
        {_text(item): float(score) for item, score in zip(items[:n], scores[:n], strict=True)}
        for items, scores, n in zip(answer["item_id"], answer["score"], answer["n_items"][:, 0], strict=True)
    ]


def _text(item: Any) -> Any:
    return item.decode() if isinstance(item, bytes) else item


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 6) if values else 0.0


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 95, 99)} if values else {}


class MirroringProxy:
    """What the doors of both protocols have in common: a mirror behind them, and an address for clients.

    Parameters
    ----------
    share, seed
        As in `Mirror`.
    """

    _port: int
    """Of the loopback interface; a door sets it once it listens."""

    def __init__(self, share: float, seed: int | None) -> None:
        self._mirror = Mirror(share, seed)

    @property
    def comparison(self) -> Comparison:
        """What was seen so far."""
        return self._mirror.comparison

    @property
    def url(self) -> str:
        """The address that clients use in place of the server's."""
        return f"{LOOPBACK}:{self._port}"
