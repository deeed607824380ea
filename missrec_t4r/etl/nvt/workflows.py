"""The built-in NVTabular workflows: raw events -> encoded, time-ordered sessions; raw ids of a request -> rows.

``build_session_workflow``   events -> sessions (offline): Categorify >> SessionGroupby (>> SessionSlice)
``build_request_workflow``   list column of raw ids -> rows: Categorify >> SessionSlice; serving compiles it

Categorify gets the catalogue's vocabulary (``vocabs=``), so row 3 + i is item i of the catalogue and never the i-th
most frequent. NVTabular groups within a partition, so `transform_events` shuffles by user first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from merlin.core.utils import global_dask_client
from merlin.dag import Node
from merlin.dag.executors import LocalExecutor
from merlin.io import Dataset
from merlin.schema import ColumnSchema, Schema, Tags
from nvtabular import Workflow, ops

from missrec_t4r.etl.dataframe import Frame
from missrec_t4r.etl.event_settings import EventSettings
from missrec_t4r.etl.nvt.event_ops import EventWeights, SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.schema import ITEM_ID, LIST_SUFFIX, SESSION_ID, TIMESTAMP, USER_ID

_DASK = {
    "dataframe.shuffle.method": "tasks",  # keeps the input order of ties, unlike "disk"
    "dataframe.convert-string": False,  # would turn list columns into text
}
_SAMPLE = 1000  # the vocabularies are given, so fitting only has to see the types
_ITEM_TAGS = (Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL, Tags.LIST, Tags.SEQUENCE)


def build_session_workflow(
    item_ids: pa.Array | Sequence[str | int],
    storage: Path,
    *,
    categories: Mapping[str, pd.Series] | None = None,
    numbers: Sequence[str] = (),
    max_events: int | None = None,
    derive: EventSettings | None = None,
) -> Workflow:
    """Return the workflow from events to sessions, unfitted.

    Parameters
    ----------
    item_ids : array of str or int
        Raw ids in catalogue order; the first one becomes row 3.
    storage : Path
        Folder for the vocabulary files until ``Workflow.save`` copies them.
    categories : mapping of str to Series
        Event columns to encode, with their distinct values in the order of their codes (from 3 on).
    numbers : sequence of str
        Event columns to keep as numbers.
    max_events : int, optional
        Keep the last so many events of a session; by default all.
    derive : EventSettings, optional
        Weights, sessions by inactivity and time features.

    Returns
    -------
    nvtabular.Workflow
        Columns ``user_id``, ``item_id-list``, ``timestamp-list`` and ``<column>-list``, one row per user; with
        ``session_id`` after ``user_id`` and one row per session if sessions end by inactivity.
    """
    derive, categories = derive or EventSettings(), dict(categories or {})
    events = Node([USER_ID, ITEM_ID, TIMESTAMP, *categories, *numbers])
    if derive.weights:
        events = events >> EventWeights(derive.weight_column, derive.weights)
    if derive.session_gap:
        events = events >> SessionGap(USER_ID, TIMESTAMP, derive.session_gap, SESSION_ID)
    if derive.time_features:
        events = events >> TimeFeatures(USER_ID, TIMESTAMP, derive.time_features, derive.newest)
    listed = [ITEM_ID, TIMESTAMP, *categories, *numbers, *derive.columns]
    categories |= derive.clock
    vocabularies = {ITEM_ID: as_series(item_ids), **categories}
    keys = [USER_ID, *([SESSION_ID] if derive.session_gap else [])]
    encoded = events[list(vocabularies)] >> ops.Categorify(vocabs=vocabularies, out_path=str(storage))
    rest = events[[*keys, *(name for name in listed if name not in vocabularies)]]
    sessions = rest + encoded >> SessionGroupby(
        keys, [TIMESTAMP], {name: ["list"] for name in listed}, name_sep="-", selected_keys=True
    )
    output = sessions[USER_ID] >> ops.AddMetadata(tags=[Tags.USER_ID, Tags.USER])
    if derive.session_gap:
        output = output + (sessions[SESSION_ID] >> ops.AddMetadata(tags=[Tags.SESSION_ID, Tags.SESSION]))
    for name in listed:
        column = sessions[name + LIST_SUFFIX]
        if max_events is not None:
            column = column >> SessionSlice(-max_events)
        output = output + (column >> ops.AddMetadata(tags=list(_tags(name, categories))))
    return Workflow(output)


def build_request_workflow(
    item_ids: pa.Array | Sequence[str | int], storage: Path, *, max_sequence_length: int = 50
) -> Workflow:
    """Return the workflow of a request: the list column ``item_id`` of raw ids -> its last rows.

    The column keeps its name, so that a request can go in again as a row of training data.
    """
    encoded = [ITEM_ID] >> ops.Categorify(vocabs={ITEM_ID: as_series(item_ids)}, out_path=str(storage))
    last = encoded >> SessionSlice(-max_sequence_length)
    return Workflow(last >> ops.AddMetadata(tags=list(_ITEM_TAGS)))


def fit(workflow: Workflow, frame: Frame) -> Workflow:
    """Fit on the first rows: the vocabularies are given, only dtypes are read from the data."""
    with _execution(workflow):
        return workflow.fit(_dataset(frame.head(_SAMPLE).reset_index(drop=True)))


def fit_events(workflow: Workflow, events: Frame, partitions: int = 1) -> Workflow:
    """Fit on all events, a frame or a dask collection of frames, for workflows with statistics, such as Normalize."""
    with _execution(workflow):
        return workflow.fit(_dataset(events) if partitions <= 1 else _shuffled(events, partitions, USER_ID))


def transform_events(workflow: Workflow, events: pd.DataFrame, partitions: int = 1) -> pa.Table:
    """Return the sessions of all users, sorted by user, independent of the number of partitions.

    Parameters
    ----------
    events : DataFrame
        ``user_id``, ``item_id``, ``timestamp`` and the event columns of the workflow.
    partitions : int
        More than one bounds the memory of a worker; users are shuffled to partitions by their hash.
    """
    table = pa.Table.from_pandas(transform_dataset(workflow, events, partitions, USER_ID), preserve_index=False)
    table = table.replace_schema_metadata(None).combine_chunks()
    keys = [(name, "ascending") for name in (USER_ID, SESSION_ID) if name in table.column_names]
    return table.take(pc.sort_indices(table, keys)) if partitions > 1 else table


def transform_dataset(workflow: Workflow, events: Frame, partitions: int, key: str) -> Frame:
    """Return the transformed events as a frame of the same library; all events of a key are in one partition."""
    with _execution(workflow):
        dataset = _dataset(events) if partitions <= 1 else _shuffled(events, partitions, key)
        return workflow.transform(dataset).to_ddf().compute(scheduler=_scheduler())


class _OnePassExecutor(LocalExecutor):
    """Merlin's executor of a workflow on one frame, except that a node runs once, not once per node that reads it.

    With Merlin's own a session workflow groups the events anew for every column that is taken from the sessions. A
    reader gets a copy, because operators may write into their input; the last one gets the output itself.
    """

    def transform(self, *arguments: Any, **options: Any) -> Any:
        """Return the output of a workflow on a frame."""
        run = copy.copy(self)  # threads may share this executor
        run.outputs = {}  # node -> its output, and the number of readers to come
        return super(_OnePassExecutor, run).transform(*arguments, **options)

    def _execute_node(self, node: Node, *arguments: Any, **options: Any) -> Any:
        if len(node.children) < 2:
            return super()._execute_node(node, *arguments, **options)
        if node not in self.outputs:
            self.outputs[node] = super()._execute_node(node, *arguments, **options), len(node.children)
        output, readers = self.outputs.pop(node)
        if readers > 1:
            self.outputs[node] = output, readers - 1
            return output.copy()
        return output


@contextmanager
def _execution(workflow: Workflow) -> Iterator[None]:
    """Set how dask and Merlin run a workflow; its own executor, which is stored with it, is restored afterwards.

    Raises
    ------
    MemoryError
        Also where `Categorify` has made a `RuntimeError` of it: fewer events at a time may do.
    """
    stock = workflow.executor._executor
    workflow.executor._executor = one_pass = _OnePassExecutor()
    one_pass.target_format = stock.target_format
    try:
        with dask.config.set(_DASK):
            yield
    except RuntimeError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError(str(error.__cause__)) from error
        raise
    finally:
        workflow.executor._executor = stock


def session_schema(output_schema: Schema, longest: int) -> Schema:
    """Return the Merlin schema of a session row: tags, item domain, ragged lists; without build-time paths."""
    columns = []
    for column in output_schema:
        dims = ((0, None), (0, longest)) if column.name.endswith(LIST_SUFFIX) else None
        properties = {
            name: column.properties[name] for name in ("domain", "embedding_sizes") if name in column.properties
        }
        columns.append(
            ColumnSchema(column.name, dtype=column.dtype, tags=column.tags, properties=properties, dims=dims)
        )
    return Schema(columns)


def as_series(values: pa.Array | Sequence[str | int]) -> pd.Series:
    """Return a vocabulary as a pandas Series, the form that Categorify takes."""
    return values.to_pandas() if isinstance(values, pa.Array | pa.ChunkedArray) else pd.Series(values)


def _tags(name: str, categories: Mapping[str, pd.Series]) -> tuple[Tags, ...]:
    if name == ITEM_ID:
        return _ITEM_TAGS
    if name == TIMESTAMP:
        return (Tags.TIME, Tags.LIST, Tags.SEQUENCE)  # not CONTINUOUS: raw seconds are no input of a model
    return (Tags.CATEGORICAL if name in categories else Tags.CONTINUOUS, Tags.LIST, Tags.SEQUENCE)


def _shuffled(events: pd.DataFrame, partitions: int, key: str) -> Dataset:
    """Return the events partitioned by key, without empty partitions, which Categorify cannot encode."""
    dataset = Dataset(dd.from_pandas(events, npartitions=partitions, sort=False), cpu=True).shuffle_by_keys([key])
    parts = dataset.to_ddf().map_partitions(_with_range_index).persist(scheduler=_scheduler())
    sizes = parts.map_partitions(len).compute(scheduler=_scheduler())
    return Dataset(parts.partitions[[index for index, size in enumerate(sizes) if size]], cpu=True)


def _dataset(frame: Frame) -> Dataset:
    """Return a data set of frames; on a machine with a GPU, Merlin would copy pandas there without being told."""
    return Dataset(frame, cpu=True if isinstance(getattr(frame, "_meta", frame), pd.DataFrame) else None)


def _with_range_index(frame: Any) -> Any:
    return frame.reset_index(drop=True)  # Categorify addresses null rows by their index label


def _scheduler() -> str | None:
    return None if global_dask_client() else "synchronous"
