"""Raw events -> shards on disk: one pass over the files, every user's events in the shard of their hash, ids encoded.

A chunk (some row groups of one parquet file) becomes one Arrow file whose record batches go round the partitions, and
one JSON file that says what was found; the latter is written last and means "finished". Item ids become catalogue
rows, those that the item table lacks become -1, -2, … and are listed; text becomes codes of the chunk's own list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.data.session_files import one_array
from missrec_t4r.data.user_hash import hash_ids, partition_of
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl.quality import checks
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, USER_ID

PLAN_FILE = "plan.json"
ITEMS_FILE = "items.parquet"
_BATCH = 1_000_000
_YEAR_2100 = 4_102_444_800


@dataclass(frozen=True)
class Chunk:
    """Part of the input that one task reads."""

    file: str
    row_groups: list[int]
    rows: int


@dataclass(frozen=True)
class Plan:
    """Everything that the tasks have to know; a file in the working folder."""

    chunks: list[Chunk]
    partitions: int
    names: dict[str, str]
    """Raw to our name of user, item and time."""
    features: dict[str, str]
    """Event column -> ``category`` or ``number``."""
    time_is_date: bool
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, work: Path) -> None:
        """Write the plan."""
        write_json(work / PLAN_FILE, asdict(self))


@lru_cache(maxsize=4)
def load_plan(work: str) -> Plan:
    """Read the plan of a working folder, once per process."""
    raw = json.loads((Path(work) / PLAN_FILE).read_text(encoding="utf-8"))
    return Plan(**raw | {"chunks": [Chunk(**chunk) for chunk in raw["chunks"]]})


@lru_cache(maxsize=4)
def load_ids(work: str) -> pa.Array:
    """Read the item table's ids, once per process."""
    return one_array(pq.read_table(Path(work) / ITEMS_FILE, columns=[ITEM_ID])[ITEM_ID])


def cut_chunks(files: Sequence[Path]) -> list[Chunk]:
    """Return the row groups of parquet files in groups of about a million events."""
    chunks: list[Chunk] = []
    for file in files:
        meta = pq.ParquetFile(file).metadata
        groups: list[int] = []
        rows = 0
        for index in range(meta.num_row_groups):
            groups.append(index)
            rows += meta.row_group(index).num_rows
            if rows >= _BATCH // 2 or index == meta.num_row_groups - 1:
                chunks.append(Chunk(str(file), groups, rows))
                groups, rows = [], 0
    return chunks


class Codes:
    """Numbers for values in the order in which they are met.

    Examples
    --------
    >>> codes = Codes(pa.string())
    >>> codes.of(pa.array(["b", "a", "b"])).tolist(), codes.values.to_pylist()
    ([0, 1, 0], ['b', 'a'])
    """

    def __init__(self, kind: pa.DataType) -> None:
        self.values = pa.array([], kind)

    def of(self, column: pa.Array) -> np.ndarray[Any, Any]:
        """Return the codes of a column without nulls, [row], and remember its new values."""
        found = pc.index_in(column, value_set=self.values)
        if found.null_count:
            new = column.filter(pc.is_null(found)).unique()
            self.values = pa.concat_arrays([self.values, new])
            found = pc.index_in(column, value_set=self.values)
        return np.asarray(found.to_numpy(zero_copy_only=False), np.int32)


def write_shard(work: str, index: int) -> dict[str, Any]:
    """Read chunk ``index`` of the plan and write its shard.

    Returns
    -------
    dict
        What was found: rows, nulls, unknown items, categories with their counts.
    """
    folder = Path(work)
    done = shard_file(folder, index).with_suffix(".json")
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    plan = load_plan(work)
    chunk = plan.chunks[index]
    writer, aside = None, done.with_suffix(f".{os.getpid()}-{id(done)}.tmp")
    reader = ShardReader(plan, load_ids(work))
    for batch in batches_of(plan, chunk):
        shard, bounds = reader.encode(batch)
        writer = writer or pa.ipc.new_file(str(aside), shard.schema)
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            writer.write_batch(one_batch(shard.slice(start, end - start)))
    if writer is not None:
        writer.close()
        aside.replace(shard_file(folder, index))
    found = reader.report()
    write_json(done, found)
    return found


def batches_of(plan: Plan, chunk: Chunk) -> Iterator[pa.Table]:
    """Yield the events of a chunk, as many at a time as fit in memory with all that is made of them."""
    columns = [*plan.names, *plan.features]
    batches = pq.ParquetFile(chunk.file).iter_batches(_BATCH, chunk.row_groups, columns)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{chunk.file} cannot be read ({error})",
                "interactions as whole parquet",
                "write or copy the file again",
            ) from error
        if batch is None:
            return
        yield pa.Table.from_batches([batch])


class ShardReader:
    """Encodes events, batch by batch, and remembers what it finds."""

    def __init__(self, plan: Plan, ids: pa.Array) -> None:
        self.plan, self.ids = plan, ids
        self.unknown = Codes(ids.type)
        self.categories: dict[str, Codes] = {}
        self.counts: dict[str, np.ndarray[Any, Any]] = {}
        self.found: dict[str, Any] = {
            "rows": 0,
            "whole": True,
            "negative": 0,
            "late": 0,
            "seconds": 0,
            "finer": 0,
            "strange": 0,
            "newest": None,
        }
        self.nulls: dict[str, int] = {}

    def encode(self, table: pa.Table) -> tuple[pa.Table, list[int]]:
        """Return the usable events of a batch, partition by partition, and where each begins."""
        table = self._usable(table.rename_columns([self.plan.names.get(name, name) for name in table.column_names]))
        users, times = one_array(table[USER_ID]), table[TIMESTAMP]
        self.found["rows"] += table.num_rows
        self.found["negative"] += int(pc.sum(pc.less(times, 0)).as_py() or 0)
        self.found["late"] += int(pc.sum(pc.greater(times, _YEAR_2100)).as_py() or 0)
        self.found["seconds"] += int(pc.sum(pc.and_(*_within(times, checks.SECONDS))).as_py() or 0)
        self.found["finer"] += int(pc.sum(pc.greater_equal(times, checks.MILLISECONDS)).as_py() or 0)
        if table.num_rows:
            newest = pc.max(times).as_py()
            self.found["newest"] = newest if self.found["newest"] is None else max(newest, self.found["newest"])
        if self.plan.time_is_date:
            self.found["whole"] &= pa.types.is_integer(times.type)
            times = times.cast(pa.float64())
        columns = {USER_ID: users, ITEM_ID: pa.array(self._rows(one_array(table[ITEM_ID]))), TIMESTAMP: times}
        for name, kind in self.plan.features.items():
            columns[name] = self._feature(name, kind, one_array(table[name]))
        partition = partition_of(hash_ids(users), self.plan.partitions)
        order = np.argsort(partition, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(partition, minlength=self.plan.partitions))])
        return pa.table(columns).take(pa.array(order)), bounds.tolist()

    def _usable(self, table: pa.Table) -> pa.Table:
        items = checks.normal_ids(plain(table[ITEM_ID]), ITEM_ID)
        if items.type != self.ids.type:
            numbers = checks.text_to_integers(items)
            if numbers is None or numbers.type != self.ids.type:
                raise SchemaError(
                    f"item ids are {items.type} in the interactions and {self.ids.type} in the item table",
                    "the same type in both",
                    "convert one of them",
                )
            items = numbers
        keys = {
            USER_ID: checks.normal_ids(plain(table[USER_ID]), USER_ID),
            ITEM_ID: items,
            TIMESTAMP: checks.normal_time(table[TIMESTAMP], TIMESTAMP),
        }
        table = pa.table({name: keys.get(name, plain(table[name])) for name in table.column_names})
        usable = None
        for name in keys:
            if table[name].null_count:
                self.nulls[name] = self.nulls.get(name, 0) + table[name].null_count
                valid = pc.is_valid(table[name])
                usable = valid if usable is None else pc.and_(usable, valid)
        return table if usable is None else table.filter(usable)

    def _rows(self, items: pa.Array) -> np.ndarray[Any, Any]:
        found = pc.index_in(items, value_set=self.ids)
        rows = found.fill_null(0).to_numpy() + np.int32(FIRST_ITEM_ROW)
        if found.null_count:
            strange = pc.is_null(found)
            self.found["strange"] += found.null_count
            rows = rows.copy()
            rows[strange.to_numpy(zero_copy_only=False)] = -1 - self.unknown.of(items.filter(strange))
        return rows

    def _feature(self, name: str, kind: str, column: pa.Array) -> pa.Array:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_finite(column), column, None)
        if column.null_count:
            self.nulls[name] = self.nulls.get(name, 0) + column.null_count
        if kind == "number":
            whole = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
            return (checks.as_int64(column, name) if whole else column.cast(pa.float32())).fill_null(0)
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        plain = column.cast(pa.string() if text else pa.int64()).fill_null("" if text else 0)
        known = self.categories.setdefault(name, Codes(plain.type))
        codes = known.of(plain)
        counts = np.bincount(codes, minlength=len(known.values))
        before = self.counts.get(name, np.zeros(0, np.int64))
        self.counts[name] = counts + np.pad(before, (0, len(counts) - len(before)))
        return pa.array(codes)

    def report(self) -> dict[str, Any]:
        """Return what was found, ready for JSON."""
        categories, repaired = {}, {}
        for name, codes in self.categories.items():
            values, broken = checks.readable(codes.values)
            categories[name] = {"values": values, "counts": self.counts[name].tolist()}
            if broken:
                repaired[name] = int(self.counts[name][broken].sum())
        return self.found | {
            "nulls": self.nulls,
            "unknown": self.unknown.values.to_pylist(),
            "categories": categories,
            "repaired": repaired,
        }


def _within(times: Any, bounds: tuple[int, int]) -> tuple[Any, Any]:
    return pc.greater_equal(times, bounds[0]), pc.less_equal(times, bounds[1])


def shard_file(work: Path, index: int) -> Path:
    """Return the place of a chunk's shard."""
    return work / "shards" / f"{index:05}.arrow"


def read_shards(
    work: str, partition: int, maps: Sequence[Mapping[str, np.ndarray[Any, Any]]], columns: Sequence[str]
) -> pa.Table:
    """Return a partition's events in the order of the input.

    Parameters
    ----------
    maps : sequence of mapping
        Per chunk: the catalogue rows of its unknown items, the common codes of its categories.
    """
    plan, tables = load_plan(work), []
    for index, known in enumerate(maps):
        file = shard_file(Path(work), index)
        if not file.is_file():
            continue
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(at) for at in range(partition, reader.num_record_batches, plan.partitions)]
        tables.append(with_codes(pa.Table.from_batches(batches).select(columns), known))
    return pa.concat_tables(tables, promote_options="permissive")


def with_codes(table: pa.Table, known: Mapping[str, np.ndarray[Any, Any]]) -> pa.Table:
    """Return a chunk's events with the rows of its unknown items and the common codes of its categories."""
    for name, values in known.items():
        if name in table.column_names:
            codes = table[name].to_numpy()
            if name != ITEM_ID:
                common = values[codes]
            elif not len(values):
                continue
            else:
                common = np.where(codes < 0, values[np.maximum(-1 - codes, 0)], codes)
            table = table.set_column(table.column_names.index(name), name, pa.array(common.astype(np.int32)))
    return table


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without dictionaries and wide strings."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.string() if pa.types.is_large_string(kind) else kind)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file that is whole or absent."""
    aside = file.with_suffix(f".{os.getpid()}-{id(content)}.part")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(file)


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """Return a table, which may be empty, as one record batch."""
    arrays = [one_array(column) for column in table.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=table.schema)
