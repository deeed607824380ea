"""What ``missrec etl`` would do: what is read, which path is taken, what is written; nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.schema import CATALOGUE_FOLDER, SESSION_TRANSFORM_FILE, SPLITS
from missrec_t4r.workflows.outputs import REPORT_FILE, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.workflows.shards import cut_chunks
from missrec_t4r.workflows.sources.table import read_table

LARGE = 300_000
"""Events of parquet input from which the fast path is taken by itself."""
_PARQUET = (".parquet", ".pq")


def is_large(files: Sequence[Path]) -> bool:
    """Whether these are parquet files with many events; files that cannot be read are for the reader to report."""
    if not all(file.name.endswith(_PARQUET) for file in files):
        return False
    try:
        return sum(pq.read_metadata(file).num_rows for file in files) >= LARGE
    except Exception:  # whatever is wrong with a file, its reader says it in words
        return False


def planned(
    files: Sequence[Path],
    names: Mapping[str, str],
    items: Path,
    out: Path,
    *,
    on_disk: bool,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a run would read and write.

    Raises
    ------
    DataError, SchemaError
        The output is in the way, or a table cannot be read or lacks a column.
    """
    if out.exists() and not (out.is_dir() and ((out / REPORT_FILE).is_file() or not any(out.iterdir()))):
        raise DataError(f"{out} exists and is no data folder", "a new or an older data folder", "choose another --out")
    item_table = read_table(items, "items")
    found = [_described(file) for file in files]
    for file in found:
        if lacking := [name for name in names if name not in file["columns"]]:
            raise SchemaError(f"{file['file']} has columns {file['columns']}", f"columns {lacking} too")
    rows = sum(file["rows"] for file in found)
    whole = [file for file in files if file.name.endswith(_PARQUET)]
    return {
        "dry_run": True,
        "engine": "disk" if on_disk else "memory",
        "events": rows,
        "items": item_table.num_rows,
        "files": found,
        "tasks": len(cut_chunks(whole)) if on_disk else 1,
        "would_write": [
            str(out / name)
            for name in (*SPLITS, CATALOGUE_FOLDER, WORKFLOW_FOLDER, REQUEST_FOLDER, SESSION_TRANSFORM_FILE)
        ],
        "would_replace": out.exists(),
        "settings": dict(settings),
    }


def _described(file: Path) -> dict[str, Any]:
    if file.name.endswith(_PARQUET):
        try:
            meta = pq.ParquetFile(file)
        except Exception as error:
            raise DataError(f"{file} cannot be read ({error})", "interactions as parquet", "write it again") from error
        return {"file": str(file), "rows": meta.metadata.num_rows, "columns": meta.schema_arrow.names}
    table = read_table(file, "interactions")
    return {"file": str(file), "rows": table.num_rows, "columns": table.column_names}
