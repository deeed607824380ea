"""Locks: changes of one folder by several commands run one after the other, so that none of them is lost."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from missrec_t4r.errors import MISSRecError, ServingError
from missrec_t4r.io.atomic import is_same, translate_disk_errors

log = logging.getLogger(__name__)

_HELD: ContextVar[frozenset[Path]] = ContextVar("_HELD", default=frozenset())
"""Folders that this thread has locked: a command that calls another one does not wait for itself."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""Errors of file systems without locks (some network disks)."""


@contextmanager
def locked(folder: Path, *, wait: bool = True, error: type[MISSRecError] = ServingError) -> Iterator[None]:
    """Let no other process change ``folder`` within the block.

    The lock is on ``.NAME.lock`` beside the folder, as the folder itself may be replaced; the file is removed at the
    end. The kernel releases the lock when its process ends, in whatever way.

    Parameters
    ----------
    folder : Path
        Existing or not; without its parent there is nothing to lock.
    wait : bool
        Wait for a process that has the lock, with a warning that names it; False refuses.
    error : type of MISSRecError
        Raised where it refuses.

    Raises
    ------
    MISSRecError
        Another process changes the folder, and ``wait`` is False.
    """
    folder = folder.resolve()
    if folder in _HELD.get() or not folder.parent.is_dir():
        yield
        return
    file = folder.with_name(f".{folder.name}.lock")
    descriptor = _acquire(file, folder, wait, error)
    held = _HELD.set(_HELD.get() | {folder})
    try:
        yield
    finally:
        _HELD.reset(held)
        file.unlink(missing_ok=True)  # while it is locked: `_acquire` notices
        os.close(descriptor)


def _acquire(file: Path, folder: Path, wait: bool, error: type[MISSRecError]) -> int:
    """Return the descriptor of the locked file."""
    while True:
        with translate_disk_errors(folder):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, folder, wait, error)
            if is_same(file, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process before has removed the file: lock the new one


def _lock(descriptor: int, folder: Path, wait: bool, error: type[MISSRecError]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        by = f"process {os.pread(descriptor, 20, 0).decode() or 'unknown'}"
        if not wait:
            raise error(f"{folder} is being changed by {by}", "one change at a time", "wait until it ends") from None
        log.warning(f"{folder} is being changed by {by}: waiting until it ends")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as failed:
        if failed.errno not in _NO_LOCKS:
            raise
        log.warning(f"{folder} is on a file system without locks ({failed}): run one change of it at a time")
