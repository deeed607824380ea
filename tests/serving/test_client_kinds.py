"""Every client returns the same recommendations; which failures are retried and which are not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from missrec_t4r.errors import ConfigError, DataError, ServingError, UnavailableError
from missrec_t4r.runs.run_folder import LoadedRun
from missrec_t4r.serving.client.aio import AsyncMISSRecClient
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.retry import Retries
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests.serving import shop
from tests.serving.conftest import url_of


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_async_and_bundle_clients_answer_as_the_sync_one(
    server: LocalTriton, bundle: Path, loaded: LoadedRun, protocol: str
) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    sessions = shop.raw_sessions(loaded.catalogue, 150, seed=4)

    async def ask() -> list[object]:
        async with AsyncMISSRecClient(url, protocol) as client:
            return [*await client.recommend(sessions, 6), *(await client.recommend([], 6))]

    answers = asyncio.run(ask())
    with MISSRecClient(url, protocol) as client, MISSRecClient.of_bundle(bundle) as offline:
        assert client.id_type == offline.id_type
        expected = client.recommend(sessions, 6)
        computed = offline.recommend(sessions, 6)
    assert [answer.item_ids for answer in answers] == [answer.item_ids for answer in expected]
    assert [answer.item_ids for answer in computed] == [answer.item_ids for answer in expected]
    for answer, right in zip([*answers, *computed], [*expected, *expected], strict=True):
        np.testing.assert_allclose(answer.scores, right.scores, atol=1e-5)
        assert (answer.unknown_items, answer.fallback) == (right.unknown_items, right.fallback)


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_async_errors_are_in_the_same_words(server: LocalTriton, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url

    async def ask(**options: object) -> None:
        async with AsyncMISSRecClient(url, protocol, **options) as client:
            await client.recommend([["ware-3-ü"], [17]])

    with pytest.raises(DataError, match="session 1: item id 17 is of type int"):
        asyncio.run(ask())
    with pytest.raises(ServingError, match="model 'nothing' is not ready"):
        asyncio.run(ask(model="nothing"))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_unreachable_server_is_named_by_the_async_client(protocol: str, refusing: socket.socket) -> None:
    url = url_of(refusing)

    async def ask() -> None:
        async with AsyncMISSRecClient(url, protocol, timeout=5, retries=Retries(first_wait=0.01)) as client:
            await client.recommend([["a"]])

    with pytest.raises(UnavailableError, match=f"no answer from {url}"):
        asyncio.run(ask())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_never_answers_the_async_client_is_given_up_in_time(protocol: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        async def ask() -> None:
            url = f"127.0.0.1:{silent.getsockname()[1]}"
            async with AsyncMISSRecClient(url, protocol, timeout=0.3) as client:
                await client.recommend([["a"]])

        started = time.monotonic()
        with pytest.raises(ServingError, match="no answer from"):
            asyncio.run(ask())
        assert time.monotonic() - started < 4


def test_requests_of_the_async_client_carry_their_deadline() -> None:
    """Without it a proxy, or the server, goes on with a request that nobody waits for."""
    left = []

    class Endpoint(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(self.refuse)

        def refuse(self, request: bytes, context: grpc.ServicerContext) -> None:
            left.append(context.time_remaining())
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Endpoint()])
    url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    async def ask() -> None:
        async with AsyncMISSRecClient(url, timeout=50) as client:
            for call in (client.infer({}), client.recommend([["a"]])):
                with pytest.raises(ServingError, match="refused"):
                    await call

    try:
        asyncio.run(ask())
    finally:
        server.stop(None)
    assert [seconds < 51 for seconds in left] == [True, True]


@pytest.mark.triton
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_comes_late_is_reached_by_asking_again(
    server: LocalTriton, protocol: str, refusing: socket.socket
) -> None:
    """A port that first refuses and then forwards to the server, as during a restart."""
    url, target = url_of(refusing), server.ports[protocol]
    stop = threading.Event()

    def forward() -> None:
        time.sleep(0.4)
        refusing.listen()
        refusing.settimeout(10)
        with refusing.accept()[0] as near, socket.create_connection(("127.0.0.1", target)) as far:
            pumps = [threading.Thread(target=pump, args=pair) for pair in ((near, far), (far, near))]
            for thread in pumps:
                thread.start()
            stop.wait(20)
            for end in (near, far):
                end.shutdown(socket.SHUT_RDWR)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other end has closed
            while data := source.recv(1 << 16):
                sink.sendall(data)

    thread = threading.Thread(target=forward)
    thread.start()
    patient = Retries(attempts=50, first_wait=0.1, longest_wait=0.2)
    try:
        with MISSRecClient(url, protocol, retries=patient) as client:
            assert len(client.recommend([["ware-3-ü"]], 3)[0].item_ids) == 3
    finally:
        stop.set()
        thread.join()


def test_only_what_was_not_there_is_asked_again() -> None:
    retries = Retries(attempts=4, first_wait=0.001)

    def failing(error: Exception, times: int) -> tuple[list[int], object]:
        asked: list[int] = []

        def ask() -> str:
            asked.append(1)
            if len(asked) <= times:
                raise error
            return "answer"

        return asked, ask

    asked, ask = failing(UnavailableError("gone"), 3)
    assert retries.call(ask, timeout=5) == "answer"
    assert len(asked) == 4
    asked, ask = failing(UnavailableError("gone"), 9)
    with pytest.raises(UnavailableError):
        retries.call(ask, timeout=5)
    assert len(asked) == 4
    for error in (ServingError("refused"), DataError("wrong")):
        asked, ask = failing(error, 9)
        with pytest.raises(type(error)):
            retries.call(ask, timeout=5)
        assert len(asked) == 1
    asked, ask = failing(UnavailableError("gone"), 9)
    with pytest.raises(UnavailableError):
        Retries(attempts=9, first_wait=10).call(ask, timeout=0.1)
    assert len(asked) == 1


def test_pauses_grow_and_stay_within_their_bounds() -> None:
    waits = list(Retries(attempts=6, first_wait=0.1, longest_wait=0.5, jitter=0).waits())
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    drawn = [list(Retries(attempts=6, first_wait=0.1, longest_wait=0.5).waits()) for _ in range(50)]
    assert all(wait / 2 <= value <= wait for line in drawn for value, wait in zip(line, waits, strict=True))
    assert len({tuple(line) for line in drawn}) > 1
    for wrong in ({"attempts": 0}, {"first_wait": -1.0}, {"jitter": 1.5}):
        with pytest.raises(ConfigError):
            Retries(**wrong)


@pytest.mark.triton
def test_rules_reasons_and_the_version_travel_with_every_kind_of_client(server: LocalTriton, bundle: Path) -> None:
    sessions = [["ware-3-ü", "ware-9-ü"], ["ware-4-ü"], []]
    options: dict[str, object] = {
        "exclude": [["ware-1-ü", "ware-2-ü"], [], ["ware-0-ü"]],
        "allow": [f"ware-{i}-ü" for i in range(20)],
        "rules": {"where": {"train_count": {"min": 1}}},
        "reasons": True,
    }

    async def ask(protocol: str, url: str) -> list[object]:
        async with AsyncMISSRecClient(url, protocol) as client:
            return await client.recommend(sessions, 30, **options)

    with MISSRecClient(server.grpc_url) as client, MISSRecClient.of_bundle(bundle) as offline:
        answers = client.recommend(sessions, 30, **options)
        free = client.recommend(sessions, 30)
        kinds = [offline.recommend(sessions, 30, **options)]
    with MISSRecClient(server.http_url, "http") as client:
        kinds.append(client.recommend(sessions, 30, **options))
    kinds += [asyncio.run(ask("grpc", server.grpc_url)), asyncio.run(ask("http", server.http_url))]
    for other in kinds:
        for answer, expected in zip(other, answers, strict=True):
            assert (answer.item_ids, answer.reasons, answer.n_passed) == (
                expected.item_ids,
                expected.reasons,
                expected.n_passed,
            )
            assert answer.catalogue_version == expected.catalogue_version
    first, _, empty = answers
    assert not set(first.item_ids) & {"ware-1-ü", "ware-2-ü"}
    assert set(first.item_ids) < {f"ware-{i}-ü" for i in range(20)}
    assert len(first.item_ids) == first.n_passed == len(first.reasons) < len(free[0].item_ids)
    assert {reason.item_id for reason in first.reasons} <= set(sessions[0])
    assert {reason.modality for reason in first.reasons} <= {"text", "image", "id", "bought together"}
    assert empty.fallback
    assert free[0].reasons == []
    assert len(first.catalogue_version) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": "ware-1-ü"}, "exclude is not a list of item ids"),
        ({"exclude": 7}, "exclude is not a list of item ids"),
        ({"exclude": [["a"], "b"]}, "exclude is not a list of item ids"),
        ({"exclude": [["a"], ["b"]]}, "exclude holds 2 lists for 1 sessions"),
        ({"allow": [3]}, "allow: item id 3 is of type int"),
        ({"rules": [{}, {}]}, "2 rules for 1 sessions"),
        ({"rules": {"where": {"price": {"max": float("nan")}}}}, "rules cannot be sent"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_sent(
    bundle: Path, options: dict[str, object], words: str
) -> None:
    with MISSRecClient.of_bundle(bundle) as client, pytest.raises(DataError, match=words):
        client.recommend([["ware-3-ü"]], **options)
