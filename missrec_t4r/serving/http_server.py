"""A small HTTP server on the loopback interface: every GET and POST is answered by one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.triton.ports import LOOPBACK

Respond = Callable[[BaseHTTPRequestHandler], tuple[int, Mapping[str, str], bytes]]
"""Reads a request; returns status, headers without the length, and body."""


def listen(port: int, respond: Respond) -> ThreadingHTTPServer:
    """Return a server that is bound to a port but does not run yet.

    Raises
    ------
    ServingError
        The port is taken, or needs other rights.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _respond(self) -> None:
            status, headers, body = respond(self)
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
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise ServingError(f"port {port} cannot be used ({error})", "a free port", "choose another --port") from error
