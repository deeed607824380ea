"""Triton's two protocols for asyncio: the interface of `transports`, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from missrec_t4r.arrays import AnyArray
from missrec_t4r.serving.client.transports import (
    Arrays,
    ModelFacts,
    channel_arguments,
    checked_address,
    grpc_facts,
    http_facts,
    input_tensors,
    output_arrays,
)


class AsyncGrpcTransport:
    """gRPC; any number of concurrent requests, in the event loop that opened it."""

    def __init__(self, url: str, timeout: float) -> None:
        import tritonclient.grpc as grpc
        import tritonclient.grpc.aio as aio

        self._library, self._timeout = grpc, timeout
        self._client = aio.InferenceServerClient(url, channel_args=channel_arguments(url))

    async def describe(self, model: str) -> ModelFacts:
        """Return the data type of every input, and the largest batch of one request."""
        metadata = await self._client.get_model_metadata(model, client_timeout=self._timeout)
        return grpc_facts(metadata, await self._client.get_model_config(model, client_timeout=self._timeout))

    async def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, AnyArray]:
        """Send one inference request and return the named outputs."""
        tensors = input_tensors(self._library, inputs)
        return output_arrays(await self._client.infer(model, tensors, client_timeout=self._timeout), outputs)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


class AsyncHttpTransport:
    """HTTP with binary tensors; one connection per concurrent request, in the event loop that opened it."""

    def __init__(self, url: str, timeout: float) -> None:
        import tritonclient.http as http
        import tritonclient.http.aio as aio

        self._library, self._timeout = http, timeout
        self._client = aio.InferenceServerClient(url, conn_timeout=timeout)

    async def describe(self, model: str) -> ModelFacts:
        """Return the data type of every input, and the largest batch of one request."""
        metadata = await self._in_time(self._client.get_model_metadata(model))
        return http_facts(metadata, await self._in_time(self._client.get_model_config(model)))

    async def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, AnyArray]:
        """Send one inference request and return the named outputs."""
        tensors = input_tensors(self._library, inputs)
        return output_arrays(await self._in_time(self._client.infer(model, tensors)), outputs)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _in_time(self, response: Awaitable[Any]) -> Any:
        import aiohttp  # a dependency of tritonclient[http]

        try:
            return await asyncio.wait_for(response, self._timeout)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error


AsyncTransport = AsyncGrpcTransport | AsyncHttpTransport


def open_async_transport(url: str, protocol: str, timeout: float) -> AsyncTransport:
    """Return a transport that connects at the first request; call it inside a running event loop.

    Raises
    ------
    ServingError
        Unknown protocol, or an address that is not ``host:port``.
    """
    address = checked_address(url, protocol)
    return AsyncGrpcTransport(address, timeout) if protocol == "grpc" else AsyncHttpTransport(address, timeout)
