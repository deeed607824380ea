"""NVTabular ETL, installed as ``missrec_t4r.etl``: raw tables in, session parquet + schema.pbtxt + catalogue out.

The only importer of nvtabular and merlin.core. What it hands over are files, so that training and serving need neither.
"""

import os

# Merlin 23.8 uses the legacy dask.dataframe; dask decides at its first import.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("DASK_DATAFRAME__CONVERT_STRING", "False")  # True turns list columns into text

from missrec_t4r.etl.nvt import cudf_compat as cudf_shim  # noqa: E402 - after the environment, before any import of Merlin

cudf_shim.apply()
