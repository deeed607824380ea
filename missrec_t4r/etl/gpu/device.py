"""The GPU as frames that read and write files: cuDF on the current device.

The functions of this package take a `CudfDevice`. With pandas in place of cuDF they make the same folder, which
`tests/workflows/test_gpu_engine.py` and `test_gpu_partitions.py` compare with the CPU engine's.
"""

from __future__ import annotations

import glob
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from merlin.core.dispatch import HAS_GPU

from missrec_t4r.arrays import AnyArray
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.dataframe import Array, CudfFrames, Frame, Series
from missrec_t4r.etl.installed import has_cudf
from missrec_t4r.etl.nvt import cudf_compat


class CudfDevice(CudfFrames):
    """cuDF on the current GPU."""

    def read_parquet(
        self, files: Sequence[Path], columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> Frame:
        """Return columns of parquet files, in the order of the files; ``row_groups``: some of a single file.

        An index that pandas wrote is a column, a folder named KEY=VALUE is none.
        """
        if len({_layout(file) for file in files}) == 1:
            groups = None if row_groups is None else [list(row_groups)]
            return self._read([str(file) for file in files], columns, groups)
        import cudf

        # libcudf reads files together only if their schemas agree in order and nullability
        return cudf.concat([self._read([str(file)], columns, None) for file in files], ignore_index=True)

    def _read(self, files: list[str], columns: Sequence[str], row_groups: list[list[int]] | None) -> Frame:
        import cudf

        frame = cudf.read_parquet(
            [glob.escape(file) for file in files],  # it would read others, or none, in place of `day[1].parquet`
            columns=list(columns),
            row_groups=row_groups,
            use_pandas_metadata=False,
            dataset_kwargs={"partitioning": None},
        )
        # What pandas noted as index becomes one in any case: a column that was asked for, or a range of numbers, which
        # cuDF trusts even where Arrow has filtered the rows since.
        frame = frame if set(columns) <= {*frame.columns} else frame.reset_index()
        return cudf.DataFrame({name: cudf.Series._from_column(frame[name]._column) for name in columns})

    def write_parquet(self, frame: Frame, file: Path, compression: str | None = "snappy") -> None:
        """Write a frame without its index, with types as Arrow writes them: every column and element may be null."""
        frame.to_parquet(str(file), index=False, force_nullable_schema=True, compression=compression)

    def host(self, array: Any) -> AnyArray:
        """Return an array in the memory of the host."""
        copied: AnyArray = self.xp.asnumpy(array)
        return copied

    def partition(self, column: Series, partitions: int) -> Array:
        """Return the partition of every value, the same for the same value in every file, [row].

        It is the remainder of cuDF's 32-bit hash (murmur3).
        """
        return (column.hash_values().values.astype("uint32") % partitions).astype("int64")

    def free_memory(self) -> int:
        """Return the bytes that can be allocated: by RMM of a limit or a pool, if one was set, or of the device.

        The maximum of a pool cannot be read, so that a pool counts as large as it is.
        """
        rmm = importlib.import_module("rmm")
        resource = rmm.mr.get_current_device_resource()
        while True:
            if hasattr(resource, "get_allocation_limit"):
                return int(resource.get_allocation_limit() - resource.get_allocated_bytes())
            if hasattr(resource, "pool_size"):
                return int(resource.pool_size())
            if not hasattr(resource, "get_upstream"):
                return int(rmm.mr.available_device_memory()[0])
            resource = resource.get_upstream()


def _layout(file: Path) -> tuple[tuple[str, str, bool], ...]:
    """Return names, types and nullability of a file's columns, in their order."""
    return tuple((field.name, str(field.type), field.nullable) for field in pq.read_schema(file))


def obstacle() -> str | None:
    """Return why there is no GPU to compute on; None if there is one."""
    if not has_cudf():
        return next(iter(cudf_compat.refusals), "cuDF is not installed")
    return None if HAS_GPU else "there is no CUDA device"


def open_device() -> CudfDevice:
    """Return the frames of the GPU.

    Raises
    ------
    ConfigError
        cuDF is not installed or does not import, or there is no CUDA device.
    """
    reason = obstacle()
    if reason is None:
        try:
            importlib.import_module("cudf")
        except Exception as error:  # cuDF checks driver and device while it is imported
            reason = f"cuDF does not import ({type(error).__name__}: {error})"
    if reason is not None:
        raise ConfigError(
            f"--engine gpu, and {reason}",
            "cuDF 24.12 and a GPU that it sees",
            "pip install -r requirements/gpu.txt, and nvidia-smi must list a GPU; or leave --engine out for the CPU",
        )
    return CudfDevice()
