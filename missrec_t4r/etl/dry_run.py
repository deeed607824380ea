"""``missrec etl --dry-run``: what a run would read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from missrec_t4r.errors import DataError
from missrec_t4r.etl import inputs
from missrec_t4r.etl.engine.shuffle import cut_chunks
from missrec_t4r.etl.installed import has_nvtabular
from missrec_t4r.etl.outputs import REPORT_FILE, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import PARQUET_SUFFIXES, read_table, require_event_columns
from missrec_t4r.etl.task import Task
from missrec_t4r.io.atomic import refuse_unmanaged
from missrec_t4r.schema import CATALOGUE_FOLDER, SESSION_TRANSFORM_FILE, SPLITS


def describe_run(task: Task, out: Path, engine: str) -> dict[str, Any]:
    """Return what a run would read and write.

    Raises
    ------
    DataError, SchemaError
        The output exists and is not a data folder, or a table cannot be read or lacks a column.
    """
    refuse_unmanaged(out, REPORT_FILE)
    tables = [_describe_table(file) for file in task.files]
    for table in tables:
        require_event_columns(table["columns"], task.names, table["file"])
    n_items = inputs.read_items(task.items, task.settings["catalogue_item_column"], checks.Findings()).num_rows
    parquet = [file for file in task.files if file.name.endswith(PARQUET_SUFFIXES)]
    names = [*SPLITS, CATALOGUE_FOLDER, SESSION_TRANSFORM_FILE]
    names += [WORKFLOW_FOLDER, REQUEST_FOLDER] if has_nvtabular() else []
    return {
        "dry_run": True,
        "engine": engine,
        "events": sum(table["rows"] for table in tables),
        "items": n_items,
        "files": tables,
        "tasks": len(cut_chunks(parquet)) if engine == "disk" else 1,
        "would_write": [str(out / name) for name in names],
        "would_replace": out.exists(),
        "settings": dict(task.settings),
    }


def _describe_table(file: Path) -> dict[str, Any]:
    """Return rows and columns of a table; of parquet only the metadata is read."""
    if file.name.endswith(PARQUET_SUFFIXES):
        try:
            parquet = pq.ParquetFile(file)
        except Exception as error:
            raise DataError(f"{file} cannot be read ({error})", "interactions as parquet", "write it again") from error
        return {"file": str(file), "rows": parquet.metadata.num_rows, "columns": parquet.schema_arrow.names}
    table = read_table(file, "interactions")
    return {"file": str(file), "rows": table.num_rows, "columns": table.column_names}
