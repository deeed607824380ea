"""The two protocols of Triton for asyncio: what `doors` does, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt

from missrec_t4r.serving.client.transports import Arrays, channel_arguments, checked_address, tensors


class AsyncTransport(Protocol):
    """One connection to a server; belongs to the event loop that opened it."""

    async def describe(self, model: str) -> tuple[dict[str, str], int]:
        """Return the data type of every input, and the largest batch that one request may hold."""

    async def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Ask the model."""

    async def close(self) -> None:
        """Close the connection."""


class AsyncGrpcTransport:
    """gRPC; any number of requests at a time."""

    def __init__(self, url: str, timeout: float) -> None:
        import tritonclient.grpc as grpc
        import tritonclient.grpc.aio as aio

        self._library, self._timeout = grpc, timeout
        self._client = aio.InferenceServerClient(url, channel_args=channel_arguments(url))

    async def describe(self, model: str) -> tuple[dict[str, str], int]:
        """Return the data type of every input, and the largest batch that one request may hold."""
        metadata = await self._client.get_model_metadata(model, client_timeout=self._timeout)
        config = (await self._client.get_model_config(model, client_timeout=self._timeout)).config
        return {tensor.name: tensor.datatype for tensor in metadata.inputs}, int(config.max_batch_size)

    async def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Ask the model."""
        result = await self._client.infer(model, tensors(self._library, inputs), client_timeout=self._timeout)
        return {name: array for name in outputs if (array := result.as_numpy(name)) is not None}

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


class AsyncHttpTransport:
    """HTTP with binary tensors; as many connections as requests are under way."""

    def __init__(self, url: str, timeout: float) -> None:
        import tritonclient.http as http
        import tritonclient.http.aio as aio

        self._library, self._timeout = http, timeout
        self._client = aio.InferenceServerClient(url, conn_timeout=timeout)

    async def describe(self, model: str) -> tuple[dict[str, str], int]:
        """Return the data type of every input, and the largest batch that one request may hold."""
        metadata = await self._in_time(self._client.get_model_metadata(model))
        config = await self._in_time(self._client.get_model_config(model))
        types = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]}
        return types, int(config.get("max_batch_size", 0))

    async def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Ask the model."""
        result = await self._in_time(self._client.infer(model, tensors(self._library, inputs)))
        return {name: array for name in outputs if (array := result.as_numpy(name)) is not None}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _in_time(self, answer: Any) -> Any:
        import aiohttp  # comes with tritonclient[http]

        try:
            return await asyncio.wait_for(answer, self._timeout)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error


def open_async_transport(url: str, protocol: str, timeout: float) -> AsyncTransport:
    """Connect lazily, inside a running event loop.

    Raises
    ------
    ServingError
        Unknown protocol, or an address that is not ``host:port``.
    """
    doors: dict[str, type[AsyncGrpcTransport] | type[AsyncHttpTransport]] = {
        "grpc": AsyncGrpcTransport,
        "http": AsyncHttpTransport,
    }
    address = checked_address(url, protocol)
    return doors[protocol](address, timeout)
