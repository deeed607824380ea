"""Stubs, the processes in which Triton's Python backend runs the models: find those that it has given up.

The backend gives a stub up that shows no sign of life for a second, as on a machine that is busy elsewhere. While a
model loads, it then frees the memory that both share, and waits for the stub's end without ending it. The stub lives:
either it goes on with that memory, and the server crashes, or it waits for a request, and the load never returns.
`StubWatch` ends it first. Triton then answers that the stub is not healthy, and the load can be repeated.
What the kernel says of the processes is all that is read; where there is no ``/proc``, nothing is found.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

UNHEALTHY = "is not healthy"
"""Fragment of Triton's message about a stub that it has given up."""
_PROGRAM = b"triton_python_backend_stub"
_NAME = 8
"""Argument of a stub that names the instance of its model, such as ``missrec_ranker_v3_0_0``."""
_WAIT = {"x86_64": "61", "aarch64": "260"}
"""Number of the system call ``wait4``."""
_POLL_SECONDS = 0.25
"""Between two looks for stubs that load."""
_LOADING_POLL_SECONDS = 0.05
_SILENT_SECONDS = 0.6
"""A stub shows a sign of life every 0.3 s; Triton gives it up after a second without one."""
_CHECK_SECONDS = 1.0
_IDLE_SECONDS = 10.0
"""A stub that ends frees its memory meanwhile, which takes time on the processor."""
_IDLE_SHARE = 0.02
"""A waiting stub looks into its queues a few times a second."""


class Stub(NamedTuple):
    """A process that runs a model."""

    pid: int
    model: str
    """Instance of a model, such as ``missrec_ranker_v3_0_0``."""
    state: str
    """Letter of the kernel: R runs, S sleeps, D waits for a disk, T is stopped, Z has ended."""
    seconds: float
    """Time on the processor since its start."""


def stubs_of(server: int) -> dict[int, Stub]:
    """Return the stubs of a server by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            program = (folder / "cmdline").read_bytes().split(b"\0")[0]
            if int(fields[1]) == server and (program.endswith(_PROGRAM) or fields[0] == "Z"):
                seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                found[int(folder.name)] = Stub(int(folder.name), _name(int(folder.name)), fields[0], seconds)
    return found


def _name(stub: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{stub}/cmdline").read_bytes().split(b"\0")[_NAME].decode(errors="replace")
    return ""


def awaited_by(server: int) -> set[int]:
    """Return the processes for whose end a thread of the server waits."""
    return {pid for thread in _threads(server) if (pid := _awaited(thread)) is not None}


def _threads(process: int) -> list[Path]:
    """Return the folders of the threads of a process as they began, which their numbers may not; none after its end."""
    with contextlib.suppress(OSError):
        return [*Path(f"/proc/{process}/task").iterdir()]
    return []


def _awaited(thread: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        call, process = (thread / "syscall").read_text().split()[:2]
        if call == _WAIT.get(platform.machine()):
            return int(process, 16)
    return None


def loading(server: int) -> dict[int, int]:
    """Return the stubs that load their model, and the thread of the server that started each: it ends with the load."""
    found = {}
    for folder in _threads(server)[1:]:  # the first one inherits those of threads that have ended
        with contextlib.suppress(OSError, ValueError):
            found.update(dict.fromkeys(map(int, (folder / "children").read_text().split()), int(folder.name)))
    return found


def sign_of_life(stub: int) -> str:
    """Return a text that changes whenever the thread runs that answers Triton; empty before a stub has one."""
    with contextlib.suppress(OSError, IndexError):
        return (_threads(stub)[1] / "schedstat").read_text()
    return ""


class StubWatch:
    """Thread that ends the stubs of a server for whose end it waits in vain.

    A stub that was given up while it loads is ended before it runs again, since it would write to memory that the
    server has freed, and that ends the server. Any other one is ended once it has done nothing for a while.

    Parameters
    ----------
    server : int
        Process id of ``tritonserver``.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._done = threading.Event()
        self._idle: dict[int, tuple[float, float]] = {}
        """Process id -> when it was first found idle, and its time on the processor then."""
        self._alive: dict[int, tuple[float, str]] = {}
        """Process id -> when its last sign of life was seen, and the sign."""
        self._thread = threading.Thread(target=self._watch, name="stubs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        checked, pause = 0.0, _POLL_SECONDS
        while not self._done.wait(pause):
            now, stubs = time.monotonic(), loading(self._server)
            pause = _LOADING_POLL_SECONDS if stubs else _POLL_SECONDS
            given_up = self.silent(now, stubs)
            if now - checked >= _CHECK_SECONDS:
                given_up, checked = given_up | self.idle(now), now
            for pid in given_up & stubs_of(self._server).keys() if given_up else ():  # and no other child
                log.warning(f"Triton waits in vain for the end of {_name(pid)} (process {pid}): ending it")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def silent(self, now: float, stubs: dict[int, int]) -> set[int]:
        """Return those of the ``stubs`` without a sign of life whose end the thread that started them awaits."""
        self._alive = {pid: seen for pid, seen in self._alive.items() if pid in stubs}
        found = set()
        for pid, thread in stubs.items():
            if sign := sign_of_life(pid):
                since, last = self._alive.setdefault(pid, (now, sign))
                if sign != last:
                    self._alive[pid] = (now, sign)
                elif now - since >= _SILENT_SECONDS and _awaited(Path(f"/proc/{self._server}/task/{thread}")) == pid:
                    found.add(pid)
        return found

    def idle(self, now: float) -> set[int]:
        """Return the stubs that have done nothing for a while, in all of which the server has awaited their end."""
        awaited = awaited_by(self._server)
        stubs = stubs_of(self._server) if awaited else {}
        self._idle = {pid: since for pid, since in self._idle.items() if pid in awaited and pid in stubs}
        found = set()
        for pid in awaited & stubs.keys():
            stub = stubs[pid]
            started, seconds = self._idle.setdefault(pid, (now, stub.seconds))
            if stub.state in "tT" or stub.seconds - seconds > _IDLE_SHARE * max(now - started, 1.0):
                self._idle[pid] = (now, stub.seconds)  # it works, or somebody examines it
            elif now - started >= _IDLE_SECONDS and stub.state != "Z":
                found.add(pid)
        return found


def write_evidence(server: int, log_file: str) -> Path:
    """Write what a server and its stubs wait for, and the server's log, to a new file that nobody removes; return it.

    Parameters
    ----------
    server : int
        Process id of ``tritonserver``.
    log_file : str
        Triton's log; the file says so if it cannot be read.
    """
    descriptor, name = tempfile.mkstemp(prefix=f"missrec-triton-{server}-", suffix=".txt")
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in _report(server, log_file))
    return Path(name)


def _report(server: int, log_file: str) -> Iterator[str]:
    yield f"{time.strftime('%Y-%m-%d %H:%M:%S')}: load of the machine {_read('/proc/loadavg')}"
    yield f"the server waits for the end of processes {sorted(awaited_by(server)) or 'none'}"
    stubs = stubs_of(server)
    for pid in (server, *stubs):
        yield f"process {pid}: {stubs.get(pid) or 'the server'}; threads with state, wait channel and system call:"
        for thread in _threads(pid):
            state = _read(thread / "stat").rpartition(")")[2].split()[:1]
            what = (*state, _read(thread / "wchan"), _read(thread / "syscall"))
            yield f"  {thread.name} {_read(thread / 'comm')}: {' '.join(what)}"
    yield f"the log {log_file or '(unknown)'}:"
    yield _read(log_file)


def _read(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"({error.strerror})"
