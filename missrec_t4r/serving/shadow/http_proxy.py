"""`missrec shadow`: mirror a share of the traffic to a candidate; the clients' responses do not change.

An HTTP proxy forwards every request to the server unchanged. After the client has its response, a share of the
recommendation requests is sent to the candidate too: another model of the same server (`missrec deploy --no-switch`
loads one), or of another server.
"""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

from missrec_t4r.config.checks import require_at_least, require_choices, require_positive
from missrec_t4r.errors import ServingError, UnavailableError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.retry import Retries
from missrec_t4r.serving.http_server import HttpServer, Response, read_body
from missrec_t4r.serving.shadow.compare import COMPARED, TIMEOUT, ShadowProxy, Tensors
from missrec_t4r.serving.stop_signals import UntilStopped
from missrec_t4r.serving.triton.repository import ENSEMBLE

log = logging.getLogger(__name__)

PORTS = {"http": 8000, "grpc": 8001}
"""Triton's default port by protocol."""
_LONGEST_BODY = 1 << 26
"""Bytes of a request; the limit of current Triton releases, too."""
_HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "host", "content-length", "accept-encoding")
"""Headers of one connection, which a proxy must not forward."""
_BINARY_LENGTH = "inference-header-content-length"
"""Triton's header with the length of the JSON part before the binary tensors."""

Request = tuple[dict[str, str], bytes]
"""Headers and body."""


class HttpShadowProxy(ShadowProxy[Request, Response]):
    """HTTP proxy; parameters as for `ShadowProxy`."""

    protocol = "http"

    def _listen(self, port: int) -> str:
        self._server = HttpServer(port, self._respond)
        return self._server.address

    def __enter__(self) -> HttpShadowProxy:
        self._server.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__()
        super().__exit__()

    def _respond(self, request: BaseHTTPRequestHandler) -> Response:
        """Return the server's response, and pass a recommendation request to the mirror."""
        headers, body = _end_to_end(request.headers.items()), read_body(request, _LONGEST_BODY)
        started = time.perf_counter()
        response = _send(self.address, request.command, request.path, headers, body)
        milliseconds = (time.perf_counter() - started) * 1e3
        if request.path == _path_of(ENSEMBLE) and response[0] == 200:
            self.sample((headers, body), response, milliseconds)
        return response

    def _ask_candidate(self, request: Request) -> Response:
        response = _send(self.candidate_address, "POST", _path_of(self.candidate), *request)
        if response[0] != 200:
            raise ServingError(f"the candidate answered {response[0]}")
        return response

    def _tensors(self, response: Response) -> Tensors:
        from tritonclient.http import InferResult

        _, headers, body = response
        length = {name.lower(): value for name, value in headers.items()}.get(_BINARY_LENGTH)
        result = InferResult.from_response_body(body, header_length=None if length is None else int(length))
        return {name: result.as_numpy(name) for name in COMPARED}


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

    Raises
    ------
    ServingError
        A server answers, and has no such model. One that does not answer is warned of: it may start later.
    """
    require_choices(protocol=(protocol, PORTS))
    require_at_least(0, port=port)
    require_positive(seconds=seconds)
    from missrec_t4r.serving.shadow.grpc_proxy import GrpcShadowProxy

    kind = HttpShadowProxy if protocol == "http" else GrpcShadowProxy
    url = url or f"localhost:{PORTS[protocol]}"
    _require_model(ENSEMBLE, url, protocol, "")
    _require_model(candidate, candidate_url or url, protocol, "load one with `missrec deploy --no-switch`")
    with kind(url, candidate, candidate_url=candidate_url, share=share, port=port) as proxy, UntilStopped():
        log.info(f"send {protocol} traffic to {proxy.url} in place of {url}; {share:.0%} is mirrored to {candidate}")
        deadline = None if seconds is None else time.monotonic() + seconds
        while deadline is None or time.monotonic() < deadline:
            time.sleep(0.2)
    report = proxy.comparison.report()
    if not report["mirrored_sessions"]:
        counts = f"of the mirrored requests {report['failed']} failed and {report['dropped']} were dropped"
        log.warning(f"nothing was compared: {counts}")
    return report


def _require_model(model: str, url: str, protocol: str, cure: str) -> None:
    """Refuse a model that the server does not have; warn of a server that does not answer."""
    try:
        with MISSRecClient(url, protocol, model=model, timeout=TIMEOUT, retries=Retries(attempts=1)) as client:
            _ = client.description
    except UnavailableError as error:
        log.warning(str(error))
    except ServingError as error:
        raise ServingError(error.found, error.expected, cure or error.cure) from error


def _path_of(model: str) -> str:
    return f"/v2/models/{model}/infer"


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
