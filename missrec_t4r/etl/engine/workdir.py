"""Around the fast path: its working folder and the rename at the end, its input as parquet, its item table."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl import item_table as catalogues
from missrec_t4r.etl.engine.shuffle import plain
from missrec_t4r.etl.inputs import read_items
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import read_table
from missrec_t4r.io.atomic import atomic_write_file, move_into_place, recover, translate_disk_errors
from missrec_t4r.schema import ITEM_ID


@contextmanager
def working_folder(out: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Yield the working folder of ``out``, and what puts a finished folder of it into place.

    What was finished before a kill is found again; an error that needs another input or setting clears it.

    Raises
    ------
    DataError
        ``out`` is neither new, nor empty, nor a data folder; or the disk is full or read-only.
    """
    if out.exists() and not (out.is_dir() and ((out / REPORT_FILE).is_file() or not any(out.iterdir()))):
        raise DataError(f"{out} exists and is no data folder", "a new or an older data folder", "choose another --out")
    work, copies = out.with_name(f".{out.name}-work"), copies_of(out)
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


def copies_of(out: Path) -> Path:
    """Return where input lies that had to be copied to parquet; it goes with the working folder."""
    return out.with_name(f".{out.name}-copies")


def one_of(top: Path, name: str) -> Path:
    """Return the folder of this name in the working folder; those of other jobs go."""
    for other in top.glob("*"):
        if other.name != name:
            shutil.rmtree(other)
    return top / name


def as_parquet(
    files: Sequence[Path], folder: Path, text_columns: Sequence[str], findings: checks.Findings | None = None
) -> list[Path]:
    """Return the files, copied to parquet in ``folder`` where they are of another kind (one in memory at a time).

    Parquet is copied, too, where its ids are integers and those of another file are texts: ids become texts then.

    Raises
    ------
    DataError
        A file cannot be read.
    """
    kinds = {file: _id_kinds(file, text_columns) for file in files if file.name.endswith((".parquet", ".pq"))}
    given = [*kinds.values(), *({name: True for name in text_columns} for _ in range(len(files) > len(kinds)))]
    mixed = {name for name in text_columns if len({known[name] for known in given if name in known}) > 1}
    try:
        return [
            _copied(file, folder / f"{number:05}", kinds, mixed, text_columns, findings)
            for number, file in enumerate(files)
        ]
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copied(
    file: Path,
    place: Path,
    kinds: Mapping[Path, Mapping[str, bool]],
    mixed: set[str],
    text_columns: Sequence[str],
    findings: checks.Findings | None,
) -> Path:
    """Return a file, or its copy as parquet with texts in the ``mixed`` columns."""
    as_text = [name for name in mixed if not kinds.get(file, {}).get(name, True)]
    if file in kinds and not as_text:
        return file
    stamp = file.stat()
    copy = place.with_name(f"{place.name}-{stamp.st_size}-{stamp.st_mtime_ns}.parquet")
    if not copy.is_file():
        table = read_table(file, "interactions", text_columns=text_columns, needed=None, findings=findings)
        for name in as_text:
            ids = checks.normal_ids(table[name], name).cast(pa.string())
            table = table.set_column(table.column_names.index(name), name, ids)
        with atomic_write_file(copy) as aside:
            pq.write_table(table, aside)
    return copy


def _id_kinds(file: Path, columns: Sequence[str]) -> dict[str, bool]:
    """Return which of the id columns of a parquet file hold texts, after looking that it is one."""
    schema = _schema_of(file)
    kinds = {
        name: plain(pa.chunked_array([], schema.field(name).type)).type for name in columns if name in schema.names
    }
    return {name: pa.types.is_string(kind) or pa.types.is_binary(kind) for name, kind in kinds.items()}


def _schema_of(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file).remove_metadata()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{file} cannot be read ({error})", "interactions as whole parquet", "write or copy the file again"
        ) from error


def unified_schema(files: Sequence[Path], names: Mapping[str, str], findings: checks.Findings) -> pa.Schema:
    """Return the common schema of parquet files, or say which file differs or lacks a column."""
    schemas = []
    whole = [_schema_of(file) for file in files]
    unwanted = checks.row_indexes(sorted({name for schema in whole for name in schema.names}), names)
    checks.note_row_indexes(findings, unwanted)
    for file, found in zip(files, whole, strict=True):
        schemas.append(pa.schema([field for field in found if field.name not in unwanted]))
        if set(schemas[-1].names) != set(schemas[0].names):
            odd = sorted(set(schemas[-1].names) ^ set(schemas[0].names))
            raise SchemaError(
                f"{file} and {files[0]} differ in columns {odd}", "interactions files with the same columns"
            )
    for raw, option in zip(names, ("--user-column", "--item-column", "--time-column"), strict=True):
        if raw not in schemas[0].names:
            raise SchemaError(
                f"the interactions table has columns {schemas[0].names}",
                f"a column {raw!r}",
                f"name yours with {option}",
            )
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"the interactions files disagree on a type ({error})", "one type per column") from error


def read_catalogue(
    items: Path,
    catalogue_item: str,
    files: Sequence[Path],
    item_column: str,
    modality_files: Mapping[str, Path],
    findings: checks.Findings,
) -> tuple[pa.Table, catalogues.Vectors]:
    """Return the item table and its vectors, one line per id; ids of the type that the events have."""
    table = read_items(items, catalogue_item, findings)
    ids = checks.normal_ids(table[ITEM_ID], ITEM_ID)
    kind = (
        plain(pa.chunked_array([], pq.read_schema(files[0]).field(item_column).type)).type
        if item_column in pq.read_schema(files[0]).names
        else ids.type
    )
    if pa.types.is_string(ids.type) and not pa.types.is_string(kind):
        ids = checks.text_to_integers(ids) or ids
    table = table.set_column(table.column_names.index(ITEM_ID), ITEM_ID, ids)
    vectors: catalogues.Vectors = catalogues.read_modalities(modality_files, table.num_rows)
    table, vectors = catalogues.unique_items(table, vectors, findings)
    return table.combine_chunks(), vectors
