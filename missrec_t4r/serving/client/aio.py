"""The client for asyncio: the same requests and answers, any number of them under way at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from missrec_t4r.serving.client.aio_transports import open_async_transport
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
from missrec_t4r.serving.client.transports import translate_errors
from missrec_t4r.serving.event_features import SessionEventFeatures


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
        Name of the ensemble.
    retries : Retries, optional
        As in `MISSRecClient`.

    Examples
    --------
    >>> async with AsyncMISSRecClient("localhost:8001") as client:                               # doctest: +SKIP
    ...     answers = await client.recommend([["P00042", "P00007"]], top_k=3)
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
        self._door = open_async_transport(url, protocol, timeout)
        self._described: asyncio.Task[Description] | None = None

    async def __aenter__(self) -> AsyncMISSRecClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._door.close()

    async def description(self) -> Description:
        """Return what the server says of the model; asked once, and again only if that failed."""
        if self._described is None or (self._described.done() and self._described.exception() is not None):
            self._described = asyncio.ensure_future(self._describe())
        return await asyncio.shield(self._described)

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
        """Recommend items for every session; parameters, answers and errors are those of `MISSRecClient.recommend`."""
        check_call(sessions, top_k)
        wishes = RequestOptions(
            exclude_seen=exclude_seen, exclude=exclude, allow=allow, rules=rules, reasons=reasons, side=side
        )
        requests = list(requests_of(sessions, top_k, await self.description(), wishes))
        parts = await asyncio.gather(*(self.ask(request) for request in requests))
        counts = [len(request["length"]) for request in requests]
        return [answer for n, outputs in zip(counts, parts, strict=True) for answer in recommendations_of(outputs, n)]

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request as it is, tensors by name, and return the answer's tensors."""

        async def once() -> dict[str, Any]:
            with translate_errors(self.url, self.model, self.timeout):
                return await self._door.infer(self.model, request, outputs_for(request))

        return await self.retries.acall(once, self.timeout)

    async def _describe(self) -> Description:
        async def once() -> tuple[dict[str, str], int]:
            with translate_errors(self.url, self.model, self.timeout):
                return await self._door.describe(self.model)

        return Description.of(*await self.retries.acall(once, self.timeout), f"model {self.model!r} at {self.url}")
