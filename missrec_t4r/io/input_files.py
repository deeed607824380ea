"""Files of users by pattern or folder, as Spark, Arrow and Dask find them: hidden names are left out.

A name that begins with ``_`` or ``.`` is not that of a table: ``_delta_log``, ``_temporary``, ``_SUCCESS``,
``.ipynb_checkpoints``. A folder of Delta Lake is refused: which of its files are current is in its log.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
from pathlib import Path

from missrec_t4r.errors import DataError

log = logging.getLogger(__name__)

_HIDDEN = ("_", ".")
_DELTA_LOG = "_delta_log"
_OF_MERLIN = "_metadata.json"
"""The file beside the tables of a data set that has the suffix of one."""


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of these suffixes in a folder, not in its subfolders; in the order of their names.

    Raises
    ------
    DataError
        It is a Delta Lake table.
    """
    return [path for path in files_of(f"{glob.escape(str(folder))}/*", suffixes) if path.name.endswith(suffixes)]


def files_of(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the paths of a pattern in the order of their names; hidden ones only where the pattern has such a name.

    What is left out for a ``_`` and has one of the suffixes is named in the log.

    Raises
    ------
    DataError
        There are files of a Delta Lake table among them.
    """
    asked = [part for part in Path(pattern).parts if part.startswith(_HIDDEN)]
    found: list[Path] = []
    left_out: dict[str, Path] = {}  # hidden name -> a path with it
    for path in sorted(map(Path, glob.glob(pattern, recursive=True))):
        names = [name for name in path.parts if name.startswith(_HIDDEN)]
        unasked = [name for name in names if not any(fnmatch.fnmatchcase(name, part) for part in asked)]
        if not unasked:
            found.append(path)
        elif path.name.endswith(suffixes) and unasked[0] != _OF_MERLIN:
            left_out.setdefault(unasked[0], path)
    _refuse_delta_tables(found)
    if left_out:
        shown = ", ".join([*left_out][:3]) + (", …" if len(left_out) > 3 else "")
        example = next(iter(left_out.values()))
        log.warning(f"left out by its name: {shown}; name it to read it, as in '{example}'")
    return found


def is_hidden(path: Path) -> bool:
    """Whether a relative path has a name that patterns and folders leave out."""
    return any(name.startswith(_HIDDEN) for name in path.parts)


def _refuse_delta_tables(files: list[Path]) -> None:
    for folder in sorted({folder for file in files for folder in file.parents}):
        if (folder / _DELTA_LOG).is_dir():
            name = repr(str(folder))
            raise DataError(
                f"{folder} is a Delta Lake table: some of its files may hold rows that were changed or deleted since",
                "its present rows as plain parquet",
                f"write them, for example by deltalake.DeltaTable({name}).to_pandas().to_parquet('new.parquet') "
                f"or spark.read.format('delta').load({name}).write.parquet('new')",
            )
