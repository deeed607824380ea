"""`missrec shadow`: a share of the real traffic also asks a candidate; clients get the answers they always got.

An HTTP door in front of the server hands every request through unchanged and, after the client has its answer, sends a
share of the recommendation requests to the candidate: another model of the same server (`missrec deploy --no-switch`
loads one) or another server (`mirror`).
"""

from __future__ import annotations

import contextlib
import http.client
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.serving.client.transports import checked_address
from missrec_t4r.serving.shadow.compare import COMPARED, TIMEOUT, Mirrored, MirroringProxy, Tensors
from missrec_t4r.serving.triton.ports import LOOPBACK

PORTS = {"http": 8000, "grpc": 8001}
"""Of a server, by protocol."""
_HOP = ("connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding")
_LENGTH = "Inference-Header-Content-Length"

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class HttpShadowProxy(MirroringProxy):
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
        super().__init__(share, seed)
        self.address = checked_address(url, "http")
        self._shadow = checked_address(candidate_url or url, "http"), f"/v2/models/{candidate}/infer"
        self._mirrored = f"/v2/models/{model}/infer"
        self._server = self._listen(port)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HttpShadowProxy:
        self._mirror.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._mirror.__exit__()

    def passed_on(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Ask the server, answer, and remember a share of the requests for the candidate."""
        started = time.perf_counter()
        answer = _ask(self.address, method, path, headers, body)
        elapsed = (time.perf_counter() - started) * 1e3
        if path == self._mirrored and answer[0] == 200:
            self._mirror.offer(Mirrored(lambda: _tensors(answer), lambda: self._candidate(headers, body), elapsed))
        return answer

    def _candidate(self, headers: dict[str, str], body: bytes) -> Tensors:
        answer = _ask(self._shadow[0], "POST", self._shadow[1], headers, body)
        if answer[0] != 200:
            raise ServingError(f"the candidate answered {answer[0]}")
        return _tensors(answer)

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
    candidate: str,
    *,
    url: str | None = None,
    candidate_url: str | None = None,
    share: float = 0.1,
    port: int = 8010,
    protocol: Literal["http", "grpc"] = "http",
    seconds: float | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Mirror a share of the traffic to a candidate model and compare its answers: overlap@k, scores, latency.

    Parameters
    ----------
    candidate : str
        Model that answers the mirrored requests, such as missrec_v4.
    url : str, optional
        Address of the server that answers the clients; by default the protocol's port on this machine.
    candidate_url : str, optional
        Address of the candidate's server, if it is another one.
    share : float
        Share of the requests that is mirrored, from 0 to 1.
    port : int
        Port of the proxy, to which clients send their requests meanwhile; 0 takes a free one.
    protocol : {"http", "grpc"}
        Protocol of clients, server and candidate.
    seconds : float, optional
        When to end; by default at Ctrl-C or SIGTERM.

    Returns
    -------
    dict
        As of `Comparison.report`.
    """
    if protocol not in PORTS:
        raise ConfigError(f"--protocol {protocol!r}", " or ".join(PORTS))
    from missrec_t4r.serving.shadow.grpc_proxy import GrpcShadowProxy

    kind = HttpShadowProxy if protocol == "http" else GrpcShadowProxy
    url = url or f"localhost:{PORTS[protocol]}"
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with kind(url, candidate, candidate_url=candidate_url, share=share, port=port) as door:
            words = f"send {protocol} traffic to {door.url} in place of {url}; {share:.0%} of it also asks {candidate}"
            progress.say(words)
            with contextlib.suppress(KeyboardInterrupt):
                deadline = None if seconds is None else time.monotonic() + seconds
                while deadline is None or time.monotonic() < deadline:
                    time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return door.comparison.report()


def _ask(address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP}
        return response.status, kept, response.read()
    except (OSError, http.client.HTTPException) as error:
        return 502, {"Content-Type": "text/plain"}, f"no answer from {address} ({error})".encode()
    finally:
        connection.close()


def _tensors(answer: Answer) -> Tensors:
    from tritonclient.http import InferResult

    length = {name.lower(): value for name, value in answer[1].items()}.get(_LENGTH.lower())
    result = InferResult.from_response_body(answer[2], header_length=None if length is None else int(length))
    return {name: result.as_numpy(name) for name in COMPARED}
