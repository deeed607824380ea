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
"""Part of every temporary name: process ids are unique within one machine or container only."""
T = TypeVar("T")
_RETRY_SECONDS = 30.0
"""How long a folder that is replaced while it is read is read again, in seconds."""
_RETRY_PAUSE = 0.01
"""Pause before the next try, in seconds: a file system that cannot exchange names has no folder between two renames."""
_OLD = "-old"
_RENAME_EXCHANGE = 2  # flag of Linux's renameat2
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
# Messages of libraries that set no errno; the last one is NumPy's
_DISK_FULL_MESSAGES = re.compile(r"no space left|file too large|disk quota|\d+ requested and \d+ written")


@contextmanager
def replace_dir(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``out`` that replaces it if the block succeeds and is deleted if not.

    Every file becomes readable for all users: safetensors files are readable by their writer only, and a server runs as
    another user.
    """
    with temporary_dir(out) as folder:
        yield folder
        folder.chmod(0o755)
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o444)
        move_into_place(folder, out)


@contextmanager
def temporary_dir(out: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``out``; what is left of it after the block is deleted.

    Temporary folders of killed processes of this machine are removed first; those of running processes are left alone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    recover(out)
    folder = Path(tempfile.mkdtemp(prefix=_temporary_prefix(out), dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out`` in one step and delete the folder that ``out`` was before.

    A process that opens ``out`` meanwhile reads the old or the new folder; there is never none, also after a kill. On a
    file system that cannot exchange names (some network disks) there is a moment between two renames without a folder;
    `recover` then restores the old one.
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
        A name cannot be written; both folders keep their names.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd = -100  # AT_FDCWD: paths are relative to the working directory
    if renameat2 is not None and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    middle = other.with_name(f"{_temporary_prefix(other)}between{_OLD}")
    other.rename(middle)
    try:
        one.rename(other)
    except BaseException:
        middle.rename(other)
        raise
    middle.rename(one)


def read_consistently(folder: Path, read: Callable[[Path], T]) -> T:
    """Return the result of ``read`` on one version of a folder; repeat the call if the folder was replaced meanwhile.

    Errors of ``read`` are raised unless the folder was replaced during the call: a missing file may be of the old one.

    Raises
    ------
    DataError
        The folder was replaced during every try of half a minute.
    """
    deadline = time.monotonic() + _RETRY_SECONDS
    while time.monotonic() < deadline:
        with _watch(folder) as is_unchanged:
            try:
                result = read(folder)
            except Exception:
                time.sleep(_RETRY_PAUSE)
                if is_unchanged():
                    raise
                continue
            if is_unchanged():
                return result
    raise DataError(
        f"{folder} was replaced whenever it was read, for {_RETRY_SECONDS:g} s",
        "a folder that stays unchanged while it is read",
        "pause the process that writes it, or read a copy",
    )


@contextmanager
def _watch(folder: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether ``folder`` is still the same folder.

    The folder is kept open meanwhile, so that the system does not give its inode number to a new one.
    """
    try:
        descriptor = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))  # it may be a folder to enter, not to list
    except FileNotFoundError:
        yield lambda: not folder.exists()
        return
    try:
        yield lambda: is_same(folder, descriptor)
    finally:
        os.close(descriptor)


def is_same(path: Path, descriptor: int) -> bool:
    """Return whether an open descriptor is of what is now at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def recover(out: Path) -> None:
    """Remove the temporary folders of killed processes of this machine; restore ``out`` if one had moved it away."""
    if not out.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(out.name)}-{re.escape(_HOST)}-(\d+)-[a-z0-9_]+({_OLD})?")
    temporary = [(path, match) for path in out.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    for path, match in temporary:
        if is_running(int(match[1])):
            continue
        if match[2] and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _temporary_prefix(out: Path) -> str:
    return f".{out.name}-{_HOST}-{os.getpid()}-"


def is_running(process: int) -> bool:
    """Return whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def translate_disk_errors(out: Path | str) -> Iterator[None]:
    """Raise `DataError` for a full disk, an exceeded quota or file-size limit, and an ``out`` that cannot be written.

    Raises
    ------
    DataError
        The content of ``out`` is what it was before the block.
    """
    try:
        yield
    except Exception as error:
        if is_permission_denied(error):
            raise DataError(
                f"{out} cannot be written ({error})", "a folder that this user may write", "choose another --out"
            ) from error
        if is_in_the_way(error):
            raise DataError(f"{out} cannot be written ({error})", "folders above it", "choose another --out") from error
        if is_disk_full(error):
            reason = (error.__cause__ if isinstance(error, DataError) else None) or error  # of an output in this one
            raise DataError(
                f"the disk ran full while {out} was written ({reason})",
                "room for the whole output",
                "free some space or choose another disk; nothing was changed",
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means a full disk, a quota or a file-size limit, whichever library raised it."""
    return getattr(error, "errno", None) in _DISK_FULL or bool(_DISK_FULL_MESSAGES.search(str(error).lower()))


def is_permission_denied(error: BaseException) -> bool:
    """Return whether an error means that this user may not read or write the path."""
    return isinstance(error, OSError) and error.errno in _DENIED


def is_in_the_way(error: BaseException) -> bool:
    """Return whether a file is where a folder is meant, or a folder where a file is."""
    if isinstance(error, FileExistsError):
        return os.path.isfile(error.filename or "")
    return isinstance(error, NotADirectoryError | IsADirectoryError)


@contextmanager
def atomic_write_dir(
    out: Path, marker: str, kind: str = "data folder", error: type[MISSRecError] = DataError
) -> Iterator[Path]:
    """Yield the folder of `replace_dir`, where ``out`` may be replaced and the disk allows it.

    Parameters
    ----------
    out : Path
        Replaced whole if it exists.
    marker : str
        Marker file: an existing ``out`` that holds it was written by missrec and may be replaced.
    kind : str
        Name of the folder in messages.
    error : type of MISSRecError
        Raised where ``out`` must not be replaced.

    Raises
    ------
    MISSRecError
        ``out`` is neither new, nor empty, nor written by missrec (``error``); or the disk is full or read-only
        (`DataError`).
    """
    out = out.resolve()  # what a link names is replaced, not the link
    refuse_unmanaged(out, marker, kind, error)
    with translate_disk_errors(out), replace_dir(out) as folder:
        yield folder


def refuse_unmanaged(
    out: Path,
    marker: str,
    kind: str = "data folder",
    error: type[MISSRecError] = DataError,
    cure: str = "choose another --out",
) -> None:
    """Raise ``error`` if ``out`` is neither new, nor empty, nor written by missrec (it holds no ``marker``)."""
    with translate_disk_errors(out):
        if out.exists() and not (out.is_dir() and ((out / marker).is_file() or not any(out.iterdir()))):
            found = f"{out} exists and is not a {kind}: it holds no {marker}"
            raise error(found, f"a new folder, or an older {kind}", cure)


@contextmanager
def atomic_write_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``file``, of the same name, that replaces it if the block succeeds.

    What a link names is replaced, not the link.

    Raises
    ------
    DataError
        The disk is full or read-only.
    """
    with translate_disk_errors(file):
        file = file.resolve() if file.is_symlink() else file
        file.parent.mkdir(parents=True, exist_ok=True)
        recover(file)
        with tempfile.TemporaryDirectory(prefix=_temporary_prefix(file), dir=file.parent) as folder:
            temporary = Path(folder) / file.name
            yield temporary
            temporary.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 as `atomic_write_file` does."""
    with atomic_write_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link_or_copy(file: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that cannot be."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
