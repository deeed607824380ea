"""Environment variables that Merlin 23.8 needs before its first import; imported first by this package."""

import importlib.util
import os

# Merlin's loader uses the legacy dask.dataframe; dask decides at its first import.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("DASK_DATAFRAME__CONVERT_STRING", "False")  # True turns list columns into text
if importlib.util.find_spec("cudf") is not None:
    # On drivers of CUDA 13 the numba-cuda of RAPIDS 24.12 ends with a segmentation fault without NVIDIA's binding.
    os.environ.setdefault("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
