"""A long job's output in parts beside its file: what is finished is not computed again when the job is repeated."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.lock import locked
from missrec_t4r.serving.batch.parquet_io import require_file_name, write_tables

log = logging.getLogger(__name__)
T = TypeVar("T")

_KEY_FILE: Final = "made_from.json"


def write_in_parts(
    out: Path, key: str, batches: Iterable[T], compute: Callable[[T], tuple[pa.Table, Mapping[str, int]]]
) -> tuple[int, dict[str, int]]:
    """Write a table per batch to ``out`` and return its rows and the sums of the counts.

    The tables are in the folder ``.NAME.parts`` beside ``out`` until all are there; a job with the same key goes on
    after them. ``out`` is replaced atomically at the end. Another job with the same ``out`` waits for this one.

    Parameters
    ----------
    out : Path
    key : str
        Of inputs and settings.
    batches : iterable
        At least one; the same ones for the same key.
    compute : function
        Returns the rows of a batch, and counts.

    Raises
    ------
    DataError
        ``out`` is a folder, or the disk is full or read-only.
    """
    require_file_name(out)
    folder = out.absolute().with_name(f".{out.name}.parts")
    folder.parent.mkdir(parents=True, exist_ok=True)  # where the lock is
    with locked(out):  # another job would remove these parts, or add its own to them
        if folder.is_dir() and _key_of(folder) != key:
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        write_json(folder / _KEY_FILE, {"key": key})
        if done := len([*folder.glob("*.counts.json")]):
            log.info(f"continuing after {done} finished parts in {folder}; delete it to start again")
        parts: list[Path] = []
        total: Counter[str] = Counter()
        for number, batch in enumerate(batches):
            part, counts_file = folder / f"{number:06}.parquet", folder / f"{number:06}.counts.json"
            if not counts_file.is_file():
                table, counts = compute(batch)
                write_tables(part, [table])
                write_json(counts_file, counts)
            parts.append(part)
            total.update(read_json(counts_file))
        rows = write_tables(out, (pq.read_table(part, partitioning=None) for part in parts))
        shutil.rmtree(folder)
        return rows, dict(total)


def _key_of(folder: Path) -> str | None:
    try:
        return str(read_json(folder / _KEY_FILE)["key"])
    except (OSError, ValueError, KeyError):
        return None
