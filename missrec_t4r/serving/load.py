"""Latency and throughput of a running server, by load clients with minimal cost.

On a small machine clients and server share the cores, and tritonclient's own work per request is as large as a small
model's: for throughput, requests are serialised beforehand and responses are not parsed. Servers are compared, so all
get the same cheap clients.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.client.transports import Arrays, channel_arguments

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_WARM = 32


def message(model: str, arrays: Arrays, outputs: Sequence[str]) -> bytes:
    """Return one serialised request."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        strings = array.dtype == np.object_
        request.raw_input_contents.append(serialize_byte_tensor(array).item() if strings else array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    serialised: bytes = request.SerializeToString()
    return serialised


def response_times(call: Callable[[Arrays], Any], requests: Sequence[Arrays], seconds: float) -> list[float]:
    """Send one request after the other, at least twenty, and return the milliseconds that each took."""
    for request in requests[:10]:
        call(request)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 20:
        started = time.perf_counter()
        call(requests[len(times) % len(requests)])
        times.append(1e3 * (time.perf_counter() - started))
    return times


def latency(call: Callable[[Arrays], Any], requests: Sequence[Arrays], seconds: float) -> dict[str, float]:
    """Send one request after the other and return p50 and p99 in milliseconds."""
    return percentiles(response_times(call, requests, seconds))


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99 of milliseconds."""
    return {"p50": round(float(np.median(times)), 3), "p99": round(float(np.percentile(times, 99)), 3)}


def answers_per_second(url: str, messages: Sequence[bytes], clients: int, seconds: float) -> float:
    """Return responses per second for ``clients`` that each wait for every response.

    Raises
    ------
    ServingError
        A request failed.
    """
    start = threading.Barrier(clients)

    def client(number: int) -> int:
        """Return the number of responses in the time of the measurement."""
        try:
            with grpc.insecure_channel(url, options=channel_arguments(url)) as channel:
                send = channel.unary_unary(_METHOD)
                for turn in range(max(1, _WARM // clients)):  # connects before the measurement
                    send(messages[(number + turn) % len(messages)], timeout=60)
                start.wait()
                until, count = time.perf_counter() + seconds, 0
                while time.perf_counter() < until:
                    send(messages[(number + count) % len(messages)], timeout=60)
                    count += 1
                return count
        except BaseException:
            start.abort()  # no client waits for this one
            raise

    with ThreadPoolExecutor(clients) as pool:
        try:
            answers = [pool.submit(client, number) for number in range(clients)]
        except BaseException:  # Ctrl-C, or no more threads: the clients so far would wait for ever
            start.abort()
            raise
    errors = [error for error in map(Future.exception, answers) if error is not None]
    if failures := [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]:
        first = failures[0]
        reason = first.details() if isinstance(first, grpc.Call) else first
        raise ServingError(
            f"{len(failures)} of {clients} clients failed ({reason})",
            "an answer to every request",
            "the server's log has the reason; fewer clients may do",
        )
    return round(sum(answer.result() for answer in answers) / seconds, 1)
