"""NVTabular ETL: raw tables in, session parquet with schema and catalogue out; the only importer of nvtabular."""
