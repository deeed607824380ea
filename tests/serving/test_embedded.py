from __future__ import annotations

import socket
from pathlib import Path

import pytest

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.triton.environment import EmbeddedTriton, check_libc, check_numpy, find_stub, reason_in
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.ports import choose_ports


@pytest.mark.parametrize(("name", "version"), [("glibc", "2.31"), ("glibc", "2.34"), ("", ""), ("libc", "0.1")])
def test_a_c_library_that_cannot_run_the_server_is_refused(name: str, version: str) -> None:
    with pytest.raises(ServingError, match="glibc 2.35 or newer"):
        check_libc(name, version)


@pytest.mark.parametrize("version", ["2.35", "2.36", "2.41", "3.0"])
def test_newer_c_libraries_pass(version: str) -> None:
    check_libc("glibc", version)


def test_numpy_2_is_refused_before_it_corrupts_tensors() -> None:
    check_numpy("1.26.4")
    with pytest.raises(ServingError, match="numpy 2.3.5; expected: numpy below 2"):
        check_numpy("2.3.5")


def test_a_python_without_a_stub_is_told_which_have_one(tmp_path: Path) -> None:
    for version in ("3.8", "3.10", "3.11"):
        folder = tmp_path / "python_backend_stubs" / version
        folder.mkdir(parents=True)
        (folder / "triton_python_backend_stub").touch()
    with pytest.raises(ServingError, match=r"Python 3\.99 has no stub .*; expected: one of Python 3\.8, 3\.10, 3\.11"):
        find_stub(tmp_path, (3, 99))


def test_a_python_without_shared_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "python_backend_stubs" / "3.11"
    folder.mkdir(parents=True)
    (folder / "triton_python_backend_stub").touch()
    for named in ("libpython3.11.a", "libpython-that-is-nowhere.so.1.0"):
        monkeypatch.setattr("sysconfig.get_config_var", {"INSTSONAME": named, "LIBDIR": str(tmp_path)}.get)
        with pytest.raises(ServingError, match="comes without a shared libpython"):
            find_stub(tmp_path, (3, 11))


def test_a_missing_server_is_named_with_the_command_that_installs_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("missrec_t4r.serving.triton.environment.check_libc", lambda *version: None)
    with pytest.raises(ServingError, match=r"pip install 'missrec-t4r\[triton\]'"):
        LocalTriton(exported / "repository").__enter__()


@pytest.mark.parametrize("what", ["nothing", "bundle"])
def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path, bundle: Path, what: str) -> None:
    with pytest.raises(ServingError, match="is not a model repository"):
        LocalTriton(bundle if what == "bundle" else tmp_path / "nowhere").__enter__()


def test_an_occupied_port_is_refused_before_anything_starts(exported: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=rf"grpc port {port} cannot be used"):
            choose_ports({"http": 0, "grpc": port, "metrics": 0})


def test_ports_are_free_and_different() -> None:
    ports = choose_ports({"http": 0, "grpc": 0, "metrics": 0})
    assert len(set(ports.values())) == 3
    assert choose_ports(ports) == ports
    with pytest.raises(ServingError, match="cannot be used"):
        choose_ports({"http": ports["http"], "grpc": ports["http"]})


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ServingError, match="a free port from 1 to 65535"):
        choose_ports({"http": port})


def test_the_reason_in_a_log_is_our_own_error_or_its_last_complaint() -> None:
    ours = (
        "E0101 12:00:00 7 x.cc:1] no\nUNAVAILABLE: Internal: BundleError: a.json is missing; expected: it.\n\nAt:\n x"
    )
    assert reason_in(ours) == "BundleError: a.json is missing; expected: it."
    theirs = 'I0101 12:00:00.1 7 a.cc:1] "hello"\nE0101 12:00:00.2 7 b.cc:2] "no backend library"\nI0101 bye'
    assert reason_in(theirs) == "no backend library"
    assert reason_in("loader: cannot open libfoo.so\n") == "loader: cannot open libfoo.so"
    assert reason_in("") == "the log is empty"


def test_a_server_that_cannot_run_says_why(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "server" / "bin" / "tritonserver"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho cannot find libcuda >&2\nexit 3\n")
    program.chmod(0o755)
    (tmp_path / "server" / "backends" / "python").mkdir(parents=True)
    stub = tmp_path / "stub"
    stub.touch()
    monkeypatch.setattr(EmbeddedTriton, "find", lambda: EmbeddedTriton(tmp_path / "server", stub))
    server = LocalTriton(exported / "repository")
    with pytest.raises(ServingError, match="Triton ended with code 3: cannot find libcuda"):
        server.__enter__()
    assert not server._folder

    program.write_text(
        "#!/bin/sh\necho \"Internal: ModuleNotFoundError: No module named 'missrec_t4r.old'\" >&2\nexit 1\n"
    )
    with pytest.raises(ServingError, match="another version of missrec-t4r wrote this folder: write it again with"):
        LocalTriton(exported / "repository").__enter__()
