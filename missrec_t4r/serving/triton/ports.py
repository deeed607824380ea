"""Ports of the loopback interface: choose free ones, and check whether a Triton server behind one is ready."""

from __future__ import annotations

import http.client
import json
import socket

from missrec_t4r.errors import ServingError

LOOPBACK = "127.0.0.1"
_SECONDS = 2.0


def choose_ports(requested: dict[str, int]) -> dict[str, int]:
    """Return a port per endpoint: the requested one if it is free, any free one where 0 is requested.

    Parameters
    ----------
    requested : dict of str to int
        Port by endpoint: ``http``, ``grpc``, ``metrics``.

    Raises
    ------
    ServingError
        A requested port is occupied, requested twice, or no port number.
    """
    sockets: list[socket.socket] = []
    try:
        ports: dict[str, int] = {}
        for endpoint, port in sorted(requested.items(), key=lambda pair: pair[1] == 0):  # fixed ports first
            sockets.append(_bind(endpoint, port))
            ports[endpoint] = int(sockets[-1].getsockname()[1])
        return ports
    finally:
        for bound in sockets:
            bound.close()


def _bind(endpoint: str, port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port))  # it listens, so that a port requested twice is noticed
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"{endpoint} port {port} cannot be used ({error})",
            "a free port from 1 to 65535",
            f"choose another --{endpoint}-port, or 0 for any free one",
        ) from error


def grpc_server_name(grpc_port: int, model: str | None = None) -> str | None:
    """Return the name of the server on this loopback port, None until it is ready, or the model if one is named."""
    import tritonclient.grpc as grpc

    with socket.socket() as probe:  # a channel that meets no listener would pause before it tries again
        if probe.connect_ex((LOOPBACK, grpc_port)):
            return None
    client = grpc.InferenceServerClient(f"{LOOPBACK}:{grpc_port}", channel_args=[("grpc.enable_http_proxy", 0)])
    try:
        ready = (
            client.is_model_ready(model, client_timeout=_SECONDS)
            if model
            else client.is_server_ready(client_timeout=_SECONDS)
        )
        return str(client.get_server_metadata(client_timeout=_SECONDS).name) if ready else None
    except grpc.InferenceServerException:
        return None
    finally:
        client.close()


def has_metrics(metrics_port: int) -> bool:
    """Return whether the metrics endpoint responds: Triton opens it last, after it has reported that it is ready."""
    return _get(metrics_port, "/metrics") is not None


def server_name(http_port: int) -> str | None:
    """Return the name of the server on this loopback port, to recognise the one that was started."""
    try:
        return str(json.loads(_get(http_port, "/v2") or b"{}").get("name"))
    except ValueError:
        return None


def _get(port: int, path: str) -> bytes | None:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
