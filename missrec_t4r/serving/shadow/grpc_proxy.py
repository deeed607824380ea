"""gRPC proxy of `missrec shadow`: forwards every call unchanged and mirrors a share to the candidate.

Inference requests are decoded to read their model's name, never changed; streams and all other calls of Triton's
service pass through as bytes, errors with their status and message.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from tritonclient.grpc import InferResult, service_pb2

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.shadow.compare import COMPARED, TIMEOUT, ShadowProxy, Tensors
from missrec_t4r.serving.triton.ports import LOOPBACK
from missrec_t4r.serving.triton.repository import ENSEMBLE

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_CALLS = 64
"""Most concurrent calls."""
_LONGEST_WAIT = 365 * 86_400.0
"""Seconds beyond which a deadline is none."""


class GrpcShadowProxy(ShadowProxy[bytes, bytes], grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """gRPC proxy; parameters as for `ShadowProxy`."""

    protocol = "grpc"

    def _listen(self, port: int) -> str:
        self._channel, self._candidate_channel = (
            grpc.insecure_channel(address, options=_OPTIONS) for address in (self.address, self.candidate_address)
        )
        self._server = grpc.server(ThreadPoolExecutor(_CALLS), options=[*_OPTIONS, ("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        try:
            return f"{LOOPBACK}:{self._server.add_insecure_port(f'{LOOPBACK}:{port}')}"
        except RuntimeError as error:
            found = f"port {port} cannot be used ({error})"
            raise ServingError(found, "a free port", "choose another --port") from error

    def __enter__(self) -> GrpcShadowProxy:
        self._server.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(grace=1.0).wait()
        super().__exit__()
        self._channel.close()
        self._candidate_channel.close()

    def service(self, details: Any) -> Any:
        """Return the handler of a method, which forwards its calls; bytes in, bytes out."""
        if details.method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._forward_stream)
        return grpc.unary_unary_rpc_method_handler(partial(self._forward, details.method))

    def _forward(self, method: str, request: bytes, context: Any) -> bytes:
        started = time.perf_counter()
        try:
            response: bytes = self._channel.unary_unary(method)(
                request, timeout=_timeout(context), metadata=_metadata(context)
            )
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
        milliseconds = (time.perf_counter() - started) * 1e3
        if method == _INFER:
            message = service_pb2.ModelInferRequest.FromString(request)
            if message.model_name == ENSEMBLE:
                message.model_name = self.candidate
                self.sample(message.SerializeToString(), response, milliseconds)
        return response

    def _forward_stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            yield from self._channel.stream_stream(_STREAM)(requests, metadata=_metadata(context))
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())

    def _ask_candidate(self, request: bytes) -> bytes:
        try:
            response: bytes = self._candidate_channel.unary_unary(_INFER)(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise ServingError(f"the candidate answered {error.code()}: {error.details()}") from error
        return response

    def _tensors(self, response: bytes) -> Tensors:
        result = InferResult(service_pb2.ModelInferResponse.FromString(response))
        return {name: result.as_numpy(name) for name in COMPARED}


def _timeout(context: Any) -> float | None:
    """Return the seconds that the client still waits, None without a deadline.

    grpc then counts to the end of its clock, a number of seconds that overflows as a timeout.
    """
    left: float = context.time_remaining()
    return left if left < _LONGEST_WAIT else None


def _metadata(context: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in context.invocation_metadata() if name != "user-agent"]
