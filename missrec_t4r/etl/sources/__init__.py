"""Where raw tables come from: any parquet or csv file (`table.py`), or our generated shop (`generator.py`)."""
