"""The embedded server: it is the started one, it ends with its parent, its model control needs the key."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.triton import local_server as local_triton
from missrec_t4r.serving.triton import stubs
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.model_control import CLOSED, HEADER
from missrec_t4r.serving.triton.ports import choose_ports
from missrec_t4r.serving.triton.stubs import Stub, StubWatch
from tests.processes import of_group

pytestmark = pytest.mark.triton


def test_no_server_outlives_an_owner_that_is_killed(exported: Path, server: LocalTriton) -> None:
    code = """
import sys, threading, time
from missrec_t4r.serving.triton.local_server import LocalTriton
def start():
    server = LocalTriton(sys.argv[1]).__enter__()
    print(server.pid, server._folder, flush=True)
thread = threading.Thread(target=start)  # a thread that ends must not take the server with it
thread.start()
thread.join()
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code, str(exported / "repository")], stdout=subprocess.PIPE)
    assert owner.stdout
    pid, folder = owner.stdout.readline().decode().split()
    assert len(of_group(int(pid))) >= 3  # the server and its models' stubs
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 60
    while (of_group(int(pid)) or Path(folder).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_group(int(pid)) == []
    assert not Path(folder).exists()


def test_a_port_lost_to_another_process_is_replaced(
    exported: Path, server: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free ports that are chosen first are those of another Triton by the time ours binds them."""
    offers = [dict(server.ports)]
    monkeypatch.setattr(local_triton, "choose_ports", lambda wanted: offers.pop() if offers else choose_ports(wanted))
    with LocalTriton(exported / "repository") as second:
        assert not offers
        assert second.ports["http"] != server.ports["http"]
        assert second.pid != server.pid
        with MISSRecClient(second.grpc_url) as client:
            assert len(client.recommend([["ware-3-ü"]], 3)[0].item_ids) == 3


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/missrec/load"),
        ("POST", "/v2/repository/models/missrec/unload"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/logging"),
    ],
)
def test_what_only_an_operator_may_do_is_closed_over_http(server: LocalTriton, method: str, path: str) -> None:
    def status(headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(server.http_url, timeout=10)
        connection.request(method, path, "{}" if method == "POST" else None, headers)
        code = connection.getresponse().status
        connection.close()
        return code

    assert status({}) == 403
    assert status({HEADER: "guessed"}) == 403
    if path.endswith(("index", "status")):
        assert status({HEADER: server.control.key}) == 200


def test_what_only_an_operator_may_do_is_closed_over_grpc(server: LocalTriton) -> None:
    client = triton_grpc.InferenceServerClient(server.grpc_url)
    for ask in (
        client.get_model_repository_index,
        client.get_system_shared_memory_status,
        client.get_trace_settings,
        client.get_log_settings,
        lambda **more: client.load_model("missrec", **more),
        lambda **more: client.unload_model("missrec", **more),
    ):
        for headers in ({}, {HEADER: "guessed"}):
            with pytest.raises(InferenceServerException, match="[Rr]estrict|expecting"):
                ask(headers=headers)
    key = {f"triton-grpc-protocol-{HEADER}": server.control.key}
    assert client.get_model_repository_index(headers=key).models
    assert client.is_model_ready("missrec")
    client.close()


def test_http_can_stay_closed_while_grpc_answers(exported: Path, server: LocalTriton, bundle: Path) -> None:
    sessions = [["ware-3-ü"], ["ware-1-ü", "ware-2-ü"]]
    with MISSRecClient(server.grpc_url) as client:
        expected = client.recommend(sessions, 3)
    with LocalTriton(exported / "repository", http=False) as closed:
        with MISSRecClient(closed.grpc_url) as client:
            answers = client.recommend(sessions, 3)
        assert [answer.item_ids for answer in answers] == [answer.item_ids for answer in expected]
        assert set(closed.ports) == {"grpc", "metrics"}
        ports = listening(closed.pid)
        assert ports == {closed.ports["grpc"], closed.ports["metrics"]}
        with pytest.raises(ServingError, match="the HTTP endpoint is closed"):
            _ = closed.http_url
        assert "missrec" in closed.control.ready()


def test_the_server_listens_on_the_loopback_interface_only(server: LocalTriton) -> None:
    assert listening(server.pid) == set(server.ports.values())
    assert listening(server.pid, "0100007F") == set(server.ports.values())


def listening(pid: int, address: str | None = None) -> set[int]:
    """Return the TCP ports that a process listens on, of any address or of one as /proc writes it."""
    own = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[index] for index in (1, 3, 9))
            host, port = local.split(":")
            if (
                state == "0A" and f"socket:[{inode}]" in own and address in (None, host[-8:])
            ):  # gRPC binds ::ffff:127.0.0.1
                ports.add(int(port, 16))
    return ports


def test_the_key_is_another_one_at_every_start_and_in_no_log(server: LocalTriton, exported: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", server.control.key)
    assert server.control.key not in server.log_file.read_text(errors="replace")
    assert len(CLOSED) == 4
    assert not (exported / "repository" / ".server.json").exists()


@pytest.mark.parametrize(
    ("awaited", "state", "share", "ended"),
    [
        (True, "S", 0.001, True),
        (False, "S", 0.001, False),  # it is loaded and waits for requests
        (True, "R", 0.5, False),  # it ends, and frees its memory
        (True, "T", 0.0, False),  # somebody examines it
        (True, "Z", 0.0, False),
    ],
)
def test_only_a_process_that_triton_waits_for_and_that_does_nothing_is_ended(
    monkeypatch: pytest.MonkeyPatch, awaited: bool, state: str, share: float, ended: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr(stubs, "awaited_by", lambda server: {7} if awaited else set())
    monkeypatch.setattr(stubs, "stubs_of", lambda server: {7: Stub(7, "missrec_ranker_0_0", state, share * clock[0])})
    monkeypatch.setattr(StubWatch, "_watch", lambda self: None)  # what its thread sees would count, at another clock
    watch = StubWatch(os.getpid())
    seen = []
    for second in range(15):
        clock[0] = float(second)
        seen.append(list(watch.idle(clock[0])))
    assert seen == [[]] * 10 + [[7]] * 5 if ended else seen == [[]] * 15


@pytest.mark.parametrize(("program", "ended"), [("triton_python_backend_stub", True), ("sleep", False)])
def test_no_other_child_of_the_server_is_ended(monkeypatch: pytest.MonkeyPatch, program: str, ended: bool) -> None:
    """What a thread of the server starts and awaits, such as a program that unpacks an environment, may be silent."""
    asked = threading.Semaphore(0)
    with subprocess.Popen([program, "60"], executable=shutil.which("sleep")) as child:
        given_up = {child.pid}

        def silent(*_: object) -> set[int]:
            asked.release()
            return given_up

        monkeypatch.setattr(StubWatch, "silent", silent)
        watch = StubWatch(os.getpid())
        try:
            assert all(asked.acquire(timeout=60) for _ in range(2))  # the first one's answer has been followed
            assert (child.wait(60) if ended else child.poll()) == (-signal.SIGKILL if ended else None)
        finally:
            watch.stop()
            child.kill()
