"""`missrec shadow`: mirror a share of the traffic to a candidate; the clients' responses do not change.

An HTTP proxy forwards every request to the server unchanged. After the client has its response, a share of the
recommendation requests is sent to the candidate too: another model of the same server (`missrec deploy --no-switch`
loads one), or of another server.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import signal
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.serving.client.transports import checked_address
from missrec_t4r.serving.http_server import listen, read_body
from missrec_t4r.serving.shadow.compare import COMPARED, TIMEOUT, MirroredRequest, MirroringProxy, Tensors

log = logging.getLogger(__name__)

PORTS = {"http": 8000, "grpc": 8001}
"""Triton's default port by protocol."""
_LONGEST_BODY = 1 << 26
"""Bytes of a request; the limit of current Triton releases, too."""
_HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding")
"""Headers of one connection, which a proxy must not forward."""
_BINARY_LENGTH = "inference-header-content-length"
"""Triton's header with the length of the JSON part before the binary tensors."""

Response = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class HttpShadowProxy(MirroringProxy):
    """HTTP proxy; runs while the ``with`` block does.

    Parameters
    ----------
    url : str
        HTTP address of the server that answers the clients.
    candidate : str
        Name of the model that gets the mirrored requests.
    candidate_url : str, optional
        HTTP address of the candidate's server; the same server by default.
    share : float
        Share of the recommendation requests that is mirrored, 0 to 1.
    port : int
        Port of the loopback interface; 0 chooses a free one.
    model : str
        Name of the model whose requests are mirrored.
    seed : int, optional
        Seed of the sampling.
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
        self._candidate_address = checked_address(candidate_url or url, "http")
        self._candidate_path, self._mirrored_path = (f"/v2/models/{name}/infer" for name in (candidate, model))
        self._server = listen(port, self._respond)
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

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Response:
        """Return the server's response, and pass a recommendation request to the mirror."""
        started = time.perf_counter()
        response = _send(self.address, method, path, headers, body)
        milliseconds = (time.perf_counter() - started) * 1e3
        if path == self._mirrored_path and response[0] == 200:
            self._mirror.sample(
                MirroredRequest(lambda: _tensors(response), lambda: self._infer_candidate(headers, body), milliseconds)
            )
        return response

    def _infer_candidate(self, headers: dict[str, str], body: bytes) -> Tensors:
        response = _send(self._candidate_address, "POST", self._candidate_path, headers, body)
        if response[0] != 200:
            raise ServingError(f"the candidate answered {response[0]}")
        return _tensors(response)

    def _respond(self, request: BaseHTTPRequestHandler) -> Response:
        body = read_body(request, _LONGEST_BODY)
        return self.forward(request.command, request.path, _end_to_end(request.headers.items()), body)


def shadow(
    candidate: str,
    *,
    url: str | None = None,
    candidate_url: str | None = None,
    share: float = 0.1,
    port: int = 8010,
    protocol: Literal["http", "grpc"] = "http",
    seconds: float | None = None,
) -> dict[str, Any]:
    """Mirror a share of the traffic to a candidate model and compare its responses: overlap@k, scores, latency.

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
        Seconds until the proxy ends; by default it runs until Ctrl-C or SIGTERM.

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
        with kind(url, candidate, candidate_url=candidate_url, share=share, port=port) as proxy:
            log.info(
                f"send {protocol} traffic to {proxy.url} in place of {url}; {share:.0%} is mirrored to {candidate}"
            )
            with contextlib.suppress(KeyboardInterrupt):
                deadline = None if seconds is None else time.monotonic() + seconds
                while deadline is None or time.monotonic() < deadline:
                    time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return proxy.comparison.report()


def _end_to_end(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _HOP_HEADERS}


def _send(address: str, method: str, path: str, headers: dict[str, str], body: bytes) -> Response:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        return response.status, _end_to_end(response.getheaders()), response.read()
    except (OSError, http.client.HTTPException) as error:
        return 502, {"Content-Type": "text/plain"}, f"no answer from {address} ({error})".encode()
    finally:
        connection.close()


def _tensors(response: Response) -> Tensors:
    from tritonclient.http import InferResult

    _, headers, body = response
    length = {name.lower(): value for name, value in headers.items()}.get(_BINARY_LENGTH)
    result = InferResult.from_response_body(body, header_length=None if length is None else int(length))
    return {name: result.as_numpy(name) for name in COMPARED}
