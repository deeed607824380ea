"""Shuffle: one pass over the input that encodes events and sorts them into the partition of their user's hash.

A chunk (some row groups of one parquet file) becomes one Arrow file, whose record batches are those of partition
0, 1, … n - 1, 0, 1, …, and one JSON file with statistics. The JSON file is written last: it marks the chunk as done.

Encoding needs no knowledge of other chunks. Item ids become item indices; ids that are not in the item table become
-1, -2, … and are listed. Categories become codes of the chunk's own list of values. `reduce.py` merges the lists, and
`read_partition` maps the codes of every chunk to the common ones.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.arrays import Ints
from missrec_t4r.data.user_hash import hash_ids, partition_of
from missrec_t4r.errors import SchemaError
from missrec_t4r.etl import arrow_columns
from missrec_t4r.etl.engine.workdir import PLAN_FILE, SHUFFLE_FOLDER, decode, partition_path, read_item_ids, resumable
from missrec_t4r.etl.event_arithmetic import sum_counts
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import parse_numbers
from missrec_t4r.etl.sources.table import translate_parquet_errors
from missrec_t4r.io.arrow_files import one_array, to_record_batch, with_column
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, USER_ID

BATCH_ROWS = 1_000_000
"""Events that are encoded at a time; bounds the memory of a task."""

Codes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Chunk:
    """Row groups of one parquet file: the input of one task."""

    file: str
    row_groups: list[int]
    rows: int


@dataclass(frozen=True)
class Plan:
    """Settings of every task, decided before the input is read; a JSON file in the working folder."""

    chunks: list[Chunk]
    partitions: int
    names: dict[str, str]
    """Input column -> ``user_id``, ``item_id`` or ``timestamp``."""
    features: dict[str, str]
    """Event column -> ``category`` or ``number``."""
    time_is_date: bool
    number_texts: dict[str, str] = field(default_factory=dict)
    """Number column that the files hold as text -> its notation (`quality.number_texts`)."""
    time_format: str | None = None
    as_types: dict[str, str] = field(default_factory=dict)
    """Event column -> its type where a file has no value of it; in an update ``user_id`` -> its type in the folder."""


@lru_cache(maxsize=4)
def load_plan(work: str) -> Plan:
    """Read the plan of a working folder, once per process."""
    content = read_json(Path(work) / PLAN_FILE)
    return Plan(**content | {"chunks": [Chunk(**chunk) for chunk in content["chunks"]]})


load_item_ids = lru_cache(maxsize=4)(read_item_ids)
"""Read the ids of the item table, once per process."""


def cut_chunks(files: Sequence[Path], batch_rows: int | None = None) -> list[Chunk]:
    """Return the row groups of parquet files in chunks of at least ``batch_rows / 2`` events (`BATCH_ROWS`)."""
    batch_rows = batch_rows or BATCH_ROWS
    chunks: list[Chunk] = []
    for file in files:
        meta = pq.ParquetFile(file).metadata
        groups: list[int] = []
        rows = 0
        for index in range(meta.num_row_groups):
            groups.append(index)
            rows += meta.row_group(index).num_rows
            if rows >= batch_rows // 2 or index == meta.num_row_groups - 1:
                chunks.append(Chunk(str(file.absolute()), groups, rows))  # workers have their own working directory
                groups, rows = [], 0
    return chunks


# Write: one task per chunk


@resumable(SHUFFLE_FOLDER)
def shuffle_chunk(work: str, index: int) -> dict[str, Any]:
    """Encode chunk ``index`` of the plan and write its events by partition.

    Returns
    -------
    dict
        Statistics of the chunk, see `EventEncoder.statistics`.
    """
    plan, target = load_plan(work), partition_path(work, SHUFFLE_FOLDER, index, "arrow")
    encoder = EventEncoder(plan, load_item_ids(work))
    with ExitStack() as files:  # closes the writer, then renames the file
        writer = None
        for batch in read_batches(plan, plan.chunks[index]):
            events, bounds = encoder.encode(batch)
            if writer is None:
                temporary = files.enter_context(atomic_write_file(target))
                writer = files.enter_context(pa.ipc.new_file(str(temporary), events.schema))
            for start, end in itertools.pairwise(bounds):
                writer.write_batch(to_record_batch(events.slice(start, end - start)))
    return encoder.statistics()


def read_batches(plan: Plan, chunk: Chunk) -> Iterator[pa.Table]:
    """Yield the events of a chunk, at most `BATCH_ROWS` at a time.

    Raises
    ------
    DataError
        The file is damaged.
    """
    columns = [*plan.names, *plan.features]
    with translate_parquet_errors(chunk.file):
        for batch in pq.ParquetFile(chunk.file).iter_batches(BATCH_ROWS, chunk.row_groups, columns):
            yield pa.Table.from_batches([batch])


class ValueCodes:
    """Integer codes of values, in the order of their first occurrence.

    Examples
    --------
    >>> codes = ValueCodes(pa.string())
    >>> codes.encode(pa.array(["b", "a", "b"])).tolist(), codes.values.to_pylist()
    ([0, 1, 0], ['b', 'a'])
    """

    def __init__(self, kind: pa.DataType) -> None:
        self.values = pa.array([], kind)

    def encode(self, column: pa.Array) -> Codes:
        """Return the codes of a column without nulls, [row]; new values are added."""
        codes = pc.index_in(column, value_set=self.values)
        if codes.null_count:
            new = column.filter(pc.is_null(codes)).unique()
            self.values = pa.concat_arrays([self.values, new])
            codes = pc.index_in(column, value_set=self.values)
        return np.asarray(codes.to_numpy(zero_copy_only=False), np.int32)


class EventEncoder:
    """Encodes the events of a chunk batch by batch and collects statistics.

    Parameters
    ----------
    plan : Plan
        Columns and number of partitions.
    item_ids : array [item]
        Ids of the item table.
    """

    def __init__(self, plan: Plan, item_ids: pa.Array) -> None:
        self.plan, self.item_ids = plan, item_ids
        self.unknown_items = ValueCodes(item_ids.type)
        self.categories: dict[str, ValueCodes] = {}
        self.counts: dict[str, Ints] = {}
        """Category column -> [code], number of events."""
        self.nulls: Counter[str] = Counter()
        self.sizes = np.zeros(plan.partitions, np.int64)
        """[partition], number of events."""
        self.repaired_times = 0
        self.totals = Counter(rows=0, unknown_item_events=0, **checks.count_times(np.zeros(0)))
        self.newest: float | None = None
        self.whole_seconds = True

    def encode(self, table: pa.Table) -> tuple[pa.Table, list[int]]:
        """Return the usable events of a batch sorted by partition, and where each partition begins, [partition + 1]."""
        table = self._usable(table.rename_columns([self.plan.names.get(name, name) for name in table.column_names]))
        users, times = one_array(table[USER_ID]), table[TIMESTAMP]
        self.totals.update(rows=len(times), **checks.count_times(times.to_numpy()))
        if len(times):
            newest = pc.max(times).as_py()
            self.newest = newest if self.newest is None else max(newest, self.newest)
        if self.plan.time_is_date:
            self.whole_seconds &= pa.types.is_integer(times.type)
            times = times.cast(pa.float64())
        columns = {USER_ID: users, ITEM_ID: pa.array(self._item_index(one_array(table[ITEM_ID]))), TIMESTAMP: times}
        for name, kind in self.plan.features.items():
            columns[name] = self._feature(name, kind, one_array(table[name]))
        partition = partition_of(hash_ids(users), self.plan.partitions)  # [event]
        order = np.argsort(partition, kind="stable")  # input order within a partition
        sizes = np.bincount(partition, minlength=self.plan.partitions)
        self.sizes += sizes
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        return pa.table(columns).take(pa.array(order)), bounds.tolist()

    def _usable(self, table: pa.Table) -> pa.Table:
        """Return the events with user, item and time, these three in their normal types."""
        raw = {name: column for column, name in self.plan.names.items()}  # names of the input, for error messages
        items = checks.ids_like(arrow_columns.normal_ids(decode(table[ITEM_ID]), raw[ITEM_ID]), self.item_ids.type)
        arrow_columns.require_same_ids(items.type, self.item_ids.type)
        keys = {
            USER_ID: self._users(arrow_columns.normal_ids(decode(table[USER_ID]), raw[USER_ID]), raw[USER_ID]),
            ITEM_ID: items,
            TIMESTAMP: arrow_columns.normal_time(self._times(table[TIMESTAMP]), raw[TIMESTAMP], self.plan.time_format),
        }
        table = pa.table({name: keys.get(name, decode(table[name])) for name in table.column_names})
        nulls = {name: table[name].null_count for name in keys if table[name].null_count}
        self.nulls.update(nulls)
        for name in nulls:
            table = table.filter(pc.is_valid(table[name]))
        return table

    def _times(self, times: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return times decoded, texts as UTF-8: one that was not becomes null as any that is not a time."""
        times = decode(times)
        if not pa.types.is_string(times.type) or arrow_columns.is_utf8(times):
            return times
        texts, broken = arrow_columns.repaired(times)
        self.repaired_times += len(broken)
        return pa.chunked_array([pa.array(texts, pa.string())])

    def _users(self, users: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
        """Return user ids in the type of the folder that an update extends."""
        kind = self.plan.as_types.get(USER_ID, str(users.type))
        if kind == str(users.type):
            return users
        converted = users.cast(pa.string()) if kind == "string" else arrow_columns.text_to_integers(users)
        if converted is None:
            raise SchemaError(
                f"user ids of column {name!r} are texts such as {users.drop_null()[0].as_py()!r}",
                "integers as in the folder",
                "convert them, or run missrec etl on all events",
            )
        return converted

    def _item_index(self, items: pa.Array) -> Codes:
        """Return item indices, -1 - code for items that are not in the item table, [event]."""
        index = pc.index_in(items, value_set=self.item_ids)
        rows: Codes = index.fill_null(0).to_numpy() + np.int32(FIRST_ITEM_ROW)
        if index.null_count:
            unknown = pc.is_null(index)
            self.totals["unknown_item_events"] += index.null_count
            rows = rows.copy()
            rows[unknown.to_numpy(zero_copy_only=False)] = -1 - self.unknown_items.encode(items.filter(unknown))
        return rows

    def _feature(self, name: str, kind: str, column: pa.Array) -> pa.Array:
        """Return an event feature: numbers with nulls as 0, categories as codes of this chunk, [event]."""
        if pa.types.is_null(column.type):
            column = column.cast(self.plan.as_types[name])
        if name in self.plan.number_texts:
            column = parse_numbers(column, self.plan.number_texts[name])
        text = pa.types.is_string(column.type)
        if kind == "category":
            column = column if text else arrow_columns.as_category(column, name)
        elif pa.types.is_floating(column.type):
            column = arrow_columns.finite_floats(column, pa.float32())
        else:
            column = arrow_columns.as_int64(column, name)
        self.nulls[name] += column.null_count
        values = column.fill_null("" if text else 0)
        if kind == "number":
            return values
        encoder = self.categories.setdefault(name, ValueCodes(values.type))
        codes = encoder.encode(values)
        counts = np.bincount(codes, minlength=len(encoder.values))  # [code]
        self.counts[name] = sum_counts([self.counts.get(name, ()), counts], len(counts))
        return pa.array(codes)

    def statistics(self) -> dict[str, Any]:
        """Return, ready for JSON: totals, nulls, unknown items, values and counts of categories, partitions' sizes."""
        categories, repaired = {}, {TIMESTAMP: self.repaired_times}
        for name, codes in self.categories.items():
            values, broken = arrow_columns.repaired(codes.values)
            categories[name] = {"values": values, "counts": self.counts[name].tolist()}
            if broken:
                repaired[name] = int(self.counts[name][broken].sum())
        return {
            **self.totals,
            "newest": self.newest,
            "whole_seconds": self.whole_seconds,
            "nulls": self.nulls,
            "unknown_items": self.unknown_items.values.to_pylist(),
            "categories": categories,
            "repaired": repaired,
            "sizes": self.sizes.tolist(),
        }


# Read: all chunks of one partition


def read_partition(work: str, partition: int, maps: Sequence[Mapping[str, Codes]]) -> pa.Table:
    """Return a partition's events in input order, with common codes; ``maps``: per chunk, see `map_codes`."""
    plan, tables = load_plan(work), []
    for chunk, code_maps in enumerate(maps):
        file = partition_path(work, SHUFFLE_FOLDER, chunk, "arrow")
        if not file.is_file():  # a chunk without rows
            continue
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(at) for at in range(partition, reader.num_record_batches, plan.partitions)]
        tables.append(map_codes(pa.Table.from_batches(batches), code_maps))
    return pa.concat_tables(tables, promote_options="permissive")


def map_codes(events: pa.Table, maps: Mapping[str, Codes]) -> pa.Table:
    """Replace a chunk's own codes by the common ones.

    Parameters
    ----------
    events : pyarrow.Table
        Events of one chunk.
    maps : mapping of str to ndarray
        ``item_id``: [unknown item of the chunk], item index of code -1 - position. Category columns: [code of the
        chunk], common code.
    """
    for name, values in maps.items():
        if name in events.column_names:
            codes = events[name].to_numpy()
            if name != ITEM_ID:
                common = values[codes]
            elif not len(values):
                continue
            else:
                common = np.where(codes < 0, values[np.maximum(-1 - codes, 0)], codes)
            events = with_column(events, name, pa.array(common.astype(np.int32)))
    return events
