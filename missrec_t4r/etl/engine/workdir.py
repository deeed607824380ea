"""Working directory and input conversion of the out-of-core engine.

The working directory ``.<out>-work`` is next to the output and holds one folder per job (a hash of input and
settings). Every task writes its result there atomically; a run that was killed continues from these files. The
finished data folder replaces the output in one rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl import item_table
from missrec_t4r.etl.inputs import read_items
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import PARQUET_SUFFIXES, read_table, require_event_columns
from missrec_t4r.io.atomic import atomic_write_file, move_into_place, recover, refuse_unmanaged, translate_disk_errors
from missrec_t4r.schema import ITEM_ID

SHUFFLE_FOLDER = "shuffle"
"""Per chunk of the input: encoded events by partition (arrow), statistics (json)."""
FILTER_FOLDER = "filter"
"""Per partition: user, item and eligibility of each event, input of the k-core and item-count filters (npz)."""
KEPT_FOLDER = "kept"
"""Per partition: which events pass the filters (npy); once: the item indices after filtering (npy)."""
SPLIT_FOLDER = "split"
"""Per partition: rows of each split and longest session (json)."""
OUTPUT_FOLDER = "out"
"""The data folder that is being written."""


@contextmanager
def working_folder(out: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield the working directory of ``out`` and a function that replaces ``out`` by a finished folder of it.

    The directory is removed at the end, and after an error, whose cure is other input or settings. It stays after a
    kill or Ctrl-C, for the next run to continue.

    Raises
    ------
    DataError
        ``out`` is neither new, nor empty, nor a data folder; or the disk is full or read-only.
    """
    refuse_unmanaged(out, REPORT_FILE)
    out = out.resolve()  # what a link names is replaced; and workers have their own working directory
    work, copies = out.with_name(f".{out.name}-work"), copies_folder(out)
    try:
        with translate_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            recover(out)

            def finish(folder: Path) -> None:
                move_into_place(folder, out)

            yield work, finish
    except Exception:
        for folder in (work, copies):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def copies_folder(out: Path) -> Path:
    """Return the folder for input that has to be converted to parquet; it is removed with the working directory."""
    out = out.resolve()
    return out.with_name(f".{out.name}-copies")


def job_folder(work: Path, name: str) -> Path:
    """Return the folder of a job in the working directory, after removing the folders of other jobs."""
    for other in work.glob("*"):
        if other.name != name:
            shutil.rmtree(other)
    return work / name


def partition_path(work: str | Path, folder: str, partition: int, extension: str) -> Path:
    """Return the file of a partition in a subfolder of the working folder."""
    return Path(work) / folder / f"{partition:05}.{extension}"


# Input as parquet


def as_parquet(
    files: Sequence[Path], folder: Path, text_columns: Sequence[str], findings: checks.Findings | None = None
) -> list[Path]:
    """Return the input as parquet files; other formats are converted into ``folder``, one file in memory at a time.

    Parquet is converted, too, where its ids are integers and another file has text ids: ids become text then.

    Raises
    ------
    DataError
        A file cannot be read.
    """
    parquet = {file: _text_ids(file, text_columns) for file in files if file.name.endswith(PARQUET_SUFFIXES)}
    others = [dict.fromkeys(text_columns, True) for _ in range(len(files) > len(parquet))]  # csv: ids are text
    is_text = [*parquet.values(), *others]
    mixed = {name for name in text_columns if len({file[name] for file in is_text if name in file}) > 1}
    try:
        return [
            _convert(file, folder / f"{number:05}", parquet, mixed, text_columns, findings)
            for number, file in enumerate(files)
        ]
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _convert(
    file: Path,
    target: Path,
    parquet: Mapping[Path, Mapping[str, bool]],
    mixed: set[str],
    text_columns: Sequence[str],
    findings: checks.Findings | None,
) -> Path:
    """Return the file itself, or a parquet copy with text in the ``mixed`` id columns."""
    as_text = [name for name in sorted(mixed) if not parquet.get(file, {}).get(name, True)]
    if file in parquet and not as_text:
        return file
    status = file.stat()  # in the name of the copy: a changed file, and other id columns, have another one
    made_of = json.dumps([str(file), status.st_size, status.st_mtime_ns, list(text_columns), as_text])
    copy = target.with_name(f"{target.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.parquet")
    if not copy.is_file():
        table = read_table(file, "interactions", text_columns=text_columns, needed=None, findings=findings)
        for name in as_text:
            ids = checks.normal_ids(table[name], name).cast(pa.string())
            table = table.set_column(table.column_names.index(name), name, ids)
        with atomic_write_file(copy) as temporary:
            pq.write_table(table, temporary)
    return copy


def _text_ids(file: Path, columns: Sequence[str]) -> dict[str, bool]:
    """Return which id columns of a parquet file hold text."""
    schema = _parquet_schema(file)
    kinds = {name: decoded_type(schema.field(name).type) for name in columns if name in schema.names}
    return {name: pa.types.is_string(kind) or pa.types.is_binary(kind) for name, kind in kinds.items()}


def _parquet_schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file).remove_metadata()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{file} cannot be read ({error})", "interactions as complete parquet", "write or copy the file again"
        ) from error


def unified_schema(files: Sequence[Path], names: Mapping[str, str], findings: checks.Findings) -> pa.Schema:
    """Return the common schema of parquet files, without row indices that pandas wrote.

    Raises
    ------
    SchemaError
        A file has other columns or types, or the user, item or time column is missing.
    """
    schemas = []
    full_schemas = [_parquet_schema(file) for file in files]
    row_indexes = checks.row_indexes(sorted({name for schema in full_schemas for name in schema.names}), names)
    checks.note_row_indexes(findings, row_indexes)
    for file, full in zip(files, full_schemas, strict=True):
        schemas.append(pa.schema([field for field in full if field.name not in row_indexes]))
        if set(schemas[-1].names) != set(schemas[0].names):
            different = sorted(set(schemas[-1].names) ^ set(schemas[0].names))
            raise SchemaError(
                f"{file} and {files[0]} differ in columns {different}", "interactions files with the same columns"
            )
    require_event_columns(schemas[0].names, names)
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"the interactions files disagree on a type ({error})", "one type per column") from error


def read_item_table(
    items: Path,
    catalogue_item: str,
    files: Sequence[Path],
    item_column: str,
    modality_files: Mapping[str, Path],
    findings: checks.Findings,
) -> tuple[pa.Table, item_table.Vectors]:
    """Return the item table and its vectors, one row per id; ids have the type of the interactions' ids."""
    table = read_items(items, catalogue_item, findings)
    ids = checks.normal_ids(table[ITEM_ID], ITEM_ID)
    schema = pq.read_schema(files[0])
    kind = decoded_type(schema.field(item_column).type) if item_column in schema.names else ids.type
    if pa.types.is_string(ids.type) and not pa.types.is_string(kind):
        integers = checks.text_to_integers(ids)
        if integers is not None:
            ids = integers
            checks.note_converted_ids(findings, len(ids), events=False)
    table = table.set_column(table.column_names.index(ITEM_ID), ITEM_ID, ids)
    vectors: item_table.Vectors = item_table.read_modalities(modality_files, table.num_rows)
    table, vectors = item_table.unique_items(table, vectors, findings)
    return table.combine_chunks(), vectors


def decoded_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column after `decode`."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(values) else values


def decode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without dictionary encoding and with 32-bit string offsets."""
    return column.cast(decoded_type(column.type))
