"""``missrec catalogue adopt``: build a data folder on the item rows of an existing NVTabular workflow.

Nothing is encoded anew: row r of the catalogue is the item that the workflow's Categorify calls r. Only the vocabulary
files are read (``categories/unique.<column>.parquet``), never the workflow's pickle.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.config.checks import require_at_least, require_choices
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl import item_table, outputs, splits
from missrec_t4r.etl.arrow_columns import normal_ids
from missrec_t4r.etl.inputs import name_item_column, with_normal_ids
from missrec_t4r.etl.nvt.adopt_sessions import Reader
from missrec_t4r.etl.nvt.data_folder import count_items, write_request, write_schema
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.sources.table import Paths, read_table, require_column
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.io.atomic import atomic_write_dir, refuse_unmanaged
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, ITEM_LIST, SPLITS

log = logging.getLogger(__name__)


def adopt(
    workflow: str | Path,
    out: str | Path,
    *,
    sessions: Paths = (),
    train: Paths = (),
    valid: Paths = (),
    test: Paths = (),
    items: str | Path | None = None,
    item_column: str = ITEM_ID,
    vocabulary_column: str = ITEM_ID,
    user_column: str | None = None,
    schema: str | Path | None = None,
    modality: Mapping[str, str | Path] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    new_items: Literal["append", "drop"] = "append",
    max_sequence_length: int = 50,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Build a data folder on the item ids of an existing NVTabular workflow and its session parquet.

    Parameters
    ----------
    workflow : path
        Folder of an NVTabular Workflow.save, or its vocabulary file unique.<column>.parquet.
    out : path
        Data folder to write; an older one is replaced as a whole.
    sessions : path, pattern, folder, or a sequence of them
        Session parquet of that workflow, one row per session, split leave-one-out here; repeatable.
    train : the same
        In place of --sessions: training sessions as they are split already; repeatable.
    valid : the same
        Validation sessions: the last item of a row is the target; repeatable.
    test : the same
        Test sessions: the last item of a row is the target; repeatable.
    items : path, optional
        Item table (parquet, csv or json lines) with texts, prices and so on, joined by raw id.
    item_column : str
        Column of the raw id in the item table.
    vocabulary_column : str
        Column that the workflow encoded.
    user_column : str, optional
        Column of the user or session id in the sessions; by default the one that their schema tags USER_ID or
        SESSION_ID, or user_id or session_id. Without any, sessions are numbered.
    schema : path, optional
        schema.pbtxt of the sessions; by default the one beside or above them.
    modality : mapping of str to path
        Precomputed vectors as NAME=FILE.npy, rows as in the item table; repeatable.
    fingerprint : mapping of str to str
        Name of the encoder of those vectors as NAME=TEXT; repeatable.
    new_items : {"append", "drop"}
        Treatment of items that are not in the workflow's vocabulary: append them as cold items, or drop them.
    max_sequence_length : int
        Number of most recent items of a request that the model sees.
    dry_run : bool
        Read, check and count everything; write nothing.

    Returns
    -------
    dict
        Counts and findings; also written to etl.json.

    Raises
    ------
    SchemaError, DataError, ModalityError, ConfigError
        The vocabulary does not start at row 3, does not fit the sessions, or an input is unusable. Nothing is left.
    """
    out, findings = Path(out), checks.Findings()
    files = item_table.modality_files(modality, fingerprint)
    split_files = {name: paths for name, paths in zip(SPLITS, (train, valid, test), strict=True) if paths}
    require_at_least(1, max_sequence_length=max_sequence_length)
    require_choices(new_items=(new_items, ("append", "drop")))
    if not (sessions or split_files) or (files and items is None):
        raise ConfigError("no sessions, or vectors without an item table", "--sessions or --train, --valid and --test")
    if sessions and split_files:
        raise ConfigError(
            f"--sessions beside --{', --'.join(split_files)}",
            "sessions that are split here, or given splits",
            "leave out one of them",
        )
    ids = read_vocabulary(Path(workflow), vocabulary_column)
    log.info(f"{len(ids):,} items in the workflow's vocabulary")
    table: pa.Table = pa.table({ITEM_ID: ids})
    vectors: item_table.Vectors = {}
    if items is not None:
        table, vectors = _read_items(Path(items), item_column, files, findings)
        table, vectors = _in_rows(ids, table, vectors, new_items, findings)
    catalogue = item_table.build_catalogue(table, vectors, files, fingerprint)
    reader = Reader(FIRST_ITEM_ROW + len(ids), None if schema is None else Path(schema), findings, user_column)
    if split_files:
        rows = reader.read_splits(split_files)
    else:
        rows = splits.split_rows(reader.read(sessions), {"split": "leave_one_out"})
        counts = {name: part.num_rows for name, part in rows.items()}
        splits.check_rows(counts, "splits of your own with --train, --valid and --test")
    longest = max(pc.max(pc.list_value_length(part[ITEM_LIST])).as_py() for part in rows.values())
    session_schema = reader.schema_of(rows["train"].column_names, catalogue.n_rows, longest)
    features = _feature_codes(Path(workflow), reader.vocabularies(session_schema), findings)
    train_counts = count_items(rows["train"], catalogue.n_rows)
    report = {
        "adopted": {"workflow": Path(workflow).name, "column": vocabulary_column, "items": len(ids)},
        **outputs.data_counts(catalogue, train_counts, {name: part.num_rows for name, part in rows.items()}),
        "findings": findings.to_list(),
        "format": 1,
    }
    if dry_run:
        refuse_unmanaged(out, REPORT_FILE)
        return {"dry_run": True, "data": str(out), **report, "would_write": [str(out)], "would_replace": out.exists()}
    with atomic_write_dir(out, REPORT_FILE) as folder, tempfile.TemporaryDirectory() as storage:
        write_schema(session_schema, folder)
        for name, part in rows.items():
            pq.write_table(part, folder / name / "part_0.parquet")
        outputs.write_catalogue(catalogue, train_counts, folder)
        write_request(catalogue.items[ITEM_ID].combine_chunks(), folder, Path(storage), max_sequence_length, features)
        write_json(folder / REPORT_FILE, report)
    for finding in findings.found:
        log.info(f"{finding.check}: {finding.count:,} ({finding.message})")
    return {"data": str(out), **report}


def read_vocabulary(workflow: Path, column: str) -> pa.Array:
    """Return the raw ids of a Categorify vocabulary, from row 3 on.

    Raises
    ------
    DataError
        No such file, or it cannot be read.
    SchemaError
        It starts at another row (older NVTabular, hash buckets), or holds nulls or doubled ids.
    """
    if workflow.is_file() and workflow.suffix == ".pkl":
        raise DataError(
            f"--workflow {workflow}, a pickle, which is never read",
            "the folder of Workflow.save",
            f"give {workflow.parent}",
        )
    file = workflow if workflow.is_file() else workflow / "categories" / f"unique.{column}.parquet"
    if not file.is_file():
        others = sorted(path.name for path in workflow.rglob("unique.*.parquet"))
        raise DataError(
            f"there is no vocabulary {file}; found: {others or 'none'}",
            "categories/unique.<column>.parquet as Workflow.save writes it",
            "name the column with --vocabulary-column, or the file itself with --workflow",
        )
    table = read_table(file, "vocabulary", needed=None)  # an index is kept
    index = ((pq.read_schema(file).pandas_metadata or {}).get("index_columns") or [None])[0]
    values = [name for name in table.column_names if name != index] or table.column_names
    name = column if column in table.column_names else values[0]
    start = _first_row(index, table)
    if start != FIRST_ITEM_ROW:
        raise SchemaError(
            f"the vocabulary {file.name} starts at row {start}",
            f"row {FIRST_ITEM_ROW}, after padding, null and unknown, as NVTabular 23.8 counts without num_buckets",
            "fit the workflow again with NVTabular 23.8, or run `missrec etl` on the raw events",
        )
    ids = normal_ids(table[name], name).combine_chunks()
    if ids.null_count or len(ids.unique()) != len(ids):
        raise SchemaError(f"the vocabulary {file.name} holds nulls or an id twice", "one id per row")
    return ids


def _first_row(index: dict[str, Any] | str | None, table: pa.Table) -> int | None:
    """Return the row of a vocabulary's first value, or None if the rows are not counted one by one.

    NVTabular notes them as the index of a frame: as a range where it was fitted on pandas, as a column on cuDF.
    """
    if isinstance(index, dict):
        return index.get("start") if index.get("step", 1) == 1 else None
    rows = table[index].to_numpy() if index in table.column_names else np.zeros(0, np.int64)
    return int(rows[0]) if len(rows) and (np.diff(rows) == 1).all() else None


def _read_items(
    file: Path, item_column: str, files: Mapping[str, Path], findings: checks.Findings
) -> tuple[pa.Table, item_table.Vectors]:
    """Return the item table, with its ids as ``item_id``, and its vectors; one row per id."""
    table = read_table(file, "items", text_columns=[item_column])
    require_column(table, item_column, "items", "--item-column")
    table = with_normal_ids(name_item_column(table, item_column, findings))
    return item_table.unique_items(table, item_table.read_modalities(files, table.num_rows), findings)


def _in_rows(
    ids: pa.Array, table: pa.Table, vectors: item_table.Vectors, new_items: str, findings: checks.Findings
) -> tuple[pa.Table, item_table.Vectors]:
    """Return item table and vectors in the order of the vocabulary, followed by new items."""
    table_ids = checks.ids_like(one_array(table[ITEM_ID]), ids.type)
    if pa.types.is_string(ids.type):
        table_ids = table_ids.cast(pa.string())
    if table_ids.type != ids.type:
        raise SchemaError(f"item ids are {ids.type} in the workflow and texts in the item table", "the same ids")
    lines = pc.index_in(ids, value_set=table_ids).fill_null(-1).to_numpy()  # [item]: row of the table, -1 without one
    if (lines < 0).all():
        raise DataError(
            f"none of the workflow's {len(ids):,} items is in the item table: {ids[0].as_py()!r} there, "
            f"{table_ids[0].as_py()!r} here",
            "the same ids",
            "check --item-column and --vocabulary-column",
        )
    new_lines = np.setdiff1d(np.arange(table.num_rows), lines)
    findings.add("items_without_line", int((lines < 0).sum()), "items of the workflow that the item table lacks")
    findings.add("new_items", len(new_lines), f"items that the workflow never saw: {new_items}")
    if new_items == "append":
        ids, lines = pa.concat_arrays([ids, table_ids.take(pa.array(new_lines))]), np.concatenate([lines, new_lines])
    has_line, nullable_lines = lines >= 0, pa.array(lines, mask=lines < 0)
    columns = {name: table[name].take(nullable_lines) for name in table.column_names if name != ITEM_ID}
    vectors = {name: np.where(has_line[:, None], array[lines], np.float32(0)) for name, array in vectors.items()}
    return pa.table({ITEM_ID: ids, **columns}), vectors


def _feature_codes(workflow: Path, columns: Mapping[str, str], findings: checks.Findings) -> dict[str, dict[str, Any]]:
    """Return the raw values of encoded list columns beside the items, from vocabularies in the workflow's folder."""
    codes: dict[str, dict[str, Any]] = {}
    for name, encoded in columns.items():
        if (workflow / "categories" / f"unique.{encoded}.parquet").is_file():
            with contextlib.suppress(SchemaError):  # of an older NVTabular
                codes[name] = {"kind": "categorical", "values": read_vocabulary(workflow, encoded).to_pylist()}
    without = [name for name in columns if name not in codes]
    message = (
        f"requests give codes of {without}, whose vocabularies are not in the workflow's folder or start elsewhere"
    )
    findings.add("categories_as_codes", len(without), message)
    return codes
