"""Session parquet to arrays: the item column, the event features that a schema names, and labels of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.arrays import AnyArray
from missrec_t4r.data.session_files import read_rows, row_files
from missrec_t4r.data.sessions import Sessions, flat_lists
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl.dataframe import adapter_of
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.io.input_files import files_of
from missrec_t4r.schema import NULL_ROW
from missrec_t4r.t4r.columns import as_core_schema, event_feature_schema, item_column


def read_sessions(paths_or_dataset: Any, schema: Any, targets: Sequence[str] = ()) -> Sessions:
    """Read the item column and the event features that the schema names.

    Columns ``targets`` have one value for a session, which all its events get: so it stays with them.

    Raises
    ------
    DataError
        No file.
    SchemaError
        A column is missing, or its lists are not as long as the items'.
    """
    if isinstance(paths_or_dataset, Sessions):
        return paths_or_dataset
    core_schema = as_core_schema(schema)
    item = item_column(core_schema).name
    event_features = event_feature_schema(core_schema, item).column_names
    table = _read_table(paths_or_dataset, [item, *event_features, *targets])
    values, offsets = flat_lists(table[item], NULL_ROW)
    features = {}
    for name in event_features:
        feature, at = flat_lists(table[name])
        if not np.array_equal(at, offsets):
            raise SchemaError(
                f"column {name!r} has lists of other lengths than {item!r}", "one value per event", "re-run the ETL"
            )
        features[name] = feature.astype(np.float32) if feature.dtype.kind == "f" else feature.astype(np.int64)
    for name in targets:
        features[name] = np.repeat(_labels(table[name], name), np.diff(offsets))
    return Sessions(values.astype(np.int64), offsets, features)


def _labels(column: pa.ChunkedArray, name: str) -> AnyArray:
    """Return the numbers of a column, [session].

    Raises
    ------
    SchemaError
        It holds something else, or nulls.
    """
    array = one_array(column)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int64())
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise SchemaError(
            f"target column {name!r} of type {array.type} with {array.null_count} nulls",
            "a number for every session",
            "fill or encode it in the workflow, or leave it out with schema.excluding_by_name",
        )
    values: AnyArray = array.to_numpy(zero_copy_only=False)
    return values


def _read_table(paths_or_dataset: Any, names: Sequence[str]) -> pa.Table:
    if hasattr(paths_or_dataset, "to_ddf"):
        with dask.config.set({"dataframe.convert-string": False}):  # dask would turn the lists into text
            frame = paths_or_dataset.to_ddf()[list(names)].compute()
        adapter = adapter_of(frame)  # Merlin reads with cuDF where it is installed
        return pa.table({name: adapter.to_arrow(frame[name]) for name in names})
    if paths_or_dataset is None:
        raise DataError(
            "the Trainer has no sessions to read",
            "parquet files or a folder",
            "pass train_dataset_or_path, and eval_dataset_or_path to evaluate",
        )
    paths = [paths_or_dataset] if isinstance(paths_or_dataset, (str, Path)) else list(paths_or_dataset)
    sources = [source for path in paths for source in _sources(Path(path))]
    if not sources:
        raise DataError(
            f"no parquet file in {', '.join(map(str, paths))}", "session parquet", "run `missrec etl` first"
        )
    tables = []
    for source in sources:
        for file in row_files(source) if source.is_dir() else [source]:
            if missing := set(names) - set(pq.read_schema(file).names):
                raise SchemaError(
                    f"{file} lacks {sorted(missing)}", "every column that the schema names", "re-run the ETL"
                )
        read = read_rows if source.is_dir() else pq.read_table
        tables.append(read(source, columns=list(names)))
    return pa.concat_tables(tables, promote_options="permissive")


def _sources(path: Path) -> list[Path]:
    """Return the folder itself (it may have delta files), the files of a glob pattern, or the file."""
    if path.is_dir():
        return [path] if row_files(path) else []
    if any(sign in str(path) for sign in "*?["):
        return files_of(str(path), (".parquet",))
    if not path.is_file():
        raise DataError(f"{path} does not exist", "a parquet file or a folder of them", "check the path")
    return [path]
