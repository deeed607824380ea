"""Commands in processes of their own that begin with the libraries loaded: a fork server of the standard library.

To import torch, scikit-learn, NVTabular and Transformers4Rec takes longer than most commands of the tests take to run.
The server does it once for each worker of the tests. A command is a fork of it that imports our modules itself and has
a folder, environment variables, streams, signals and an exit code of its own. What a test wants to know of a real
interpreter, such as which modules are imported, needs `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = "torch._dynamo sklearn.decomposition nvtabular transformers4rec.torch tritonclient.grpc.aio optuna".split()
"""Imported by the server; one that is not installed is left out."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


class Running:
    """A command that was started, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, words: Sequence[object], cwd: Path | None, env: Mapping[str, str] | None) -> None:
        self.words, self._folder = [str(word) for word in words], tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for stream in self._streams:
            stream.touch()
        given = (self.words, cwd or Path.cwd(), dict(os.environ if env is None else env), self._streams)
        self._process = _server.Process(target=_become, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, error = (stream.read_text(encoding="utf-8") for stream in self._streams)
        return out, error


def start(words: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Running:
    """Start ``python WORDS...``: a script, ``-m module`` or ``-c code``, and its arguments."""
    return Running(words, cwd, env)


def run(
    words: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS...`` to its end, as `subprocess.run` does with the output captured."""
    process = start(words, cwd=cwd, env=env)
    out, error = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.words, process.wait(), out, error)


def of_group(group: int) -> list[int]:
    """Return the running processes of a group; one that has ended is left out, also where nobody asks for its end."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def _become(words: list[str], cwd: Path, env: dict[str, str], streams: list[Path]) -> None:
    for number, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first, *rest = words
    own = cwd if first in ("-m", "-c") else Path(first).resolve().parent
    sys.path[:0] = [str(own), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = rest if first == "-m" else words
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends without
