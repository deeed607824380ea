"""Folders and files that appear whole or not at all, and a full or read-only disk in words."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from missrec_t4r.errors import DataError

_HOST = re.sub(r"[^a-z0-9]", "", platform.node().lower())[:20] or "host"
"""In the names of unfinished folders: process numbers mean something on one machine, or in one container, only."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_FULL_WORDS = ("no space left", "file too large", "disk quota", "requested and")  # the last is numpy's, without errno


@contextmanager
def written_aside(out: Path, landmark: str, kind: str = "data folder") -> Iterator[Path]:
    """Yield a folder beside ``out`` that takes its place if all goes well and vanishes if not.

    Parameters
    ----------
    out : Path
        Replaced whole if it exists.
    landmark : str
        A file that tells that an existing ``out`` is ours to replace.
    kind : str
        How messages call the folder.

    Raises
    ------
    DataError
        ``out`` is neither new, nor empty, nor ours; or the disk is full or read-only.
    """
    if out.exists() and not (out.is_dir() and ((out / landmark).is_file() or not any(out.iterdir()))):
        raise DataError(f"{out} exists and is no {kind}", f"a new or an older {kind}", "choose another --out")
    with disk_in_words(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _recover(out)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-{_HOST}-{os.getpid()}-", dir=out.parent))
        old = folder.with_name(folder.name + "-old")
        try:
            yield folder
            folder.chmod(0o755)
            if out.exists():
                out.rename(old)
            folder.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _recover(out: Path) -> None:
    """Clean up after runs that were killed on this machine: drop what they had begun, restore what they had moved."""
    ours = re.compile(rf"\.{re.escape(out.name)}-{re.escape(_HOST)}-(\d+)-[a-z0-9_]+(-old)?")
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
def file_aside(file: Path) -> Iterator[Path]:
    """Yield a path beside ``file`` whose content takes its place if all goes well.

    Raises
    ------
    DataError
        The disk is full or read-only.
    """
    with disk_in_words(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
            aside = Path(folder) / file.name
            yield aside
            aside.replace(file)


@contextmanager
def disk_in_words(out: Path) -> Iterator[None]:
    """Say what a full disk, a quota, a file-size limit or a read-only place mean for ``out``.

    Raises
    ------
    DataError
        One of them was met; what stood at ``out`` before still does.
    """
    try:
        yield
    except Exception as error:
        number, words = getattr(error, "errno", None), str(error).lower()
        if number in _FORBIDDEN and isinstance(error, OSError):
            raise DataError(
                f"{out} cannot be written ({error})", "a folder that this user may write", "choose another --out"
            ) from error
        if number in _FULL or any(known in words for known in _FULL_WORDS):
            raise DataError(
                f"the disk ran full while {out} was written ({error})",
                "room for the whole output",
                "free some space or choose another disk; nothing was changed",
            ) from error
        raise
