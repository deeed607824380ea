"""The two protocols of Triton behind one small interface: named arrays in, named arrays out, errors in our words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from missrec_t4r.errors import ServingError, UnavailableError

Arrays = Mapping[str, npt.NDArray[Any]]

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_NO_LIMIT = int(np.iinfo(np.int32).max)
_RECONNECT_MS = {"initial": 50, "min": 50, "max": 2000}
"""Pauses of the gRPC channel before it connects again: ours are short, so a channel must not sleep through them."""
_FOR_NOW = ("not ready", "no available versions", "maximum queue size")
"""Words of Triton's answers while a model is being loaded, or has more requests than it can queue."""


class Transport(Protocol):
    """One connection to a server."""

    def describe(self, model: str) -> tuple[dict[str, str], int]:
        """Return the data type of every input, and the largest batch that one request may hold."""

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Ask the model."""

    def close(self) -> None:
        """Close the connection."""


class GrpcTransport:
    """gRPC; may be shared by threads."""

    def __init__(self, url: str, timeout: float) -> None:
        import tritonclient.grpc as grpc

        self._library, self._timeout = grpc, timeout
        self._client = grpc.InferenceServerClient(url, channel_args=channel_arguments(url))

    def describe(self, model: str) -> tuple[dict[str, str], int]:
        """Return the data type of every input, and the largest batch that one request may hold."""
        metadata = self._client.get_model_metadata(model, client_timeout=self._timeout)
        config = self._client.get_model_config(model, client_timeout=self._timeout).config
        return {tensor.name: tensor.datatype for tensor in metadata.inputs}, int(config.max_batch_size)

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Ask the model."""
        result = self._client.infer(model, tensors(self._library, inputs), client_timeout=self._timeout)
        return {name: result.as_numpy(name) for name in outputs}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class HttpTransport:
    """HTTP with binary tensors; one per thread."""

    def __init__(self, url: str, timeout: float) -> None:
        import tritonclient.http as http

        self._library = http
        self._client = http.InferenceServerClient(url, connection_timeout=timeout, network_timeout=timeout)

    def describe(self, model: str) -> tuple[dict[str, str], int]:
        """Return the data type of every input, and the largest batch that one request may hold."""
        metadata, config = self._client.get_model_metadata(model), self._client.get_model_config(model)
        return {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]}, int(
            config.get("max_batch_size", 0)
        )

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Ask the model."""
        result = self._client.infer(model, tensors(self._library, inputs))
        return {name: result.as_numpy(name) for name in outputs}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def open_transport(url: str, protocol: str, timeout: float) -> Transport:
    """Connect lazily: an unreachable server is noticed at the first request.

    Raises
    ------
    ServingError
        Unknown protocol, or an address that is not ``host:port``.
    """
    doors: dict[str, type[GrpcTransport] | type[HttpTransport]] = {"grpc": GrpcTransport, "http": HttpTransport}
    address = checked_address(url, protocol)
    return doors[protocol](address, timeout)


def checked_address(url: str, protocol: str) -> str:
    """Return ``host:port``.

    Raises
    ------
    ServingError
        Unknown protocol, or an address that is not ``host:port``.
    """
    if protocol not in ("grpc", "http"):
        raise ServingError(
            f"protocol {protocol!r}", "grpc or http", "use --protocol grpc with port 8001, http with 8000"
        )
    address = url.removeprefix(f"{protocol}://").rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        raise ServingError(
            f"address {url!r}", "host:port", "for example localhost:8001 for gRPC, localhost:8000 for HTTP"
        )
    return address


def channel_arguments(url: str) -> list[tuple[str, int]]:
    """Return the settings of a gRPC channel: no size limit, no proxy to this machine itself, quick to reconnect."""
    limits = [("grpc.max_send_message_length", _NO_LIMIT), ("grpc.max_receive_message_length", _NO_LIMIT)]
    local = url.rpartition(":")[0] in _LOOPBACK_HOSTS
    proxy = [("grpc.enable_http_proxy", 0)] if local else []
    return limits + proxy + [(f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in _RECONNECT_MS.items()]


@contextmanager
def translate_errors(url: str, model: str, timeout: float) -> Iterator[None]:
    """Turn what the client libraries raise into a `ServingError` that says what to do.

    Raises
    ------
    UnavailableError
        Nobody answered, or not yet: worth asking again.
    ServingError
        Anything else: too slow, no such model, or the request is refused.
    """
    try:
        yield
    except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
        raise _too_slow(url, timeout) from error
    except (OSError, EOFError) as error:
        raise _unreachable(url, error) from error
    except InferenceServerException as error:
        raise _refusal(url, model, timeout, str(error.status() or ""), str(error.message() or error)) from error


def _refusal(url: str, model: str, timeout: float, status: str, message: str) -> ServingError:
    if "DEADLINE_EXCEEDED" in status:
        return _too_slow(url, timeout)
    if any(words in message for words in ("unknown model", "not found", *_FOR_NOW)):
        kind = UnavailableError if any(words in message for words in _FOR_NOW) else ServingError
        return kind(
            f"model {model!r} is not ready on {url} ({message})",
            "a server with a repository of `missrec export --triton`",
            "wait until it is ready, or check its log",
        )
    if "StatusCode.UNAVAILABLE" in status:
        return _unreachable(url, message)
    return ServingError(f"the server at {url} refused the request: {message}")


def _unreachable(url: str, reason: object) -> UnavailableError:
    return UnavailableError(
        f"no answer from {url} ({reason})",
        "a running Triton server",
        "start one with `missrec serve` or docker compose, and mind that gRPC and HTTP have different ports",
    )


def _too_slow(url: str, timeout: float) -> ServingError:
    return ServingError(
        f"no answer from {url} within {timeout:g} s", "an answer in time", "raise the timeout or the server's size"
    )


def tensors(library: Any, inputs: Arrays) -> list[Any]:
    """Return arrays as the input tensors of one of Triton's client libraries."""
    made = []
    for name, array in inputs.items():
        tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made
