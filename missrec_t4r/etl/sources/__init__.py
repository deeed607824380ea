"""Sources of raw tables: parquet, csv and JSON lines, Amazon reviews, MovieLens, and a generated shop."""
