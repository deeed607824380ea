"""Triton's two protocols behind one small interface: named arrays in, named arrays out, errors as `ServingError`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, NamedTuple, Protocol

import numpy as np
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from missrec_t4r.arrays import AnyArray
from missrec_t4r.errors import ServingError, UnavailableError

Arrays = Mapping[str, AnyArray]
ModelFacts = tuple[dict[str, str], int]
"""Data type of every input by name, and the largest batch of one request."""

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_NO_LIMIT = int(np.iinfo(np.int32).max)
_RECONNECT_MS = {"initial": 50, "min": 50, "max": 2000}
"""Pauses before a gRPC channel reconnects: those of the retries are short, and must not end while a channel sleeps."""
_NOT_READY = ("not ready", "no available versions", "maximum queue size")
"""Fragments of Triton's messages while a model is loading, or when its request queue is full: worth a retry."""
_PROCESS_ENDED = "is not healthy"
"""Fragment of Triton's message about a model whose process is gone: it fails every request from then on."""


class Transport(Protocol):
    """One connection to a server."""

    def describe(self, model: str) -> ModelFacts:
        """Return the data type of every input, and the largest batch of one request."""

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, AnyArray]:
        """Send one inference request and return the named outputs."""

    def close(self) -> None:
        """Close the connection."""


class TritonProtocol(NamedTuple):
    """What a client needs of one of Triton's protocols, whether it blocks or not."""

    library: Any
    """Module of tritonclient with the protocol's tensors."""
    facts: Callable[[Any, Any], ModelFacts]
    """Reads a model's metadata and configuration."""
    deadline: Mapping[str, float]
    """Argument of every call: gRPC sends it, so that proxies and server give up too. An HTTP connection has its own."""

    @classmethod
    def named(cls, protocol: str, timeout: float) -> TritonProtocol:
        """Return ``grpc`` or ``http``; the other one's library is not imported."""
        if protocol == "grpc":
            import tritonclient.grpc as grpc

            return cls(grpc, grpc_facts, {"client_timeout": timeout})
        import tritonclient.http as http

        return cls(http, http_facts, {})


class TritonTransport:
    """gRPC, which threads may share, or HTTP with binary tensors, one per thread; connects at the first request.

    Raises
    ------
    ServingError
        Unknown protocol, or an address that is not ``host:port``.
    """

    def __init__(self, url: str, protocol: str, timeout: float) -> None:
        address = checked_address(url, protocol)
        self._protocol = TritonProtocol.named(protocol, timeout)
        client: Callable[..., Any] = self._protocol.library.InferenceServerClient
        self._client = (
            client(address, channel_args=channel_arguments(address))
            if protocol == "grpc"
            else client(address, connection_timeout=timeout, network_timeout=timeout)
        )

    def describe(self, model: str) -> ModelFacts:
        """Return the data type of every input, and the largest batch of one request."""
        deadline = self._protocol.deadline
        metadata = self._client.get_model_metadata(model, **deadline)
        return self._protocol.facts(metadata, self._client.get_model_config(model, **deadline))

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, AnyArray]:
        """Send one inference request and return the named outputs."""
        tensors = input_tensors(self._protocol.library, inputs)
        return output_arrays(self._client.infer(model, tensors, **self._protocol.deadline), outputs)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


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
    """Return the gRPC channel's options: no size limit, no proxy to the loopback interface, quick reconnects."""
    limits = [("grpc.max_send_message_length", _NO_LIMIT), ("grpc.max_receive_message_length", _NO_LIMIT)]
    local = url.rpartition(":")[0] in _LOOPBACK_HOSTS
    proxy = [("grpc.enable_http_proxy", 0)] if local else []
    return limits + proxy + [(f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in _RECONNECT_MS.items()]


def grpc_facts(metadata: Any, config: Any) -> ModelFacts:
    """Return input types and largest batch from gRPC's model metadata and configuration."""
    return {tensor.name: tensor.datatype for tensor in metadata.inputs}, int(config.config.max_batch_size)


def http_facts(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> ModelFacts:
    """Return input types and largest batch from HTTP's model metadata and configuration."""
    types = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]}
    return types, int(config.get("max_batch_size", 0))


def input_tensors(library: Any, inputs: Arrays) -> list[Any]:
    """Return arrays as the input tensors of ``tritonclient.grpc`` or ``tritonclient.http``."""
    tensors = []
    for name, array in inputs.items():
        tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def output_arrays(result: Any, outputs: Sequence[str]) -> dict[str, AnyArray]:
    """Return the named outputs of an inference result; those that the response lacks are left out."""
    return {name: array for name in outputs if (array := result.as_numpy(name)) is not None}


@contextmanager
def translate_errors(url: str, model: str, timeout: float) -> Iterator[None]:
    """Turn exceptions of the client libraries into `ServingError` with a remedy.

    Raises
    ------
    UnavailableError
        No response, or the model is not ready yet: worth a retry.
    ServingError
        Anything else: too slow, no such model, or the request is refused.
    """
    try:
        yield
    except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
        raise _too_slow(url, timeout) from error
    except (OSError, EOFError, HTTPException) as error:  # the last one of a server that speaks gRPC
        raise _unreachable(url, error) from error
    except ValueError as error:
        if type(error).__name__ != "JSONDecodeError":  # of rapidjson, which parses what a server answers
            raise
        raise _unreachable(url, f"what answers is not JSON: {error}") from error
    except InferenceServerException as error:
        raise _refusal(url, model, timeout, str(error.status() or ""), str(error.message() or error)) from error


def _refusal(url: str, model: str, timeout: float, status: str, message: str) -> ServingError:
    if "DEADLINE_EXCEEDED" in status:
        return _too_slow(url, timeout)
    is_starting = any(fragment in message for fragment in _NOT_READY)
    if "StatusCode.UNAVAILABLE" in status and not is_starting:
        return _unreachable(url, message)
    if is_starting or "unknown model" in message or "not found" in message:
        kind = UnavailableError if is_starting else ServingError
        return kind(
            f"model {model!r} is not ready on {url} ({message})",
            "a server with a repository of `missrec export --triton`",
            "wait until it is ready, or check its log",
        )
    found = f"the server at {url} refused the request: {message.rstrip('.')}"
    if _PROCESS_ENDED in message:
        cure = "`missrec rollback`, `missrec deploy` of the bundle as a new version, or restart the server"
        return ServingError(found, "a model whose process runs", cure)
    return ServingError(found)


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
