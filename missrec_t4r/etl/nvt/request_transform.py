"""The request transform: what serving does with the raw ids and event features of a request, compiled from workflows.

Serving has no NVTabular. `compile_session_transform` reads the item part off a fitted request workflow (vocabulary and
slice), `compile_event_features` the event features off a fitted session workflow: for every list column it follows the
graph from the output back to the raw column and translates each operator on the way.

``Categorify``                                                raw value -> code, by its vocabulary
``FillMissing, Clip, LogOp, Normalize, NormalizeMinMax``      number -> number, as steps in the order of the workflow
selection, grouping into lists, slices, metadata, `KCore`     nothing to do for one event
`TimeFeatures`, `EventWeights`, `SessionGap`                  their new column is the raw column: a request sends it

Every other operator is refused with its name, because serving would feed the model values that training never saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from merlin.dag import Graph, Node
from merlin.dag.ops.concat_columns import ConcatColumns
from merlin.dag.ops.selection import SelectionOp
from merlin.dag.ops.subset_columns import SubsetColumns
from merlin.dag.ops.subtraction import SubtractionOp
from merlin.dag.selector import ColumnSelector
from nvtabular import Workflow, ops

from missrec_t4r.errors import DataError
from missrec_t4r.etl.nvt.event_ops import AddsColumns, KCore
from missrec_t4r.etl.nvt.serialization import load_workflow
from missrec_t4r.etl.nvt.session_ops import SessionSlice
from missrec_t4r.etl.nvt.workflows import transform_dataset
from missrec_t4r.etl.outputs import request_transform
from missrec_t4r.schema import ITEM_ID, ITEM_LIST, LIST_SUFFIX, TIMESTAMP

Step = list[Any]
"""Name of a step on numbers and its constants: see `missrec_t4r.data.number_steps`."""
_WITHOUT_EFFECT = (
    *(SelectionOp, ConcatColumns, SubsetColumns, SubtractionOp, ops.Rename),
    *(ops.Groupby, ops.ListSlice, KCore, AddsColumns, ops.AddMetadata),
)
"""Operators that leave the value of one event as it is (their subclasses too)."""


def compile_session_transform(workflow: Workflow) -> dict[str, Any]:
    """Return what a fitted request workflow does, as plain data for serving without NVTabular.

    The vocabulary file of Categorify gives the type and the number of items, the slice gives the length. The vocabulary
    is the catalogue's, so it is not repeated.

    Raises
    ------
    DataError
        The workflow is not of the form that `build_request_workflow` makes.
    """
    encoders = Graph.get_nodes_by_op_type([workflow.output_node], ops.Categorify)
    slices = Graph.get_nodes_by_op_type([workflow.output_node], SessionSlice)
    if len(encoders) != 1 or len(slices) != 1:
        raise DataError("the request workflow has other operators", "one Categorify and one SessionSlice")
    vocabulary = request_vocabulary(workflow)
    return request_transform(vocabulary.type, len(vocabulary), -slices.pop().op.start, {})


def request_vocabulary(workflow: Workflow) -> pa.Array:
    """Return the raw item ids of a workflow in the order of their rows, from row 3 on."""
    encoders = Graph.get_nodes_by_op_type([workflow.output_node], ops.Categorify)
    (encoder,) = [node.op for node in encoders if ITEM_ID in node.op.categories]
    return _vocabulary(encoder, ITEM_ID)


def compile_event_features(workflow: Workflow) -> dict[str, dict[str, Any]]:
    """Return how a request's event features are encoded, by column without ``-list``.

    Parameters
    ----------
    workflow : Workflow
        A fitted session workflow: raw events -> one row per session.

    Returns
    -------
    dict
        ``{"kind": "categorical", "values": [...]}``: the raw values of the codes from 3 on.
        ``{"kind": "continuous"}``, with ``"steps"`` where the workflow computes something of the number.

    Raises
    ------
    DataError
        An operator between a raw column and a list of the sessions cannot be compiled; it is named.
    """
    lists = [name for name in workflow.output_schema.column_names if name.endswith(LIST_SUFFIX)]
    return {
        name.removesuffix(LIST_SUFFIX): _compile_column(workflow, name)
        for name in lists
        if name not in (ITEM_LIST, TIMESTAMP + LIST_SUFFIX)
    }


def longest_request(workflow: Workflow) -> int | None:
    """Return the number of events to which a session workflow cuts the item list, or None where it cuts nothing.

    Raises
    ------
    DataError
        The item list is cut otherwise than to its last events.
    """
    lengths = []
    for operator, _ in operators_of(workflow, ITEM_LIST):
        if isinstance(operator, ops.ListSlice):
            if operator.start >= 0 or operator.end < 2**31 or operator.pad:
                raise DataError(
                    f"{type(operator).__name__} cuts item_id-list to [{operator.start}:{operator.end}]",
                    "the last events of a session, which serving keeps of a request",
                    "slice with SessionSlice(-LENGTH)",
                )
            lengths.append(-operator.start)
    return min(lengths, default=None)


def operators_of(workflow: Workflow, column: str) -> Iterator[tuple[Any, str]]:
    """Yield the operators that an output column comes from, the last one first, with the name of the column before it.

    The walk ends at the data set or at the operator that made the column out of others.
    """
    node: Node | None = workflow.output_node
    while node is not None:
        before = node.op.column_mapping(ColumnSelector(node.input_schema.column_names)).get(column, [column])
        if isinstance(node.op, AddsColumns) and column in node.op.added():
            return
        if len(before) != 1:
            raise _refused(node.op, column)
        (column,) = before
        yield node.op, column
        parents = node.parents_with_dependencies
        node = next((parent for parent in parents if column in parent.output_schema.column_names), None)


def _compile_column(workflow: Workflow, column: str) -> dict[str, Any]:
    steps: list[Step] = []
    encoder: tuple[ops.Categorify, str] | None = None
    for operator, name in operators_of(workflow, column):
        if isinstance(operator, ops.Categorify) and not operator.num_buckets and encoder is None and not steps:
            encoder = operator, name
        elif not isinstance(operator, _WITHOUT_EFFECT):
            step = None if encoder else _number_step(operator, name)
            if step is None:
                raise _refused(operator, column)
            steps.insert(0, step)  # the walk goes from the output to the input
    if encoder is not None:
        return {"kind": "categorical", "values": _vocabulary(*encoder).to_pylist()}
    return {"kind": "continuous", "steps": steps} if steps else {"kind": "continuous"}


def _number_step(operator: Any, name: str) -> Step | None:
    """Return an operator on numbers as data, or None if it is another one."""
    if isinstance(operator, ops.FillMissing) and not operator.add_binary_cols:
        return ["fill", float(operator.fill_val)]
    if isinstance(operator, ops.Clip):
        return ["clip", operator.min_value, operator.max_value]
    if isinstance(operator, ops.LogOp):
        return ["log1p"]
    if isinstance(operator, ops.Normalize):
        deviation = float(operator.stds[name])
        return ["standardise", float(operator.means[name]), deviation if deviation > 0 else 1.0]
    if isinstance(operator, ops.NormalizeMinMax) and operator.maxs[name] > operator.mins[name]:
        return ["standardise", float(operator.mins[name]), float(operator.maxs[name] - operator.mins[name])]
    return None


def _vocabulary(encoder: ops.Categorify, name: str) -> pa.Array:
    return pq.read_table(encoder.categories[name])[name].combine_chunks()


def _refused(operator: Any, column: str) -> DataError:
    return DataError(
        f"the operator {type(operator).__name__}, which {column!r} is made with, cannot be compiled for serving",
        "Categorify by a vocabulary, or FillMissing, Clip, LogOp, Normalize, NormalizeMinMax on numbers",
        "compute the column before missrec etl, so that events and requests have it already",
    )


def request_rows(workflow: Path, sessions: Sequence[Sequence[str | int | None]]) -> list[list[int]]:
    """Return the rows that NVTabular itself computes for sessions of raw ids, by a saved request workflow.

    Parameters
    ----------
    workflow : Path
        Folder ``request_workflow`` of a data folder.
    sessions : sequence of sequences
        Raw ids, None for an event without one.
    """
    frame = pd.DataFrame({ITEM_ID: pd.Series([list(session) for session in sessions], dtype=object)})
    transformed = transform_dataset(load_workflow(workflow), frame, 1, ITEM_ID)  # pandas in, pandas out
    return [[int(row) for row in rows] for rows in transformed[ITEM_ID]]
