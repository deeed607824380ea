from __future__ import annotations

import http.client
import json
import re
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tritonclient.utils import InferenceServerException

from missrec_t4r.errors import DataError, ServingError, UnavailableError
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.client.protocol import (
    Description,
    RequestOptions,
    check_call,
    pad_sessions,
    recommendations_of,
    requests_of,
    typed_id,
)
from missrec_t4r.serving.client.retry import Retries
from missrec_t4r.serving.client.transports import translate_errors
from missrec_t4r.serving.http_server import HttpServer
from missrec_t4r.serving.shadow.compare import Comparison
from missrec_t4r.serving.shadow.http_proxy import HttpShadowProxy, shadow
from tests.serving.conftest import url_of


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_unreachable_server_is_named(protocol: str, refusing: socket.socket) -> None:
    words = f"no answer from {url_of(refusing)} .*expected: a running Triton server"
    with MISSRecClient(url_of(refusing), protocol, timeout=5) as client, pytest.raises(ServingError, match=words):
        client.recommend([["a"]])


@pytest.mark.parametrize(
    "answer", [b"\0\0\x18\4\0", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n# of"], ids=["grpc", "metrics"]
)
def test_http_to_the_port_of_grpc_or_of_the_metrics_is_told(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def once() -> None:
            connection, _ = listening.accept()
            connection.recv(65536)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=once)
        thread.start()
        url = f"127.0.0.1:{listening.getsockname()[1]}"
        with (
            MISSRecClient(url, "http", retries=Retries(attempts=1)) as client,
            pytest.raises(UnavailableError, match="mind that gRPC and HTTP have different ports"),
        ):
            client.recommend([["P1"]])
        thread.join()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_never_answers_is_given_up_in_time(protocol: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with MISSRecClient(url, protocol, timeout=0.5) as client, pytest.raises(ServingError, match="no answer from"):
            client.recommend([["a"]])
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("url", ["localhost", "localhost:", ":8001", "https://localhost:8000", "localhost:80/x", "a:b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ServingError, match="expected: host:port"):
        MISSRecClient(url)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ServingError, match="protocol 'soap'; expected: grpc or http"):
        MISSRecClient("localhost:8001", "soap")


@pytest.mark.parametrize("sessions", ["abc", ["abc"]])
def test_a_string_is_no_session(sessions: list[list[str]]) -> None:
    with MISSRecClient("localhost:8001") as client, pytest.raises(DataError, match="one string"):
        client.recommend(sessions)


def test_a_model_whose_process_is_gone_is_told_with_a_cure() -> None:
    gone = InferenceServerException("in ensemble 'missrec', Stub process 'missrec_ranker_v3_0_0' is not healthy.")
    cure = "is not healthy; expected: .* `missrec rollback`, .* or restart"
    with pytest.raises(ServingError, match=cure), translate_errors("localhost:8001", "missrec", 10):
        raise gone


@pytest.mark.parametrize(
    ("id_type", "allow"), [("string", []), ("string", [""]), ("int64", [None]), ("int64", [[]]), ("int64", [[None]])]
)
def test_an_allow_list_without_an_id_is_refused(id_type: str, allow: Any) -> None:
    """On the wire it would allow everything: a list of what a shop has in stock may come back empty."""
    model = Description(id_type, 2, frozenset({"item_ids"}))
    with pytest.raises(DataError, match="holds no item id: nothing could be recommended; expected: .* None"):
        list(requests_of([[]], 3, model, RequestOptions(allow=allow)))


def test_none_in_place_of_a_sessions_list_restricts_nothing() -> None:
    model = Description("int64", 2, frozenset({"item_ids"}))
    options = RequestOptions(allow=[None, [7]], exclude=[[5], None])
    (request,) = requests_of([[1], [2]], 3, model, options)
    missing = np.iinfo(np.int64).min
    assert (request["allow"].tolist(), request["exclude"].tolist()) == ([[missing], [7]], [[5], [missing]])


def test_ids_in_arrays_are_those_in_lists() -> None:
    model, sessions = Description("int64", 2, frozenset({"item_ids"})), [np.array([1]), np.array([2, 3])]
    for_all, per_session = np.array([7, 8]), [np.array([7, 8]), np.array([9, 8])]
    all_by_all = [[7, 8], [7, 8]]
    for exclude, sent in ((for_all, all_by_all), (iter([7, 8]), all_by_all), (per_session, [[7, 8], [9, 8]])):
        (request,) = requests_of(sessions, 3, model, RequestOptions(exclude=exclude))
        assert request["exclude"].tolist() == sent


def test_event_features_outside_a_list_are_refused() -> None:
    model = Description("int64", 2, frozenset({"item_ids"}))
    with pytest.raises(DataError, match="event features in one mapping; expected: one mapping or None per session"):
        list(requests_of([[1]], 3, model, RequestOptions(side={"price": [2.0]})))


def test_a_host_that_is_not_found_is_no_missing_model() -> None:
    with MISSRecClient("no-such-host.invalid:1", timeout=3) as client, pytest.raises(ServingError) as raised:
        client.recommend([["a"]])
    assert "not ready" not in str(raised.value)
    assert "no-such-host.invalid:1" in str(raised.value)


def test_a_call_that_is_split_sends_every_session_its_own_options() -> None:
    model = Description("int64", 2, frozenset({"item_ids"}))
    options = RequestOptions(
        exclude=[[10], [20, 21], [30]],
        rules=[{"at_most": {"brand": n}} for n in (1, 2, 3)],
        side=[None, {"price": [2.0]}, {"price": [3.0]}],
    )
    first, second = requests_of([[1], [2], [3, 4]], 7, model, options)
    assert (first["item_ids"].tolist(), second["item_ids"].tolist()) == ([[1], [2]], [[3, 4]])
    assert (first["exclude"][:, 0].tolist(), second["exclude"].tolist()) == ([10, 20], [[30]])
    assert [json.loads(text)["at_most"]["brand"] for text in (*first["rules"][:, 0], *second["rules"][:, 0])] == [
        1,
        2,
        3,
    ]
    assert (first["side"][0, 0], json.loads(second["side"][0, 0])) == (b"", {"price": [3.0]})
    assert second["top_k"].tolist() == [[7]]


def test_an_id_given_as_text_is_an_integer_only_if_it_is_written_so() -> None:
    assert [typed_id("77", "int64"), typed_id(-7, "int64"), typed_id("077", "string")] == [77, -7, "077"]
    for wrong in ("077", "7_7", " 77", "lamp", ""):
        with pytest.raises(
            DataError, match=f"item id {re.escape(repr(wrong))}; expected: an integer, the type of this"
        ):
            typed_id(wrong, "int64")


def test_padding_behind_an_answer_is_not_recommended() -> None:
    outputs = {
        "item_id": np.array([[b"a", b"b"], [b"c", b""]], object),
        "score": np.array([[0.5, 0.25], [0.75, 0.0]]),
        "n_items": np.array([[2], [1]]),
        "n_unknown": np.array([[0], [1]]),
        "fallback": np.array([[False], [True]]),
        "n_passed": np.array([[9], [1]]),
        "catalogue_version": np.array([[b"v"], [b"v"]], object),
    }
    first, second = recommendations_of(outputs, 2)
    assert (first.item_ids, first.scores, first.n_passed) == (["a", "b"], [0.5, 0.25], 9)
    assert (second.item_ids, second.scores, second.unknown_items, second.fallback) == (["c"], [0.75], 1, True)


def test_two_answers_are_compared_by_the_longer_list() -> None:
    def tensors(items: list[bytes], scores: list[float]) -> dict[str, np.ndarray]:
        return {"item_id": np.array([items], object), "score": np.array([scores]), "n_items": np.array([[len(items)]])}

    comparison = Comparison()
    comparison.add(tensors([b"a", b"b", b"c", b"d"], [4, 3, 2, 1]), tensors([b"b", b"a"], [3.5, 3]))
    assert (comparison.overlap, comparison.same_first, comparison.score_differences) == ([0.5], [False], [0.75])
    comparison.add(tensors([b"a"], [4]), tensors([], []))
    assert (comparison.overlap[1], comparison.same_first[1], comparison.score_differences) == (0.0, False, [0.75])


def test_a_comparison_of_nothing_has_no_figures() -> None:
    report = Comparison().report()
    counts = {"mirrored_sessions": 0, "failed": 0, "dropped": 0, "current_ms": {}, "candidate_ms": {}}
    assert {name: value for name, value in report.items() if value is not None} == counts


def test_a_candidate_that_answers_nonsense_fails_and_the_mirror_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with (
        HttpServer(0, lambda request: (200, {}, b"{}")) as server,
        HttpShadowProxy(server.address, "other", share=1) as proxy,
    ):
        for _ in range(3):
            connection = http.client.HTTPConnection(proxy.url, timeout=10)
            connection.request("POST", "/v2/models/missrec/infer", b"{}")
            assert connection.getresponse().read() == b"{}"
            connection.close()
    assert proxy.comparison.failed == 3
    assert caplog.text.count("the first failure of the candidate") == 1


def test_clients_that_connect_at_once_wait_instead_of_being_dropped() -> None:
    """More than the 5 that Python's servers keep waiting; a dropped one would be tried again after a second."""
    server = HttpServer(0, lambda request: (200, {}, b""))  # accepts nobody before it runs
    try:
        waiting = [socket.socket() for _ in range(40)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.server_address)
        unconnected, until = set(waiting), time.monotonic() + 10
        while unconnected and time.monotonic() < until:
            unconnected -= {*select.select([], unconnected, [], 0.1)[1]}
        assert unconnected == set()
    finally:
        for client in waiting:
            client.close()
        server.server_close()


def test_a_shadow_that_compared_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert shadow("missrec_v2", url="127.0.0.1:9", port=0, seconds=0.01)["overlap_at_k"] is None
    assert caplog.text.count("no answer from 127.0.0.1:9") == 2  # for clients, for the candidate
    assert "nothing was compared: of the mirrored requests 0 failed and 0 were dropped" in caplog.text


def test_sessions_are_padded_to_the_longest() -> None:
    sessions = [np.array([b"a", b"b"], object), np.array([], object)]
    item_ids, length = pad_sessions(sessions, "string")
    assert item_ids.tolist() == [[b"a", b"b"], [b"", b""]]
    assert length.tolist() == [[2], [0]]
    assert pad_sessions([np.array([], np.int64)], "int64")[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"Name": ["Lampe"], "text": ["hell"]}, "Lampe"),
        ({"Text": ["hell"], "Artikel": ["Lampe"]}, "Lampe"),  # the first column that the text encoder has read
        ({"price": [3]}, None),
    ],
)
def test_titles_have_the_shops_own_column_name(tmp_path: Path, columns: dict[str, list[Any]], expected: str) -> None:
    pq.write_table(pa.table({"item_id": ["a"], **columns}), tmp_path / "items.parquet")
    encoder = {"columns": ["Artikel", "Text"]}
    noted = {"image": {"encoder": {"column": "bild"}}, "text": {"encoder": encoder}}
    (tmp_path / "catalogue.json").write_text(json.dumps({"modalities": noted}))
    assert read_titles(tmp_path) == ({"a": expected} if expected else {})


def test_titles_come_from_a_bundle_or_a_parquet_file(bundle: Path, tmp_path: Path) -> None:
    titles = read_titles(bundle)
    assert titles == read_titles(bundle / "items.parquet")
    assert len(titles) == 30
    assert set(titles.values()) == {f"Ware {i}" for i in range(30)}
    with pytest.raises(DataError, match="does not exist"):
        read_titles(tmp_path / "none.parquet")


def test_an_answer_to_another_number_of_sessions_is_refused() -> None:
    with pytest.raises(ServingError, match="a response for 3 sessions; expected: 2, as requested"):
        recommendations_of({"n_items": np.zeros((3, 1), np.int32)}, 2)


@pytest.mark.parametrize(
    ("sessions", "words"),
    [
        ([1039, 1052], "session 0 is 1039; expected: a list of item ids per session. wrap the ids in a list"),
        (1039, "sessions is 1039"),
        (iter([["a"]]), "sessions is <list_iterator .*; expected: a list of item ids per session"),
        ([["a"], None], "session 1 is None"),
        (["a", "b"], "a session given as one string"),
        ([b"a"], "a session given as one string"),
    ],
)
def test_one_session_in_place_of_a_list_of_them_is_named(sessions: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_call(sessions, 10)


def test_a_number_of_items_that_is_a_text_is_named() -> None:
    with pytest.raises(ServingError, match="top_k is '5'; expected: a whole number of at least 1"):
        check_call([["a"]], "5")  # type: ignore[arg-type]
    check_call([["a"], (), np.array([1])], np.int64(5))
