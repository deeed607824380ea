"""Working directory, resumable tasks and input conversion of the out-of-core engine.

The working directory ``.<out>-work`` is next to the output and holds the folder of one job (a hash of input and
settings). Every task keeps its result there (`resumable`); a run that was killed continues from these files. The
finished data folder replaces the output in one rename.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.user_hash import hash_ids
from missrec_t4r.etl import item_table
from missrec_t4r.etl.arrow_columns import TEXT_TYPES, normal_ids
from missrec_t4r.etl.engine.executor import WorkerError
from missrec_t4r.etl.inputs import read_items
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import (
    PARQUET_SUFFIXES,
    read_table,
    require_distinct,
    require_event_columns,
    same_columns,
    translate_parquet_errors,
)
from missrec_t4r.etl.task import Task
from missrec_t4r.io.arrow_files import one_array, with_column
from missrec_t4r.io.atomic import atomic_write_file, move_into_place, recover, refuse_unmanaged, translate_disk_errors
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import ITEM_ID, SPLITS

log = logging.getLogger(__name__)

Step = Callable[[str, int], dict[str, Any]]
"""Working folder and number of a chunk or partition -> a small result."""

PLAN_FILE, _ITEMS_FILE = "plan.json", "items.parquet"
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
_FINISHED = "finished"
"""The same when it is complete, outside its job: what is left of a job without output is not continued."""


@contextmanager
def working_folder(out: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield the working directory of ``out`` and a function that replaces ``out`` by a finished folder of it.

    The directory is removed at the end, and after an error whose cure is other input or settings. It stays after a
    kill, Ctrl-C, or the loss of all workers, for the next run to continue.

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
                move_into_place(folder.rename(work / _FINISHED), out)

            yield work, finish
    except WorkerError:
        raise
    except Exception:
        for folder in (work, copies):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def copies_folder(out: Path) -> Path:
    """Return the folder for input that has to be converted to parquet; it is removed with the working directory."""
    out = out.resolve()
    return out.with_name(f".{out.name}-copies")


def clear_after_kill(out: Path) -> None:
    """Remove what a run left that was killed after it had replaced ``out``, and name what another run can continue."""
    out = out.resolve()
    work, copies = out.with_name(f".{out.name}-work"), copies_folder(out)
    for folder in work.glob("*"):
        if not (folder / OUTPUT_FOLDER).is_dir():
            shutil.rmtree(folder)
    if not any(work.glob("*")):
        for folder in (work, copies):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        log.info(f"{work} holds what a killed run had done: its command goes on from there, or remove the folder")


def remove_working_folder(out: Path) -> None:
    """Remove what a killed run left beside ``out``, which another engine has written anew, and say so."""
    resolved = out.resolve()
    for folder in (resolved.with_name(f".{resolved.name}-work"), copies_folder(out)):
        if folder.is_dir():
            shutil.rmtree(folder)
            log.info(f"removed {folder}: a run was killed there, and {out} is written anew")


def open_job(work: Path, identity: Any) -> Path:
    """Return the working folder of a job: that of a killed run that was equal, or a new one; others are removed.

    Parameters
    ----------
    work : Path
        Working directory.
    identity : JSON-able value
        What the results depend on.
    """
    name = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]
    for other in work.glob("*"):
        if other.name != name or not (other / OUTPUT_FOLDER).is_dir():
            shutil.rmtree(other)
    for folder in (SHUFFLE_FOLDER, KEPT_FOLDER, SPLIT_FOLDER, *(f"{OUTPUT_FOLDER}/{split}" for split in SPLITS)):
        (work / name / folder).mkdir(parents=True, exist_ok=True)
    return work / name


def open_planned_job(work: Path, plan: Mapping[str, Any], files: Sequence[Path], items: pa.Table, *more: Any) -> Path:
    """Return the working folder of a job on events, with its plan and the ids of its item table.

    Parameters
    ----------
    work : Path
        Working directory.
    plan : mapping
        JSON-able; what the tasks have in common.
    files : sequence of Path
        The events.
    items : pyarrow.Table
    *more : JSON-able value
        What the results depend on beside these.
    """
    changed, ids = [file.stat().st_mtime_ns for file in files], hash_ids(one_array(items[ITEM_ID]))
    folder = open_job(work, [plan, changed, hashlib.sha256(ids.tobytes()).hexdigest(), *more])
    write_item_ids(items, folder)
    write_json(folder / PLAN_FILE, plan, indent=None)
    return folder


def write_item_ids(items: pa.Table, work: Path) -> None:
    """Write the ids of the item table for the tasks."""
    pq.write_table(items.select([ITEM_ID]), work / _ITEMS_FILE)


def read_item_ids(work: str) -> pa.Array:
    """Return the ids of the item table."""
    return one_array(pq.read_table(Path(work) / _ITEMS_FILE)[ITEM_ID])


def partition_path(work: str | Path, folder: str, partition: int, extension: str) -> Path:
    """Return the file of a partition, or of a chunk, in a subfolder of the working folder."""
    return Path(work) / folder / f"{partition:05}.{extension}"


def resumable(folder: str) -> Callable[[Step], Step]:
    """Return the decorator of a task that keeps its result in a subfolder, and returns it if it is there already."""

    def decorate(step: Step) -> Step:
        @wraps(step)
        def run(work: str, number: int) -> dict[str, Any]:
            done = partition_path(work, folder, number, "json")
            if not done.is_file():
                write_json(done, step(work, number), indent=None)
            return read_json(done)

        return run

    return decorate


# Input as parquet


def as_parquet(
    files: Sequence[Path], folder: Path, id_columns: Sequence[str], findings: checks.Findings | None = None
) -> list[Path]:
    """Return the input as parquet files; other formats are converted into ``folder``, one file in memory at a time.

    Parquet is converted, too, where its ids are integers and another file has text ids: ids become text then.

    Raises
    ------
    DataError
        A file cannot be read.
    """
    is_text = {file: _text_ids(file, id_columns) for file in files}
    kinds = {name: {of_file[name] for of_file in is_text.values() if name in of_file} for name in id_columns}
    copies = []
    try:
        for number, file in enumerate(files):
            as_text = [name for name in sorted(kinds) if len(kinds[name]) > 1 and not is_text[file].get(name, True)]
            if as_text or not file.name.endswith(PARQUET_SUFFIXES):
                file = _convert(file, folder / f"{number:05}", id_columns, as_text, findings)
            copies.append(file)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return copies


def _convert(
    file: Path, target: Path, id_columns: Sequence[str], as_text: Sequence[str], findings: checks.Findings | None
) -> Path:
    """Return a parquet copy of a file, with text in the columns ``as_text``."""
    status = file.stat()  # in the name of the copy: a changed file, and other id columns, have another one
    made_of = json.dumps([str(file), status.st_size, status.st_mtime_ns, list(id_columns), as_text])
    copy = target.with_name(f"{target.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.parquet")
    if not copy.is_file():
        table = read_table(file, "interactions", text_columns=id_columns, needed=None, findings=findings)
        for name in as_text:
            ids = normal_ids(table[name], name).cast(pa.string())
            table = with_column(table, name, ids)
        with atomic_write_file(copy) as temporary:
            pq.write_table(table, temporary)
    return copy


def _text_ids(file: Path, columns: Sequence[str]) -> dict[str, bool]:
    """Return which id columns of a file hold text; those of csv and JSON lines are read as text."""
    if not file.name.endswith(PARQUET_SUFFIXES):
        return dict.fromkeys(columns, True)
    schema = _parquet_schema(file)
    types = {name: decoded_type(schema.field(name).type) for name in columns if name in schema.names}
    return {name: pa.types.is_string(kind) for name, kind in types.items()}


def _parquet_schema(file: Path) -> pa.Schema:
    with translate_parquet_errors(file):
        schema = pq.read_schema(file).remove_metadata()
    require_distinct(file, schema.names)
    return schema


def unified_schema(
    files: Sequence[Path], names: Mapping[str, str], findings: checks.Findings, *, added: bool = False
) -> pa.Schema:
    """Return the common schema of parquet files, with the names and types that events have after `decode`.

    Without row indices that pandas wrote, and without columns whose names other columns take. ``added``: to a folder.

    Raises
    ------
    SchemaError
        A file has other columns or types, or the user, item or time column is missing.
    """
    schemas = [_parquet_schema(file) for file in files]
    row_indexes = checks.row_indexes(sorted({name for schema in schemas for name in schema.names}), names, findings)
    schemas = [pa.schema([field for field in schema if field.name not in row_indexes]) for schema in schemas]
    with same_columns(files, [schema.names for schema in schemas], "interactions"):
        require_event_columns(schemas[0].names, names, added=added)
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    clashing = checks.taken_names(schema.names, names, findings)
    kept = [field for field in schema if field.name not in clashing]
    return pa.schema([(names.get(field.name, field.name), decoded_type(field.type)) for field in kept])


def read_item_table(task: Task, files: Sequence[Path]) -> tuple[pa.Table, item_table.Vectors]:
    """Return the item table and its vectors, one row per id; ids have the type of those in the events' ``files``."""
    table = read_items(task.items, task.settings["catalogue_item_column"], task.findings)
    ids = normal_ids(table[ITEM_ID], ITEM_ID)
    schema, item_column = pq.read_schema(files[0]), task.settings["columns"][ITEM_ID]
    if item_column in schema.names:
        ids = checks.ids_like(ids, decoded_type(schema.field(item_column).type), task.findings)
    table = with_column(table, ITEM_ID, ids)
    vectors: item_table.Vectors = item_table.read_modalities(task.modality_files, table.num_rows)
    table, vectors = item_table.unique_items(table, vectors, task.findings)
    return table.combine_chunks(), vectors


def decoded_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column after `decode`."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if values in TEXT_TYPES else values


def decode(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without dictionary encoding, texts and bytes as strings, which need not be UTF-8 yet."""
    return column.cast(decoded_type(column.type), safe=False)
