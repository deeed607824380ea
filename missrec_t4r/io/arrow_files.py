"""Uncompressed Arrow files: written atomically, read memory-mapped, so that columns and rows not used are not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.arrays import Bools
from missrec_t4r.io.atomic import atomic_write_file


def write_arrow(table: pa.Table, file: Path) -> None:
    """Write a table as one uncompressed record batch, atomically."""
    with atomic_write_file(file) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_batch(to_record_batch(table))


def read_arrow(file: Path) -> pa.Table:
    """Return a table of `write_arrow`, memory-mapped."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def to_record_batch(table: pa.Table) -> pa.RecordBatch:
    """Return a table, which may be empty, as one record batch."""
    return pa.RecordBatch.from_arrays([one_array(column) for column in table.columns], schema=table.schema)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array, without a copy if it has one chunk."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def with_column(table: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    """Return a table with other values in one of its columns."""
    return table.set_column(table.column_names.index(name), name, values)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is that of lists, of any length or of one."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def unequal(old: pa.Array, new: pa.Array) -> Bools:
    """Return where two columns differ; two nulls, or two NaN, are equal."""
    try:
        unequal = pc.fill_null(pc.not_equal(old, new), False).to_numpy(zero_copy_only=False)
    except pa.ArrowNotImplementedError:  # lists and structs
        return np.array([one != other for one, other in zip(old.to_pylist(), new.to_pylist(), strict=True)], bool)
    if pa.types.is_floating(old.type):
        unequal &= ~pc.fill_null(pc.and_(pc.is_nan(old), pc.is_nan(new)), False).to_numpy(zero_copy_only=False)
    return np.asarray(unequal | pc.xor(old.is_null(), new.is_null()).to_numpy(zero_copy_only=False), bool)
