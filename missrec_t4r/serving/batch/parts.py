"""A long job's output in parts beside its file: what is finished is not computed again when the job is repeated."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.serving.batch.parquet_io import TableWriter, write_results

log = logging.getLogger(__name__)
T = TypeVar("T")

BATCHES_PER_PART: Final = 16
_KEY_FILE: Final = "made_from.json"


def write_in_parts(
    out: Path, key: str, batches: Iterable[T], compute: Callable[[T], tuple[pa.Table, Mapping[str, int]]]
) -> tuple[int, dict[str, int]]:
    """Write a table per batch to ``out``, one part after the other, and return its rows and the sums of the counts.

    Parts are in the folder ``.NAME.parts`` beside ``out`` until all are there; a job with the same key goes on after
    them. ``out`` is replaced atomically at the end.

    Parameters
    ----------
    out : Path
    key : str
        Of inputs and settings.
    batches : iterable
        The same ones for the same key.
    compute : function
        Returns the rows of a batch, and counts.
    """
    folder = out.absolute().with_name(f".{out.name}.parts")
    if folder.is_dir() and _key_of(folder) != key:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _KEY_FILE, {"key": key})
    if done := len([*folder.glob("*.counts.json")]):
        log.info(f"going on after {done} finished parts in {folder}; delete it to start again")
    parts: list[Path] = []
    total: dict[str, int] = {}
    for number, group in enumerate(_groups(batches)):
        part, counts = folder / f"{number:06}.parquet", folder / f"{number:06}.counts.json"
        if not counts.is_file():
            sums: dict[str, int] = {}
            with write_results(part) as writer:
                for batch in group:
                    table, found = compute(batch)
                    writer.write(table)
                    sums = {name: sums.get(name, 0) + value for name, value in found.items()}
            write_json(counts, sums)
        else:
            for _ in group:  # read, not computed
                pass
        parts.append(part)
        total = {name: total.get(name, 0) + value for name, value in read_json(counts).items()}
    with write_results(out) as writer:
        _join(parts, writer)
        rows = writer.rows
    shutil.rmtree(folder)
    return rows, total


def _key_of(folder: Path) -> str | None:
    try:
        return str(read_json(folder / _KEY_FILE)["key"])
    except (OSError, ValueError, KeyError):
        return None


def _join(parts: Iterable[Path], writer: TableWriter) -> None:
    for part in parts:
        with pq.ParquetFile(part) as file:
            for group in range(max(file.num_row_groups, 1)):
                writer.write(file.read_row_group(group) if file.num_row_groups else file.schema_arrow.empty_table())


def _groups(batches: Iterable[T]) -> Iterator[Iterator[T]]:
    """Yield groups of consecutive batches; each has to be consumed before the next one is asked for."""
    iterator = iter(batches)

    def group(first: T) -> Iterator[T]:
        yield first
        for _ in range(BATCHES_PER_PART - 1):
            try:
                yield next(iterator)
            except StopIteration:
                return

    for first in iterator:
        yield group(first)
