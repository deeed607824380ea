"""Asyncio client: the requests and results of `MISSRecClient`, any number of them concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from missrec_t4r.arrays import AnyArray
from missrec_t4r.serving.client.protocol import (
    Description,
    Recommendation,
    RequestOptions,
    Session,
    check_call,
    outputs_for,
    recommendations_of,
    requests_of,
)
from missrec_t4r.serving.client.retry import Retries
from missrec_t4r.serving.client.transports import (
    Arrays,
    ModelFacts,
    TritonProtocol,
    channel_arguments,
    checked_address,
    input_tensors,
    output_arrays,
    translate_errors,
)
from missrec_t4r.serving.event_features import SessionEventFeatures

T = TypeVar("T")


class AsyncTransport:
    """Triton's two protocols as `transports` has them, without blocking the event loop that opened it.

    It connects at the first request; any number of requests may run concurrently, over HTTP each on a connection.

    Raises
    ------
    ServingError
        Unknown protocol, or an address that is not ``host:port``.
    """

    def __init__(self, url: str, protocol: str, timeout: float) -> None:
        address = checked_address(url, protocol)
        self._timeout, self._connection_errors = timeout, tuple[type[Exception], ...]()
        self._protocol = TritonProtocol.named(protocol, timeout)
        self._client: Any
        if protocol == "grpc":
            import tritonclient.grpc.aio as grpc_aio

            self._client = grpc_aio.InferenceServerClient(address, channel_args=channel_arguments(address))
        else:
            import aiohttp  # a dependency of tritonclient[http]
            import tritonclient.http.aio as http_aio

            self._client = http_aio.InferenceServerClient(address, conn_timeout=timeout)
            self._connection_errors = (aiohttp.ClientError,)

    async def describe(self, model: str) -> ModelFacts:
        """Return the data type of every input, and the largest batch of one request."""
        deadline = self._protocol.deadline
        metadata = await self._in_time(self._client.get_model_metadata(model, **deadline))
        return self._protocol.facts(metadata, await self._in_time(self._client.get_model_config(model, **deadline)))

    async def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, AnyArray]:
        """Send one inference request and return the named outputs."""
        tensors = input_tensors(self._protocol.library, inputs)
        result = await self._in_time(self._client.infer(model, tensors, **self._protocol.deadline))
        return output_arrays(result, outputs)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _in_time(self, response: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(response, self._timeout)
        except self._connection_errors as error:
            raise ConnectionError(str(error)) from error


class AsyncMISSRecClient:
    """Connection to a Triton server, opened inside a running event loop.

    Parameters
    ----------
    url : str
        ``host:port``; Triton's defaults are 8001 for gRPC and 8000 for HTTP.
    protocol : {"grpc", "http"}
    timeout : float
        Seconds per request.
    model : str
        Name of the served ensemble.
    retries : Retries, optional
        As for `MISSRecClient`.

    Examples
    --------
    >>> async with AsyncMISSRecClient("localhost:8001") as client:                               # doctest: +SKIP
    ...     recommendations = await client.recommend([["P00042", "P00007"]], top_k=3)
    """

    def __init__(
        self,
        url: str,
        protocol: str = "grpc",
        *,
        timeout: float = 10.0,
        model: str = "missrec",
        retries: Retries | None = None,
    ) -> None:
        self.url, self.model, self.timeout = url, model, timeout
        self.retries = Retries() if retries is None else retries
        self._transport = AsyncTransport(url, protocol, timeout)
        self._description: asyncio.Task[Description] | None = None

    async def __aenter__(self) -> AsyncMISSRecClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close()

    async def description(self) -> Description:
        """Return the id type, batch size and inputs of the served model; requested once, again only if that failed."""
        if self._description is None or (self._description.done() and self._description.exception() is not None):
            self._description = asyncio.ensure_future(self._describe())
        return await asyncio.shield(self._description)

    async def recommend(
        self,
        sessions: Sequence[Session],
        top_k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Session | Sequence[Session] | None = None,
        allow: Session | Sequence[Session] | None = None,
        rules: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        reasons: bool = False,
        side: Sequence[SessionEventFeatures | None] | None = None,
    ) -> list[Recommendation]:
        """Recommend items for every session; parameters, result and errors are those of `MISSRecClient.recommend`."""
        check_call(sessions, top_k)
        options = RequestOptions(
            exclude_seen=exclude_seen, exclude=exclude, allow=allow, rules=rules, reasons=reasons, side=side
        )
        requests = list(requests_of(sessions, top_k, await self.description(), options))
        outputs = await asyncio.gather(*(self.infer(request) for request in requests))
        return [
            recommendation
            for request, tensors in zip(requests, outputs, strict=True)
            for recommendation in recommendations_of(tensors, len(request["length"]))
        ]

    async def infer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request, tensors by name, and return the response's tensors."""
        return await self._call(lambda: self._transport.infer(self.model, request, outputs_for(request)))

    async def _describe(self) -> Description:
        facts = await self._call(lambda: self._transport.describe(self.model))
        return Description.of(*facts, f"model {self.model!r} at {self.url}")

    async def _call(self, send: Callable[[], Awaitable[T]]) -> T:
        async def translated() -> T:
            with translate_errors(self.url, self.model, self.timeout):
                return await send()

        return await self.retries.acall(translated, self.timeout)
