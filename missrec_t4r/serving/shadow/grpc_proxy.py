"""The gRPC door of `missrec shadow`: calls go to the server as the bytes they came as, a share to the candidate too.

Requests for recommendations are read to know whose they are, never changed; streams and all other calls of Triton's
service pass through untouched, errors with their status and words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tritonclient.grpc import InferResult, service_pb2

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.client.transports import checked_address
from missrec_t4r.serving.shadow.compare import COMPARED, TIMEOUT, Mirrored, MirroringProxy, Tensors
from missrec_t4r.serving.triton.ports import LOOPBACK

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_CALLS = 64
"""Calls under way at the same time."""


class GrpcShadowProxy(MirroringProxy):
    """The gRPC door; serves while the ``with`` block runs.

    Parameters
    ----------
    url : str
        gRPC address of the server that answers.
    candidate : str
        Name of the model that is asked in the shadow.
    candidate_url : str, optional
        Its server's gRPC address; the same server by default.
    share, port, model, seed
        As in `HttpShadowProxy`.
    """

    def __init__(
        self,
        url: str,
        candidate: str,
        *,
        candidate_url: str | None = None,
        share: float = 0.1,
        port: int = 0,
        model: str = "missrec",
        seed: int | None = None,
    ) -> None:
        super().__init__(share, seed)
        self._model, self._candidate = model, candidate
        self.channel, self._shadow = (
            grpc.insecure_channel(checked_address(one, "grpc"), options=_OPTIONS) for one in (url, candidate_url or url)
        )
        self._server = grpc.server(ThreadPoolExecutor(_CALLS), options=[*_OPTIONS, ("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((_Through(self),))
        try:
            self._port = self._server.add_insecure_port(f"{LOOPBACK}:{port}")
        except RuntimeError as error:
            found = f"port {port} cannot be used ({error})"
            raise ServingError(found, "a free port", "choose another --port") from error

    def __enter__(self) -> GrpcShadowProxy:
        self._mirror.__enter__()
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(grace=1.0).wait()
        self._mirror.__exit__()
        self.channel.close()
        self._shadow.close()

    def answered(self, request: bytes, answer: bytes, milliseconds: float) -> None:
        """Remember a request for the candidate, if it is one for the mirrored model."""
        asked = service_pb2.ModelInferRequest.FromString(request)
        if asked.model_name != self._model:
            return
        asked.model_name = self._candidate
        job = Mirrored(lambda: _tensors(answer), lambda: self._ask(asked.SerializeToString()), milliseconds)
        self._mirror.offer(job)

    def _ask(self, request: bytes) -> Tensors:
        try:
            return _tensors(self._shadow.unary_unary(_INFER)(request, timeout=TIMEOUT))
        except grpc.RpcError as error:
            raise ServingError(f"the candidate answered {error.code()}: {error.details()}") from error


class _Through(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """Hands every call to the server; bytes in, bytes out."""

    def __init__(self, door: GrpcShadowProxy) -> None:
        self._door = door

    def service(self, details: Any) -> Any:
        """Return the handler of a method."""
        if details.method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._call(details.method))

    def _call(self, method: str) -> Callable[[bytes, Any], bytes]:
        def call(request: bytes, context: Any) -> bytes:
            started = time.perf_counter()
            try:
                answer: bytes = self._door.channel.unary_unary(method)(
                    request, timeout=context.time_remaining(), metadata=_carried(context)
                )
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            if method == _INFER:
                self._door.answered(request, answer, (time.perf_counter() - started) * 1e3)
            return answer

        return call

    def _stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            yield from self._door.channel.stream_stream(_STREAM)(requests, metadata=_carried(context))
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())


def _carried(context: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in context.invocation_metadata() if name != "user-agent"]


def _tensors(answer: bytes) -> Tensors:
    result = InferResult(service_pb2.ModelInferResponse.FromString(answer))
    return {name: result.as_numpy(name) for name in COMPARED}
