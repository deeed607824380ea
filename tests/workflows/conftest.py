"""Import the workflows first: dask reads its settings when it is imported, and `missrec_t4r.etl` sets them."""

import missrec_t4r.etl  # noqa: F401  # for its effect
