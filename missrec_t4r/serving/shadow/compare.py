"""Mirror a share of real requests to a candidate model and compare its responses with those of the current one.

The candidate can neither delay nor fail a client: mirrored requests wait in a bounded queue, and those that do not fit
are dropped and counted. Clients connect to `http_proxy` or `grpc_proxy`.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from missrec_t4r.arrays import AnyArray
from missrec_t4r.errors import ConfigError
from missrec_t4r.serving.client.transports import checked_address

log = logging.getLogger(__name__)

COMPARED = ("item_id", "score", "n_items")
"""Names of the compared outputs."""
TIMEOUT = 30.0
"""Seconds until a request to the candidate fails."""
_QUEUE_SIZE = 256

Tensors = Mapping[str, AnyArray]
RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
"""A protocol's requests and responses."""


@dataclass
class Comparison:
    """Differences between the two models over all mirrored requests so far."""

    overlap: list[float] = field(default_factory=list)
    """Per session: share of the items that both responses contain."""
    same_first: list[bool] = field(default_factory=list)
    """Per session: whether the best item is the same."""
    score_differences: list[float] = field(default_factory=list)
    """Per session: mean absolute difference of the scores of the shared items."""
    current_ms: list[float] = field(default_factory=list)
    candidate_ms: list[float] = field(default_factory=list)
    failed: int = 0
    """Mirrored requests that the candidate refused or did not answer, or answered in another form."""
    dropped: int = 0
    """Requests that were not mirrored because the queue was full."""

    def add(self, current: Tensors, candidate: Tensors) -> None:
        """Compare two responses to one request, session by session."""
        for scores, candidate_scores in zip(_scores_by_item(current), _scores_by_item(candidate), strict=True):
            shared = scores.keys() & candidate_scores.keys()
            longest = max(len(scores), len(candidate_scores))
            self.overlap.append(len(shared) / longest if longest else 1.0)
            self.same_first.append(next(iter(scores), None) == next(iter(candidate_scores), None))
            if shared:
                differences = [abs(scores[item] - candidate_scores[item]) for item in shared]
                self.score_differences.append(sum(differences) / len(shared))

    def report(self) -> dict[str, Any]:
        """Return means, maxima and percentiles as one mapping; None where nothing was compared."""
        return {
            "mirrored_sessions": len(self.overlap),
            "overlap_at_k": _mean(self.overlap),
            "same_first_item": _mean(self.same_first),
            "mean_abs_score_difference": _mean(self.score_differences),
            "max_abs_score_difference": round(max(self.score_differences), 6) if self.score_differences else None,
            "current_ms": _percentiles(self.current_ms),
            "candidate_ms": _percentiles(self.candidate_ms),
            "failed": self.failed,
            "dropped": self.dropped,
        }


class ShadowProxy(Generic[RequestT, ResponseT]):
    """Base of the proxies of both protocols; forwards and mirrors requests while the ``with`` block runs.

    Parameters
    ----------
    url : str
        Address of the server that answers the clients.
    candidate : str
        Name of the model that gets the mirrored requests, in a thread of their own.
    candidate_url : str, optional
        Address of the candidate's server; the same server by default.
    share : float
        Share of the recommendation requests that is mirrored, 0 to 1.
    port : int
        Port of the loopback interface; 0 chooses a free one.
    seed : int, optional
        Seed of the sampling.
    """

    protocol = ""
    """Of clients, server and candidate: http or grpc."""
    url: str
    """Address that clients use in place of the server's."""

    def __init__(
        self,
        url: str,
        candidate: str,
        *,
        candidate_url: str | None = None,
        share: float = 0.1,
        port: int = 0,
        seed: int | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"--share {share}", "0 to 1")
        self._share, self._rng = share, random.Random(seed)
        self._queue: queue.Queue[tuple[RequestT, ResponseT, float] | None] = queue.Queue(_QUEUE_SIZE)
        self._mirroring = threading.Thread(target=self._mirror, daemon=True)
        self.comparison = Comparison()
        """Differences over all mirrored requests so far."""
        self.candidate = candidate
        self.address = checked_address(url, self.protocol)
        self.candidate_address = checked_address(candidate_url or url, self.protocol)
        self.url = self._listen(port)

    def _listen(self, port: int) -> str:
        """Bind a port for clients and return its address; `ServingError` if it cannot be used."""
        raise NotImplementedError

    def _ask_candidate(self, request: RequestT) -> ResponseT:
        """Return the candidate's response to a mirrored request; raise if it refuses or does not answer."""
        raise NotImplementedError

    def _tensors(self, response: ResponseT) -> Tensors:
        """Return the compared outputs of a response."""
        raise NotImplementedError

    def __enter__(self) -> ShadowProxy[RequestT, ResponseT]:
        self._mirroring.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        self._mirroring.join(TIMEOUT)

    def sample(self, request: RequestT, response: ResponseT, milliseconds: float) -> None:
        """Queue a request, the client's response and its latency with the probability ``share``."""
        if self._rng.random() >= self._share:
            return
        try:
            self._queue.put_nowait((request, response, milliseconds))
        except queue.Full:
            self.comparison.dropped += 1

    def _mirror(self) -> None:
        while (mirrored := self._queue.get()) is not None:
            request, response, current_ms = mirrored
            started = time.perf_counter()
            try:
                candidate_response = self._ask_candidate(request)
                candidate_ms = (time.perf_counter() - started) * 1e3
                self.comparison.add(self._tensors(response), self._tensors(candidate_response))
            except Exception as error:  # whatever the candidate answers, the next request is compared
                if not self.comparison.failed:
                    log.warning(f"the first failure of the candidate: {error}")
                self.comparison.failed += 1
                continue
            self.comparison.current_ms.append(current_ms)
            self.comparison.candidate_ms.append(candidate_ms)


def _scores_by_item(response: Tensors) -> list[dict[Any, float]]:
    """Return the scores by raw item id of every session, best first."""
    return [
        {_text(item): float(score) for item, score in zip(items[:n], scores[:n], strict=True)}
        for items, scores, n in zip(response["item_id"], response["score"], response["n_items"][:, 0], strict=True)
    ]


def _text(item: Any) -> Any:
    return item.decode() if isinstance(item, bytes) else item


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 6) if values else None


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 95, 99)} if values else {}
