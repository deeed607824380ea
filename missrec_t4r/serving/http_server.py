"""A small HTTP server on the loopback interface: every GET and POST is answered by one function."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from missrec_t4r.errors import MISSRecError, ServingError
from missrec_t4r.serving.triton.ports import LOOPBACK

log = logging.getLogger(__name__)

Response = tuple[int, Mapping[str, str], bytes]
"""Status, headers without the length, and body."""
Respond = Callable[[BaseHTTPRequestHandler], Response]
ServerT = TypeVar("ServerT", bound="HttpServer")


class TooLongError(ServingError):
    """A body beyond the limit; answered with status 413."""


class HttpServer(ThreadingHTTPServer):
    """Server that is bound to a port, and runs while the ``with`` block does.

    An exception of ``respond`` is the answer of the request that caused it: 400 for an error of ours, else 500.

    Parameters
    ----------
    port : int
        0 chooses a free one.
    respond : callable
        Reads a request and returns the response.

    Raises
    ------
    ServingError
        The port is taken, or needs other rights.
    """

    request_queue_size = socket.SOMAXCONN
    """Connections that wait to be accepted; socketserver's 5 drop clients that connect at once."""

    def __init__(self, port: int, respond: Respond) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _respond(self) -> None:
                status, headers, body = _answer(respond, self)
                self.close_connection |= status >= 400  # the body may not have been read
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = _respond  # noqa: N815  # http.server's names

            def log_message(self, *arguments: Any) -> None:
                """Log nothing."""

        try:
            super().__init__((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            found = f"port {port} cannot be used ({error})"
            raise ServingError(found, "a free port", "choose another --port") from error

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{LOOPBACK}:{self.server_address[1]}"

    def __enter__(self: ServerT) -> ServerT:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


def read_body(request: BaseHTTPRequestHandler, longest: int) -> bytes:
    """Return a request's body.

    Raises
    ------
    ServingError
        Its length is missing because it is sent in chunks, or is not a number.
    TooLongError
        It has more than ``longest`` bytes.
    """
    length = request.headers.get("Content-Length") or "0"
    if "Transfer-Encoding" in request.headers or not (length.isascii() and length.isdigit()):
        raise ServingError("a body of unknown length", "a Content-Length, and no chunks")
    if len(length) > len(str(longest)) or int(length) > longest:
        raise TooLongError(f"a body of {length[:20]} bytes", f"at most {longest}")
    return request.rfile.read(int(length))


def _answer(respond: Respond, request: BaseHTTPRequestHandler) -> Response:
    try:
        return respond(request)
    except MISSRecError as error:
        status, message = 413 if isinstance(error, TooLongError) else 400, str(error)
    except Exception as error:
        log.exception("a request was not answered")
        status, message = 500, f"the request cannot be answered ({type(error).__name__})"
    return status, {"Content-Type": "application/json"}, json.dumps({"error": message}).encode()
