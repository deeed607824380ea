from __future__ import annotations

import socket
import time
from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.client.protocol import pad_sessions, recommendations_of
from missrec_t4r.serving.triton.ports import choose_ports


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_unreachable_server_is_named(protocol: str) -> None:
    port = choose_ports({"http": 0})["http"]
    words = f"no answer from 127.0.0.1:{port} .*expected: a running Triton server"
    with MISSRecClient(f"127.0.0.1:{port}", protocol, timeout=5) as client, pytest.raises(ServingError, match=words):
        client.recommend([["a"]])


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


def test_sessions_are_padded_to_the_longest() -> None:
    sessions = [np.array([b"a", b"b"], object), np.array([], object)]
    item_ids, length = pad_sessions(sessions, "string")
    assert item_ids.tolist() == [[b"a", b"b"], [b"", b""]]
    assert length.tolist() == [[2], [0]]
    assert pad_sessions([np.array([], np.int64)], "int64")[0].shape == (1, 1)


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
