"""Ports of this machine's loopback interface: choosing them, and asking whether a server is ready behind one."""

from __future__ import annotations

import http.client
import json
import socket

from missrec_t4r.errors import ServingError

LOOPBACK = "127.0.0.1"


def choose_ports(wanted: dict[str, int]) -> dict[str, int]:
    """Return a port per door: the wanted one if it is free, a free one where 0 is wanted.

    Raises
    ------
    ServingError
        A wanted port is occupied, wanted twice, or not a port.
    """
    sockets: list[socket.socket] = []
    try:
        chosen: dict[str, int] = {}
        for door, port in sorted(wanted.items(), key=lambda pair: pair[1] == 0):
            sockets.append(_bind(door, port))
            chosen[door] = int(sockets[-1].getsockname()[1])
        return chosen
    finally:
        for held in sockets:
            held.close()


def _bind(door: str, port: int) -> socket.socket:
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free, a listening one is not
    try:
        held.bind((LOOPBACK, port))
        held.listen()  # so that the same port wanted twice is noticed
    except (OSError, OverflowError) as error:
        held.close()
        raise ServingError(
            f"{door} port {port} cannot be used ({error})",
            "a free port from 1 to 65535",
            f"choose another --{door}-port, or 0 for any free one",
        ) from error
    return held


def answers_ready(http_port: int, model: str | None = None) -> bool:
    """Return whether the server on this loopback port says that a model, or all of them, are ready."""
    return _get(http_port, f"/v2/models/{model}/ready" if model else "/v2/health/ready") is not None


def shows_metrics(metrics_port: int) -> bool:
    """Return whether the page of metrics is there: Triton opens it last, after it has said that it is ready."""
    return _get(metrics_port, "/metrics") is not None


def name_of(http_port: int) -> str | None:
    """Return the name of the server on this loopback port: whether it is the one that was started."""
    try:
        return str(json.loads(_get(http_port, "/v2") or b"{}").get("name"))
    except ValueError:
        return None


def _get(http_port: int, path: str) -> bytes | None:
    connection = http.client.HTTPConnection(LOOPBACK, http_port, timeout=2.0)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
