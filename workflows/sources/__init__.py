"""One small module per source of raw data, each with one function that yields the two tables of the contract."""
