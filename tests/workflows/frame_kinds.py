"""The kinds of frames that operators are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.etl.dataframe import PandasFrames
from missrec_t4r.etl.gpu.device import obstacle

HAS_CUDF = obstacle() is None
"""Whether there are cuDF and a GPU that it sees."""
needs_cudf = pytest.mark.skipif(not HAS_CUDF, reason="needs cuDF, a CUDA device, and MISSREC_TEST_GPU=1")


def to_cudf(frame: pd.DataFrame) -> Any:
    import cudf

    return cudf.from_pandas(frame)


FRAMES = [
    pytest.param(lambda frame: frame, id="pandas"),
    pytest.param(
        to_cudf,
        id="cudf",
        marks=needs_cudf,
    ),
]


class PandasFiles(PandasFrames):
    """pandas where cuDF would be: reads and writes files by itself."""

    free = 1 << 40
    """Bytes that it says to have."""

    def __init__(self) -> None:
        if pd.__version__.startswith("1."):
            pytest.skip("pandas 1 has nanoseconds alone, cuDF the units of the file")

    def read_parquet(
        self, files: Sequence[Path], columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> pd.DataFrame:
        if row_groups is None:
            tables = [pq.ParquetFile(file).read(columns) for file in files]
        else:
            (file,) = files
            tables = [pq.ParquetFile(file).read_row_groups(row_groups, columns)]
        plain = [table.replace_schema_metadata() for table in tables]
        return self.from_arrow(pa.concat_tables(plain, promote_options="permissive").select(columns))

    def write_parquet(self, frame: pd.DataFrame, file: Path, compression: str | None = "snappy") -> None:
        frame.to_parquet(file, index=False, compression=compression)

    def host(self, array: Any) -> Any:
        return array

    def partition(self, column: pd.Series, partitions: int) -> Any:
        return (pd.util.hash_array(column.to_numpy()) % partitions).astype("int64")

    def free_memory(self) -> int:
        return self.free
