"""Compatibility of merlin-core 23.8 with RAPIDS 24.12: restores two names that Merlin imports and cuDF has removed.

``cudf.core.column.build_categorical_column`` (Merlin reads hive-partitioned remote parquet with it) and
``dask_cudf.from_dask_dataframe``. Existing names are not replaced, and without cuDF nothing is imported. The README
lists what has been run on a GPU with RAPIDS 24.12.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any


def apply() -> list[str]:
    """Set cuDF's environment before its first import and restore missing names; return the restored ones."""
    if importlib.util.find_spec("cudf") is None:
        return []
    # On drivers of CUDA 13 the numba-cuda of RAPIDS 24.12 ends with a segmentation fault without NVIDIA's binding.
    os.environ.setdefault("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
    added = []
    columns = importlib.import_module("cudf.core.column")
    if not hasattr(columns, "build_categorical_column"):
        columns.build_categorical_column = build_categorical_column  # type: ignore[attr-defined]  # that is the shim
        added.append("cudf.core.column.build_categorical_column")
    if importlib.util.find_spec("dask_cudf") is not None:
        dask_cudf = importlib.import_module("dask_cudf")
        if not hasattr(dask_cudf, "from_dask_dataframe"):
            dask_cudf.from_dask_dataframe = from_dask_dataframe  # type: ignore[attr-defined]  # that is the shim
            added.append("dask_cudf.from_dask_dataframe")
    return added


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
