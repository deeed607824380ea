"""ETL: raw tables in; session parquet, schema.pbtxt and catalogue out.

Only `missrec_t4r.etl.nvt` imports nvtabular and merlin.core; the out-of-core engine runs without them, and writes the
same rows, schema and request transform. Results are files, so training and serving need neither. Import this package
before Merlin: it sets the environment that Merlin 23.8 needs.
"""

import os
import sys
import warnings

from missrec_t4r.errors import ConfigError

# Merlin 23.8 uses the legacy dask.dataframe; dask decides at its first import.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("DASK_DATAFRAME__CONVERT_STRING", "False")  # True turns list columns into text

if "dask_expr" in sys.modules:  # dask.dataframe was imported first, with query planning, and cannot go back
    raise ConfigError(
        "dask.dataframe was imported with query planning, before missrec_t4r",
        "the dask.dataframe that Merlin 23.8 works with",
        "import missrec_t4r.etl or .t4r first, or set DASK_DATAFRAME__QUERY_PLANNING=False in the environment",
    )

# Merlin and dask emit these at every import or use, whatever a user does.
for _message in (
    "The legacy Dask DataFrame implementation",
    "Tensorflow dtype mappings did not load",
    "Initializing an NVTabular Dataset in CPU mode",
):
    warnings.filterwarnings("ignore", message=_message)

from missrec_t4r.etl.nvt import cudf_compat  # noqa: E402  # after the environment, before any import of Merlin

cudf_compat.apply()
