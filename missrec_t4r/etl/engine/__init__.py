"""The out-of-core engine: data sets larger than memory, and incremental updates of a data folder."""
