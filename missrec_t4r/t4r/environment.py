"""Environment variables that Merlin 23.8 needs before its first import; imported first by this package."""

import importlib.util
import os
import sys

from missrec_t4r.errors import ConfigError

# Merlin's loader uses the legacy dask.dataframe; dask decides at its first import.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("DASK_DATAFRAME__CONVERT_STRING", "False")  # True turns list columns into text
if importlib.util.find_spec("cudf") is not None:
    # On drivers of CUDA 13 the numba-cuda of RAPIDS 24.12 ends with a segmentation fault without NVIDIA's binding.
    os.environ.setdefault("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
if "dask_expr" in sys.modules:  # dask.dataframe was imported first, with query planning, and cannot go back
    raise ConfigError(
        "dask.dataframe was imported with query planning, before missrec_t4r",
        "the dask.dataframe that Merlin 23.8 works with",
        "import missrec_t4r.t4r first, or set DASK_DATAFRAME__QUERY_PLANNING=False in the environment",
    )
