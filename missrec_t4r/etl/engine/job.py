"""A run of the out-of-core engine: its input and settings, and the plan of chunks, partitions and columns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import SchemaError
from missrec_t4r.etl import item_table
from missrec_t4r.etl.arrow_columns import repaired
from missrec_t4r.etl.engine.shuffle import Plan, cut_chunks
from missrec_t4r.etl.engine.user_state import state_schema
from missrec_t4r.etl.engine.versions import Version
from missrec_t4r.etl.engine.workdir import decode, unified_schema
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import Notations, note
from missrec_t4r.etl.task import Run
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

EVENTS_PER_PARTITION = 500_000
MAX_PARTITIONS = 65_535
"""Partition numbers are stored in 16 bits."""


@dataclass
class Job:
    """A run, with its item table in memory.

    Parameters
    ----------
    run : Run
        Its files are parquet.
    items, vectors : pyarrow.Table, mapping of str to ndarray [item, width]
        Item table with ids in their normal type, and its modality vectors.
    partitions : int, optional
        As in `missrec_t4r.etl.pipeline.etl`.
    old : Version, optional
        Incremental update only: the version that is extended.
    catalogue : Catalogue, optional
        Incremental update only: its catalogue.
    new_rows : int
        Incremental update only: rows of the item table that are new or changed.

    Attributes
    ----------
    plan : Plan
        Set when the schemas of the files were read (`make_plan`).
    folder : Path
        Where its tasks write, set when that is known.
    """

    run: Run
    items: pa.Table
    vectors: item_table.Vectors
    partitions: int | None = None
    old: Version | None = None
    catalogue: Catalogue | None = None
    new_rows: int = 0
    plan: Plan = field(init=False)
    folder: Path = field(init=False)


def make_plan(job: Job) -> Plan:
    """Read the schemas of the input and decide on chunks, partitions and columns.

    Raises
    ------
    SchemaError, DataError
        The files lack columns, differ, or are not parquet.
    """
    run, findings, settings = job.run, job.run.findings, job.run.settings
    empty = unified_schema(run.files, run.names, findings, added=job.old is not None).empty_table()
    dropped, categorical = settings["drop_columns"], settings["categorical_columns"]
    if job.old:  # the column may be gone
        dropped = [name for name in dropped if name in empty.column_names]
    features = checks.event_features(empty, dropped, findings)
    if job.old:
        features, as_types = _as_before(job.run, job.old, empty, features)
    else:  # a file without any value of a column does not know its type
        as_types = {name: str(empty[name].type) for name in features}
    texts = [name for name in features if pa.types.is_string(empty[name].type)]
    notations = _notations(job, [name for name in texts if name not in categorical])
    texts = [name for name in texts if name not in notations]
    run.set_features(features, texts)
    categories = [*texts, *categorical, *(job.old.state["categories"] if job.old else ())]
    kinds = {name: "category" if name in categories else "number" for name in features}
    chunks = cut_chunks(run.files)
    rows = sum(chunk.rows for chunk in chunks)
    partitions = job.partitions or max(1, -(-rows // EVENTS_PER_PARTITION))  # rounded up
    if partitions > MAX_PARTITIONS:
        log.warning(f"{MAX_PARTITIONS:,} partitions are made, the most that there can be, not {partitions:,}")
    time = empty[TIMESTAMP].type
    is_number = pa.types.is_integer(time) or pa.types.is_floating(time)
    if pa.types.is_string(empty[ITEM_ID].type) and pa.types.is_integer(job.items[ITEM_ID].type):
        checks.note_converted_ids(findings, rows, events=True)
    partitions, time_format = min(partitions, MAX_PARTITIONS), settings.get("time_format")
    return Plan(chunks, partitions, dict(run.names), kinds, not is_number, notations, time_format, as_types)


def _as_before(run: Run, old: Version, empty: pa.Table, found: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the event columns of an incremental update, those of the first run, and what is cast when it is read.

    A new column is left out. A column without any value has no type, and takes the folder's; so do ids of users.

    Raises
    ------
    SchemaError
        A column is missing, or holds texts where the folder holds categories of numbers, or the other way round.
    """
    before: list[str] = run.settings["event_features"]
    untyped = [name for name in before if name in empty.column_names and pa.types.is_null(empty[name].type)]
    if missing := [name for name in before if name not in found and name not in untyped]:
        cure = f"add {', '.join(missing)}, or run missrec etl on all events"
        raise SchemaError(f"the new events have columns {list(found)}", f"{before} as before", cure)
    for name in found:
        if name not in before:
            words = f"event column {name!r} is new and is left out; run missrec etl on all events to read it"
            run.findings.add("event_column_left_out", 1, words)
    as_types = {USER_ID: str(state_schema(old.folder).field(USER_ID).type)}
    for name in before:
        values = old.state["categories"].get(name)
        of_texts = any(isinstance(value, str) for value in values or ())
        if name in untyped:
            as_types[name] = "float" if values is None else "string" if of_texts else "double"
        elif values is not None and of_texts != pa.types.is_string(empty[name].type):
            raise SchemaError(
                f"event column {name!r} holds {empty[name].type}",
                f"{'texts' if of_texts else 'numbers'} as before",
                "convert it, or run missrec etl on all events",
            )
    return before, as_types


def _notations(job: Job, texts: Sequence[str]) -> dict[str, str]:
    """Return the notation of the text columns that hold numbers: one pass over these columns, no further than needed.

    A column of an incremental update is what it was in the first run.
    """
    if job.old:
        texts = [name for name in texts if name in job.old.state["types"]]
    seen, counts = {name: Notations() for name in texts}, dict.fromkeys(texts, 0)
    for file in job.run.files if texts else ():
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            open_names = [name for name, notations in seen.items() if notations.possible]
            if not open_names:
                break
            for batch in parquet.iter_batches(row_groups=[group], columns=open_names):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    seen[name].add(repaired(decode(pc.unique(column)))[0])
                    counts[name] += len(column) - column.null_count
    chosen = {name: notations.chosen for name, notations in seen.items() if notations.chosen}
    if job.old:
        chosen = {name: chosen.get(name, "point") for name in texts}
    for name, notation in chosen.items():
        note(job.run.findings, name, counts[name], notation)
    return chosen
