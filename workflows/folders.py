"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from missrec_t4r.aside import disk_in_words, replacing
from missrec_t4r.errors import DataError


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
    refuse_foreign(out, landmark, kind)
    with disk_in_words(out), replacing(out) as folder:
        yield folder


def refuse_foreign(out: Path, landmark: str, kind: str = "data folder") -> None:
    """Raise where ``out`` is neither new, nor empty, nor ours: nothing of the user's is ever replaced.

    Raises
    ------
    DataError
        It is so; or this user may not look into it.
    """
    with disk_in_words(out):
        if out.exists() and not (out.is_dir() and ((out / landmark).is_file() or not any(out.iterdir()))):
            raise DataError(f"{out} exists and is no {kind}", f"a new or an older {kind}", "choose another --out")


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
