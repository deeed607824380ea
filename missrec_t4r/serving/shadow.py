"""`missrec shadow`: a share of the real traffic also asks a candidate; clients get the answers they always got.

An HTTP door in front of the server hands every request through unchanged and, after the client has its answer, sends a
share of the recommendation requests to the candidate: another model of the same server (`missrec deploy --no-switch`
loads one) or another server. The candidate can neither delay nor fail a client: its queue is bounded, and what does not
fit is dropped and counted.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import numpy.typing as npt

from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.serving.doors import checked_address
from missrec_t4r.serving.loopback import LOOPBACK

_QUEUE = 256
_TIMEOUT = 30.0
_HOP = ("connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding")
_LENGTH = "Inference-Header-Content-Length"

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


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

    def add(self, current: dict[str, Any], candidate: dict[str, Any]) -> None:
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


class ShadowDoor:
    """The HTTP door; serves while the ``with`` block runs.

    Parameters
    ----------
    url : str
        HTTP address of the server that answers.
    candidate : str
        Name of the model that is asked in the shadow.
    candidate_url : str, optional
        Its server's HTTP address; the same server by default.
    share : float
        Of the recommendation requests, 0 to 1.
    port : int
        Of the loopback interface; 0 takes a free one.
    model : str
        The model whose requests are mirrored.
    seed : int, optional
        Of the choice of requests.
    """

    def __init__(
        self,
        url: str,
        candidate: str,
        *,
        candidate_url: str | None = None,
        share: float = 0.1,
        port: int = 0,
        model: str = "missrec",
        seed: int | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"--share {share}", "0 to 1")
        self.address = checked_address(url, "http")
        self._shadow = checked_address(candidate_url or url, "http"), f"/v2/models/{candidate}/infer"
        self._mirrored = f"/v2/models/{model}/infer"
        self._share, self._chance = share, random.Random(seed)
        self._queue: queue.Queue[tuple[dict[str, str], bytes, Answer, float] | None] = queue.Queue(_QUEUE)
        self.comparison = Comparison()
        self._server = self._listen(port)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._server.serve_forever, self._work)]

    @property
    def url(self) -> str:
        """The address that clients use in place of the server's."""
        return f"{LOOPBACK}:{self._server.server_address[1]}"

    def __enter__(self) -> ShadowDoor:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._queue.put(None)
        self._threads[1].join(_TIMEOUT)

    def passed_on(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Ask the server, answer, and remember a share of the requests for the candidate."""
        started = time.perf_counter()
        answer = _ask(self.address, method, path, headers, body)
        elapsed = (time.perf_counter() - started) * 1e3
        if path == self._mirrored and answer[0] == 200 and self._chance.random() < self._share:
            try:
                self._queue.put_nowait((headers, body, answer, elapsed))
            except queue.Full:
                self.comparison.dropped += 1
        return answer

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            headers, body, current, elapsed = job
            started = time.perf_counter()
            answer = _ask(self._shadow[0], "POST", self._shadow[1], headers, body)
            took = (time.perf_counter() - started) * 1e3
            if answer[0] != 200:
                self.comparison.failed += 1
                continue
            self.comparison.add(_tensors(current), _tensors(answer))
            self.comparison.current_ms.append(elapsed)
            self.comparison.candidate_ms.append(took)

    def _listen(self, port: int) -> ThreadingHTTPServer:
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _hand_through(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                status, answered, content = door.passed_on(self.command, self.path, headers, body)
                self.send_response(status)
                for name, value in answered.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _hand_through

            def log_message(self, *words: Any) -> None:
                """Say nothing: the server keeps the log."""

        try:
            return ThreadingHTTPServer((LOOPBACK, port), Handler)
        except OSError as error:
            raise ServingError(
                f"port {port} cannot be used ({error})", "a free port", "choose another --port"
            ) from error


def shadow(
    url: str,
    candidate: str,
    *,
    candidate_url: str | None = None,
    share: float = 0.1,
    port: int = 8010,
    seconds: float | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Mirror traffic until Ctrl-C or SIGTERM, or for some seconds.

    Parameters
    ----------
    url, candidate, candidate_url, share, port
        As in `ShadowDoor`.
    seconds : float, optional
        When to end.
    progress : Progress

    Returns
    -------
    dict
        As of `Comparison.report`.
    """
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ShadowDoor(url, candidate, candidate_url=candidate_url, share=share, port=port) as door:
            progress.say(f"send HTTP traffic to {door.url} in place of {url}; {share:.0%} of it also asks {candidate}")
            with contextlib.suppress(KeyboardInterrupt):
                deadline = None if seconds is None else time.monotonic() + seconds
                while deadline is None or time.monotonic() < deadline:
                    time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return door.comparison.report()


def _ask(address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    connection = http.client.HTTPConnection(address, timeout=_TIMEOUT)
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP}
        return response.status, kept, response.read()
    except (OSError, http.client.HTTPException) as error:
        return 502, {"Content-Type": "text/plain"}, f"no answer from {address} ({error})".encode()
    finally:
        connection.close()


def _tensors(answer: Answer) -> dict[str, npt.NDArray[Any]]:
    from tritonclient.http import InferResult

    length = {name.lower(): value for name, value in answer[1].items()}.get(_LENGTH.lower())
    result = InferResult.from_response_body(answer[2], header_length=None if length is None else int(length))
    return {name: result.as_numpy(name) for name in ("item_id", "score", "n_items")}


def _lists(answer: dict[str, Any]) -> list[dict[Any, float]]:
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
