"""What Merlin 23.8 needs in the environment before its first import; imported first by this package."""

import os

# Merlin's loader uses the legacy dask.dataframe; dask decides at its first import.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("DASK_DATAFRAME__CONVERT_STRING", "False")  # True turns list columns into text
