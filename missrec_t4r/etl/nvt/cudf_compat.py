"""Compatibility of merlin-core and NVTabular 23.8 with RAPIDS 24.12: restores what they use and cuDF has removed.

| restored | used by |
|---|---|
| ``cudf.core.column.build_categorical_column``, ``ColumnBase.as_frame`` | Merlin, for hive-partitioned remote parquet |
| ``dask_cudf.from_dask_dataframe`` | Merlin, for dask frames of pandas parts |
| ``"size"`` among the aggregations of strings | NVTabular, for `Categorify.fit` on strings |

What is there is not replaced, and without cuDF nothing is imported. Where cuDF refuses driver or card, Merlin, which
would end with its error, goes on as without it. NVRTC, the compiler of cupy's kernels, is loaded from its wheel where
the machine has no CUDA toolkit. All symbols, and what has been run on a GPU: docs/howto/gpu.md.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

NVRTC = "libnvrtc.so.12"
refusals: list[str] = []
"""Why cuDF does not import here although it is installed; empty otherwise."""


def apply() -> list[str]:
    """Set cuDF's environment before its first import and restore missing names; return the restored ones."""
    if importlib.util.find_spec("cudf") is None:
        return []
    # On drivers of CUDA 13 the numba-cuda of RAPIDS 24.12 ends with a segmentation fault without NVIDIA's binding.
    os.environ.setdefault("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
    _load_nvrtc()
    added = []
    try:
        columns = importlib.import_module("cudf.core.column")
    except Exception as error:  # it asks driver and card while it is imported, and raises what they answer
        _do_without(error)
        return []
    if not hasattr(columns, "build_categorical_column"):
        columns.build_categorical_column = build_categorical_column  # type: ignore[attr-defined]  # that is the shim
        added.append("cudf.core.column.build_categorical_column")
    column = getattr(columns, "ColumnBase", None)
    if column is not None and not hasattr(column, "as_frame"):
        column.as_frame = as_frame
        added.append("cudf.core.column.ColumnBase.as_frame")
    strings = _string_aggregations()
    if strings is not None and "size" not in strings:  # since 24.06 compared in lower case, where only "SIZE" is
        strings.add("size")
        added.append("size of strings")
    if importlib.util.find_spec("dask_cudf") is not None:
        dask_cudf = importlib.import_module("dask_cudf")
        if not hasattr(dask_cudf, "from_dask_dataframe"):
            dask_cudf.from_dask_dataframe = from_dask_dataframe  # type: ignore[attr-defined]  # that is the shim
            added.append("dask_cudf.from_dask_dataframe")
    return added


def _do_without(error: Exception) -> None:
    """Let all that imports cuDF after this find it missing."""
    for name in ("cudf", "dask_cudf"):
        sys.modules[name] = None  # type: ignore[assignment]  # Python's way to say so
    refusals.append(f"cuDF does not import ({type(error).__name__}: {' '.join(str(error).split())})")
    log.warning(f"{refusals[-1]}: tables are read and transformed on the CPU")


def _load_nvrtc() -> None:
    """Load NVRTC from its wheel unless the system finds one: cupy 13 asks for it by its name alone."""
    try:
        ctypes.CDLL(NVRTC)
    except OSError:
        with suppress(importlib.metadata.PackageNotFoundError, OSError):
            wheel = importlib.metadata.distribution("nvidia-cuda-nvrtc-cu12")
            ctypes.CDLL(str(wheel.locate_file(f"nvidia/cuda_nvrtc/lib/{NVRTC}")))


def _string_aggregations() -> set[str] | None:
    """Return cuDF's set of aggregations of strings, to be changed in place; None in releases without it."""
    for name in ("cudf._lib.groupby", "cudf.core.groupby.groupby"):  # until 24.12, and later
        try:
            aggregations = getattr(importlib.import_module(name), "_STRING_AGGS", None)
        except ImportError:
            continue
        if isinstance(aggregations, set):
            return aggregations
    return None


def as_frame(column: Any) -> Any:
    """Return a cuDF column as a frame of one column without a name; a Series has what Merlin calls on it."""
    import cudf

    return cudf.Series._from_column(column)


def build_categorical_column(
    categories: Any,
    codes: Any,
    mask: Any = None,
    size: int | None = None,
    offset: int = 0,
    null_count: int | None = None,
    ordered: bool = False,
) -> Any:
    """Return a cuDF categorical column of codes, as cuDF up to 24.10 did."""
    from cudf import CategoricalDtype
    from cudf.core.column import CategoricalColumn

    return CategoricalColumn(
        data=None,
        size=size,
        dtype=CategoricalDtype(categories=categories, ordered=ordered),
        mask=mask,
        offset=offset,
        null_count=null_count,
        children=(codes,),
    )


def from_dask_dataframe(frame: Any) -> Any:
    """Return a dask dataframe of pandas parts as one of cuDF parts."""
    return frame.to_backend("cudf")
