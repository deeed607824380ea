"""``missrec etl --engine gpu``: the in-memory engine on frames of cuDF; events stay in the memory of the GPU.

    read      parquet of plain types, here; other files as on the CPU, then copied, and the log says so
    clean     `inputs.clean_inputs`: one code for pandas and cuDF
    sessions  the NVTabular workflow (`nvt/workflows.py`)
    splits    prefixes of the lists, written as parquet, here

The item table, vocabularies and counts are on the CPU. The functions take the frames' adapter: with pandas' they make
the same folder, which `tests/workflows/test_gpu_engine.py` compares with the CPU engine's.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from merlin.core.dispatch import HAS_GPU

from missrec_t4r.arrays import AnyArray
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl import splits
from missrec_t4r.etl.dataframe import Adapter, CudfFrames, Frame, ListColumn, Series
from missrec_t4r.etl.inputs import Events
from missrec_t4r.etl.installed import has_cudf
from missrec_t4r.etl.nvt.session_ops import ragged_index
from missrec_t4r.etl.nvt.workflow_file import refuse_uneven_lists
from missrec_t4r.etl.outputs import Written
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import Notations
from missrec_t4r.etl.sources.table import PARQUET_SUFFIXES
from missrec_t4r.progress import track
from missrec_t4r.schema import ITEM_ID, ITEM_LIST, LIST_SUFFIX, SPLITS, TIMESTAMP, USER_ID

_SESSIONS_PER_FILE = 5_000_000
"""A file is compressed by one kernel after the other: few large ones are faster to write than many."""
_MICROSECONDS = 1_000_000


class Device(Adapter, Protocol):
    """Frames that are read from files and written to them without another library."""

    def read_parquet(self, files: Sequence[Path], columns: Sequence[str]) -> Frame:
        """Return columns of parquet files, in the order of the files."""

    def write_parquet(self, frame: Frame, file: Path) -> None:
        """Write a frame without its index."""

    def host(self, array: Any) -> AnyArray:
        """Return an array in the memory of the host."""


class CudfDevice(CudfFrames):
    """cuDF on the current GPU."""

    def read_parquet(self, files: Sequence[Path], columns: Sequence[str]) -> Frame:
        """Decode on the GPU; an index that pandas wrote is a column."""
        import cudf

        return cudf.read_parquet([str(file) for file in files], columns=list(columns), use_pandas_metadata=False)

    def write_parquet(self, frame: Frame, file: Path) -> None:
        """Encode on the GPU, with types as Arrow writes them: every column and every element may be null."""
        frame.to_parquet(str(file), index=False, force_nullable_schema=True)

    def host(self, array: Any) -> AnyArray:
        """Copy the array."""
        copied: AnyArray = self.xp.asnumpy(array)
        return copied


def obstacle() -> str | None:
    """Return why there is no GPU to compute on; None if there is one."""
    if not has_cudf():
        return "cuDF is not installed"
    return None if HAS_GPU else "there is no CUDA device"


def open_device() -> Device:
    """Return the frames of the GPU.

    Raises
    ------
    ConfigError
        cuDF is not installed or does not import, or there is no CUDA device.
    """
    found = obstacle()
    if found is None:
        try:
            importlib.import_module("cudf")
        except Exception as error:  # cuDF checks driver and device while it is imported
            found = f"cuDF does not import ({type(error).__name__}: {error})"
    if found is not None:
        raise ConfigError(
            f"--engine gpu, and {found}",
            "cuDF 24.12 and a GPU that it sees",
            "pip install -r requirements/gpu.txt, and nvidia-smi must list a GPU; or leave --engine out for the CPU",
        )
    return CudfDevice()


# Read


class NotPlainError(Exception):
    """Files that only the CPU's readers understand; the message says why."""


def read_events(
    device: Device,
    files: Sequence[Path],
    names: dict[str, str],
    item_type: pa.DataType,
    findings: checks.Findings,
    *,
    drop_columns: Sequence[str],
    categorical_columns: Sequence[str],
) -> Events:
    """Read the complete events, as `inputs.read_tables` and `inputs.to_events` do on the CPU.

    Parameters
    ----------
    device : Device
        Frames to read into.
    files : sequence of Path
        Interactions.
    names : dict
        Input column -> ``user_id``, ``item_id`` or ``timestamp``.
    item_type : pyarrow.DataType
        Of the ids in the item table.
    findings : Findings
        Gains what the CPU would find.
    drop_columns, categorical_columns
        As in `missrec_t4r.etl.pipeline.etl`.

    Raises
    ------
    NotPlainError
        The CPU has to read these files: another format, types to be converted, texts that are numbers or no UTF-8.
    SchemaError, DataError
        A column to drop is missing, or no event is complete.
    """
    found = checks.Findings()
    schema = _plain_schema(files, names)
    wanted = {raw: name for raw, name in names.items() if raw in schema.names}
    unwanted = checks.row_indexes(schema.names, wanted)
    checks.note_row_indexes(found, unwanted)
    clashing = [name for name in schema.names if name in names.values() and name not in names]
    checks.note_taken_names(found, clashing)
    left = [name for name in schema.names if name not in (*unwanted, *clashing)]
    empty = pa.table({names.get(name, name): pa.array([], _decoded(schema.field(name).type)) for name in left})
    features = checks.event_features(empty, drop_columns, found)
    if (item_kind := checks.normal_ids(empty[ITEM_ID], ITEM_ID).type) != item_type:
        raise NotPlainError(f"item ids are {item_kind} in the events and {item_type} in the item table")
    raw = {name: raw for raw, name in names.items()} | {name: name for name in features}
    columns = [*checks.KEYS, *features]
    frame = device.read_parquet(files, [raw[name] for name in columns]).rename(columns=names)[columns]
    for name in columns:
        if pa.types.is_string(empty[name].type):
            _check_texts(device, frame[name], name, numbers=name in features and name not in categorical_columns)
    frame = _complete(_normal(frame, device), found)
    findings.found += found.found
    return Events(frame, features)


def _plain_schema(files: Sequence[Path], names: dict[str, str]) -> pa.Schema:
    """Return the schema of parquet files that are alike."""
    if odd := [file for file in files if not file.name.endswith(PARQUET_SUFFIXES)]:
        raise NotPlainError(f"{odd[0]} is no parquet")
    try:
        schemas = [pq.read_schema(file) for file in files]
        rows = sum(pq.read_metadata(file).num_rows for file in files)
    except Exception as error:
        raise NotPlainError(f"a file cannot be read ({error})") from error
    schema = schemas[0]
    if any(
        set(zip(one.names, one.types, strict=True)) != set(zip(schema.names, schema.types, strict=True))
        for one in schemas
    ):
        raise NotPlainError("the files have different columns or types")
    if not rows or [raw for raw in names if raw not in schema.names] or len(set(schema.names)) < len(schema.names):
        raise NotPlainError("there is no row, or a column is missing or there twice")
    for name, kind in zip(schema.names, schema.types, strict=True):
        if odd_kind := _not_plain(kind, names.get(name)):
            raise NotPlainError(f"column {name!r} is {kind}, which is {odd_kind}")
    return schema


def _not_plain(kind: pa.DataType, role: str | None) -> str:
    """Return what the CPU's readers do with a type; empty if nothing."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return "decoded"
    if kind in (pa.float16(), pa.uint64()):
        return "checked value by value"
    text, integer = types.is_string(kind) or types.is_large_string(kind), types.is_integer(kind)
    time = integer or types.is_floating(kind) or (types.is_timestamp(kind) and kind.tz is None)
    if (role in (USER_ID, ITEM_ID) and not (text or integer)) or (role == TIMESTAMP and not time):
        return "converted"
    return ""


def _decoded(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_large_string(kind) else kind


def _check_texts(device: Device, column: Series, name: str, *, numbers: bool) -> None:
    """Refuse texts that are no UTF-8, which the CPU repairs, and numbers as texts, which it parses."""
    distinct = device.to_arrow(column.drop_duplicates())
    if checks.not_utf8(pa.chunked_array([distinct])):
        raise NotPlainError(f"texts of column {name!r} are no UTF-8")
    seen = Notations()
    seen.add(distinct.to_pylist() if numbers else ())
    if seen.chosen:
        raise NotPlainError(f"the texts of column {name!r} are numbers")


def _normal(frame: Frame, device: Device) -> Frame:
    """Return the frame with nulls for empty ids and times that are no number, and dates as seconds."""
    columns = {}
    for name in (USER_ID, ITEM_ID):
        if device.is_text(frame[name]):
            columns[name] = frame[name].where(frame[name] != "")
    time = frame[TIMESTAMP]
    if time.dtype.kind == "f":
        columns[TIMESTAMP] = checks.finite(time)
    elif time.dtype.kind == "M":
        columns[TIMESTAMP] = time.astype("datetime64[us]")
    return frame.assign(**columns)


def _complete(frame: Frame, findings: checks.Findings) -> Frame:
    """Return the events that have user, item and time, with ids and times in their normal types."""
    dates = frame[TIMESTAMP].dtype.kind == "M"
    usable, whole = None, True
    if dates:
        whole = bool((frame[TIMESTAMP].dropna().astype("int64") % _MICROSECONDS == 0).all())
    for name in checks.KEYS:
        valid = frame[name].notna()
        checks.note_incomplete(findings, name, len(frame) - int(valid.sum()))
        usable = valid if usable is None else usable & valid
    frame = frame[usable].reset_index(drop=True)
    checks.require_events(len(frame))
    columns = {name: frame[name].astype("int64") for name in (USER_ID, ITEM_ID) if frame[name].dtype != object}
    if dates:
        seconds = frame[TIMESTAMP].astype("int64")
        columns[TIMESTAMP] = seconds // _MICROSECONDS if whole else seconds / _MICROSECONDS
    else:
        columns[TIMESTAMP] = frame[TIMESTAMP].astype("float64" if frame[TIMESTAMP].dtype.kind == "f" else "int64")
    return frame.assign(**columns)


# Write


def write_splits(
    device: Device, sessions: Frame, event_times: Series, settings: dict[str, Any], folder: Path, n_rows: int
) -> Written:
    """Write the rows of every split.

    Parameters
    ----------
    device : Device
        Of the frame.
    sessions : Frame
        Output of the session workflow; list columns end in ``-list``.
    event_times : Series
        Of all events, for the boundaries of a time split that are not given.
    settings : dict
        Of the run; the boundaries are noted in it.
    folder : Path
        Data folder.
    n_rows : int
        Item indices of the catalogue, reserved ones included.

    Raises
    ------
    DataError, SchemaError, ConfigError
        A split has no row, lists differ in length, or the boundaries are in the wrong order.
    """
    xp = device.xp
    lists = {name: device.take_apart(sessions[name]) for name in sessions.columns if name.endswith(LIST_SUFFIX)}
    offsets = lists[ITEM_LIST].offsets.astype("int64")  # [session + 1]
    refuse_uneven_lists([name for name, column in lists.items() if not bool((column.offsets == offsets).all())])
    lengths = _prefix_lengths(device, offsets, lists, event_times, settings)
    written, train_items = {}, None
    for split in track(SPLITS, "writing the splits"):
        rows = xp.flatnonzero(lengths[split])
        index, ends = ragged_index(offsets[:-1][rows], lengths[split][rows], xp)  # [event], [row + 1]
        columns = {
            name: device.build(ListColumn(_take(lists[name].values, index), ends))
            if name in lists
            else _take(sessions[name], rows)
            for name in sessions.columns
        }
        frame = type(sessions)(columns)
        written[split] = len(frame)
        (folder / split).mkdir(exist_ok=True)
        for part, start in enumerate(range(0, len(frame), _SESSIONS_PER_FILE)):
            rows_of_file = frame.iloc[start : start + _SESSIONS_PER_FILE]
            device.write_parquet(rows_of_file, folder / split / f"part_{part}.parquet")
        if split == "train":
            train_items = device.array(_take(lists[ITEM_LIST].values, index))
    return Written(
        written, int(xp.diff(offsets).max()), device.host(xp.bincount(train_items, minlength=n_rows)).astype("int64")
    )


def _prefix_lengths(
    device: Device, offsets: Any, lists: dict[str, ListColumn], event_times: Series, settings: dict[str, Any]
) -> splits.Lengths:
    if settings["split"] == "leave_one_out":
        lengths = splits.leave_one_out(offsets, device.xp)
    else:
        if settings["valid_from"] is None:
            boundaries = splits.default_boundaries(device.array(event_times), device.xp)
            settings["valid_from"], settings["test_from"] = boundaries
        times = device.array(lists[TIMESTAMP + LIST_SUFFIX].values)
        lengths = splits.time_split(offsets, times, settings["valid_from"], settings["test_from"], device.xp)
    splits.check_lengths(lengths)
    return lengths


def _take(column: Series, index: Any) -> Series:
    return column.take(index).reset_index(drop=True)
