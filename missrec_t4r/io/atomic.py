"""Atomic directory and file writes, clean-up after killed processes, readable disk-full errors."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from missrec_t4r.errors import DataError, MISSRecError

_HOST = re.sub(r"[^a-z0-9]", "", platform.node().lower())[:20] or "host"
"""In the names of unfinished folders: process numbers mean something on one machine, or in one container, only."""
T = TypeVar("T")
_PATIENCE = 30.0
"""Seconds for which a folder that changes while it is read is read again."""
_PAUSE = 0.01
"""Seconds: between the two renames of a file system that cannot exchange names there may be no folder."""
_OLD = "-old"
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_FULL_WORDS = re.compile(r"no space left|file too large|disk quota|\d+ requested and \d+ written")  # the last: numpy


@contextmanager
def replace_dir(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place if all goes well and vanishes if not.

    What killed writers left beside ``out`` is cleaned up first: only those of this machine that run no more.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    recover(out)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-{_HOST}-{os.getpid()}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        move_into_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, out: Path) -> None:
    """Let ``folder`` be ``out`` in one step; what stood there goes.

    Whoever opens ``out`` meanwhile finds the old or the new one, never none, and so does who comes after a kill. On a
    file system that cannot exchange names (some network disks) there is a moment between two renames; `recover` then
    brings the old one back.
    """
    if not out.exists():
        folder.rename(out)
        return
    exchange(folder, out)
    shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders; in one step where the system can (Linux, on most file systems).

    Raises
    ------
    OSError
        A name cannot be written; both are as they were.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _EXCHANGE) == 0:
        return
    middle = other.with_name(f".{other.name}-{_HOST}-{os.getpid()}-between{_OLD}")
    other.rename(middle)
    try:
        one.rename(other)
    except BaseException:
        middle.rename(other)
        raise
    middle.rename(one)


def read_consistently(folder: Path, read: Callable[[Path], T]) -> T:
    """Return what ``read`` makes of a folder of which it saw one version only; it is asked again where that changed.

    Errors of ``read`` pass unless the folder was replaced meanwhile: a file that is gone may be the old version's.

    Raises
    ------
    DataError
        The folder was replaced during every attempt of half a minute.
    """
    patience = time.monotonic() + _PATIENCE
    while time.monotonic() < patience:
        with _held(folder) as still_there:
            try:
                answer = read(folder)
            except Exception:
                time.sleep(_PAUSE)
                if still_there():
                    raise
                continue
            if still_there():
                return answer
    raise DataError(
        f"{folder} was replaced whenever it was read, for {_PATIENCE:g} s",
        "a folder that rests for as long as reading it takes",
        "let its writer pause, or read a copy",
    )


@contextmanager
def _held(folder: Path) -> Iterator[Callable[[], bool]]:
    """Yield what tells whether the folder is still the same one; held open, so that its number is not given away."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield lambda: not folder.exists()
        return
    try:
        yield lambda: _is(folder, handle)
    finally:
        os.close(handle)


def _is(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def recover(out: Path) -> None:
    """Clean up after writers killed on this machine: drop what they had begun, restore what they had moved."""
    ours = re.compile(rf"\.{re.escape(out.name)}-{re.escape(_HOST)}-(\d+)-[a-z0-9_]+({_OLD})?")
    left = [(path, found) for path in out.parent.iterdir() if (found := ours.fullmatch(path.name))]
    for path, found in left:
        if _alive(int(found[1])):
            continue
        if found[2] and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def translate_disk_errors(out: Path | str) -> Iterator[None]:
    """Say what a full disk, a quota, a file-size limit or a read-only place mean for ``out``.

    Raises
    ------
    DataError
        One of them was met; what stood at ``out`` before still does.
    """
    try:
        yield
    except Exception as error:
        if is_permission_denied(error):
            raise DataError(
                f"{out} cannot be written ({error})", "a folder that this user may write", "choose another --out"
            ) from error
        if is_disk_full(error):
            raise DataError(
                f"the disk ran full while {out} was written ({error})",
                "room for the whole output",
                "free some space or choose another disk; nothing was changed",
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a file-size limit was met, whichever library raised it."""
    return getattr(error, "errno", None) in _FULL or bool(_FULL_WORDS.search(str(error).lower()))


def is_permission_denied(error: BaseException) -> bool:
    """Whether an error says that this user may not write or read there."""
    return isinstance(error, OSError) and error.errno in _FORBIDDEN


@contextmanager
def atomic_write_dir(
    out: Path, marker: str, kind: str = "data folder", error: type[MISSRecError] = DataError
) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that replaces it if the block succeeds and vanishes if not.

    Every file becomes readable for all users: safetensors lets only its writer read, and a server is somebody else.

    Parameters
    ----------
    out : Path
        Replaced whole if it exists.
    marker : str
        A file by which an existing ``out`` is known as one that we wrote.
    kind : str
        Name of the folder in messages.
    error : type of MISSRecError
        Raised where ``out`` must not be replaced.

    Raises
    ------
    MISSRecError
        ``out`` is neither new, nor empty, nor ours (``error``); or the disk is full or read-only (`DataError`).
    """
    out = out.absolute()
    refuse_unmanaged(out, marker, kind, error)
    with translate_disk_errors(out), replace_dir(out) as folder:
        yield folder
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o444)


def refuse_unmanaged(out: Path, marker: str, kind: str = "data folder", error: type[MISSRecError] = DataError) -> None:
    """Raise ``error`` where ``out`` is neither new, nor empty, nor ours: nothing of the user's is ever replaced."""
    with translate_disk_errors(out):
        if out.exists() and not (out.is_dir() and ((out / marker).is_file() or not any(out.iterdir()))):
            found = f"{out} exists and is no {kind}: it holds no {marker}"
            raise error(found, f"a new folder, or an older {kind}", "choose another --out")


@contextmanager
def atomic_write_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``file`` whose content replaces it if the block succeeds.

    Raises
    ------
    DataError
        The disk is full or read-only.
    """
    with translate_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
            temporary = Path(folder) / file.name
            yield temporary
            temporary.replace(file)
