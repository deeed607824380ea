"""Locks: one change of a folder at a time, whoever makes it, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from missrec_t4r import commands
from missrec_t4r.errors import BundleError, ConfigError
from missrec_t4r.io.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from missrec_t4r.io.lock import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_first_one_ends_even_if_it_is_killed(
    tmp_path: Path, repository: Path
) -> None:
    folder = tmp_path / "data"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with (
        pytest.raises(BundleError, match=rf"data is being changed by process {holder.pid}; expected: one change"),
        locked(folder, wait=False, error=BundleError),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(folder, wait=False):
        assert (tmp_path / ".data.lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_has_the_lock_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "latest").symlink_to("data")
    refused: list[bool] = []

    def other() -> None:
        try:
            with locked(tmp_path / "latest", wait=False):
                refused.append(False)
        except Exception:
            refused.append(True)

    with locked(tmp_path / "data"), locked(tmp_path / "data", wait=False):  # its own thread does not wait for itself
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused == [True]


def test_those_who_wait_come_one_after_the_other(tmp_path: Path) -> None:
    """The lock's file is removed with the lock: who waited for it must not share the folder with who made a new one."""
    file, inside, most = tmp_path / "count", [0], [0]
    file.write_text("0")

    def add() -> None:
        for _ in range(20):
            with locked(tmp_path / "data"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                file.write_text(str(int(file.read_text()) + 1))
                inside[0] -= 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (file.read_text(), most) == ("80", [1])


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "data"):
        assert "data is on a file system without locks" in caplog.text


def test_a_training_into_a_folder_that_another_one_writes_is_refused(tmp_path: Path) -> None:
    words = "run is being changed by process .*; expected: one change at a time. wait until it ends"
    with locked(tmp_path / "run"), ThreadPoolExecutor() as other:
        training = other.submit(commands.train, tmp_path / "data", tmp_path / "run", recipe="tiny")
        with pytest.raises(ConfigError, match=words):
            training.result()
