"""A run of the out-of-core engine: its input and settings, and the plan of chunks, partitions and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import SchemaError
from missrec_t4r.etl import item_table
from missrec_t4r.etl.engine.shuffle import Plan, cut_chunks
from missrec_t4r.etl.engine.workdir import decoded_type, unified_schema
from missrec_t4r.etl.event_settings import EventSettings
from missrec_t4r.etl.quality import checks
from missrec_t4r.schema import TIMESTAMP

EVENTS_PER_PARTITION = 500_000
_MAX_PARTITIONS = 65_535
"""Partition numbers are stored in 16 bits."""


@dataclass
class Job:
    """One run: input, settings, and the findings about the input.

    Parameters
    ----------
    files : sequence of Path
        Parquet files of events.
    items, vectors : pyarrow.Table, mapping of str to ndarray [item, width]
        Item table with ids in their normal type, and its modality vectors.
    names : mapping of str to str
        Input column -> ``user_id``, ``item_id`` or ``timestamp``.
    settings : dict
        As written to ``etl.json``; completed by the run.
    modality_files : mapping of str to Path
        Where the vectors come from.
    derive : EventSettings
        Derived event columns.
    findings : Findings
        Gains the data-quality findings.
    partitions : int, optional
        As in `missrec_t4r.etl.pipeline.etl`.
    old : dict
        Incremental update only: folder, version, types, categories and boundaries of the version before.
    catalogue : Catalogue, optional
        Incremental update only: the catalogue that is extended.
    """

    files: Sequence[Path]
    items: pa.Table
    vectors: item_table.Vectors
    names: Mapping[str, str]
    settings: dict[str, Any]
    modality_files: Mapping[str, Path]
    derive: EventSettings
    findings: checks.Findings
    partitions: int | None = None
    old: dict[str, Any] = field(default_factory=dict)
    catalogue: Catalogue | None = None


def make_plan(job: Job) -> Plan:
    """Read the schemas of the input and decide on chunks, partitions and columns.

    Raises
    ------
    SchemaError, DataError
        The files lack columns, differ, or are no parquet.
    """
    schema = unified_schema(job.files, job.names, job.findings)
    clashing = [name for name in schema.names if name in job.names.values() and name not in job.names]
    job.findings.add(
        "column_name_taken", len(clashing), f"columns {clashing} are left out: other columns take their names"
    )
    empty = pa.table(
        {
            job.names.get(name, name): pa.chunked_array([], decoded_type(schema.field(name).type))
            for name in schema.names
            if name not in clashing
        }
    )
    features = checks.event_features(empty, job.settings["drop_columns"], job.findings)
    texts = [name for name in features if pa.types.is_string(empty[name].type)]
    job.derive.check(features, texts)
    categorical = job.settings["categorical_columns"]
    if missing := [name for name in categorical if name not in features]:
        raise SchemaError(f"categorical columns {missing} are no event columns", f"some of {features}")
    if job.old and features != (before := job.settings["event_features"]):
        raise SchemaError(f"the new events have columns {features}", f"{before} as before", "see --drop-column")
    job.settings["event_features"] = features
    kinds = {name: "category" if name in texts or name in categorical else "number" for name in features}
    chunks = cut_chunks(job.files)
    rows = sum(chunk.rows for chunk in chunks)
    partitions = job.partitions or max(1, -(-rows // EVENTS_PER_PARTITION))  # rounded up
    time = empty[TIMESTAMP].type
    is_number = pa.types.is_integer(time) or pa.types.is_floating(time)
    return Plan(chunks, min(partitions, _MAX_PARTITIONS), dict(job.names), kinds, not is_number)
