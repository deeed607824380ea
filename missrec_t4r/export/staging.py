"""Folders that appear whole or not at all: written aside, renamed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from missrec_t4r.aside import replacing
from missrec_t4r.errors import BundleError


@contextmanager
def staged(target: Path, landmark: str) -> Iterator[Path]:
    """Give an empty folder beside ``target`` and rename it into place when the block ends without an error.

    Parameters
    ----------
    target : Path
        Replaced whole if it exists.
    landmark : str
        A file that tells that an existing ``target`` is ours to replace.

    Raises
    ------
    BundleError
        ``target`` exists and is neither empty nor ours: nothing of the user's is ever deleted.
    """
    target = target.absolute()
    refuse_foreign(target, landmark)
    with replacing(target) as aside:
        yield aside
        for path in aside.rglob("*"):
            path.chmod(path.stat().st_mode | 0o444)  # safetensors lets only its writer read; a server is somebody else


def refuse_foreign(target: Path, landmark: str) -> None:
    """Raise where ``target`` is neither new, nor empty, nor ours: nothing of the user's is ever deleted."""
    if target.exists() and not (target.is_dir() and ((target / landmark).is_file() or not any(target.iterdir()))):
        raise BundleError(
            f"{target} exists and holds no {landmark}", "a new folder, or one we wrote", "choose another --out"
        )
