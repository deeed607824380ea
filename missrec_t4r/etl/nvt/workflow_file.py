"""``missrec etl --workflow FILE``: session features by a team's own NVTabular workflow.

FILE is a Python file that defines one function::

    def session_workflow(columns: EventColumns) -> nvtabular.Workflow

`columns` describes the cleaned events; the workflow is not fitted. Its input is one event per row (``user_id``,
``item_id``, ``timestamp``, ``columns.categories``, ``columns.numbers``), its output one session per row:

``user_id``         one value; with ``session_id`` beside it where a user has several sessions
``item_id-list``    items by ``Categorify(vocabs=columns.vocabularies)``, tagged ITEM_ID, the oldest event first
``<column>-list``   event features, as long as ``item_id-list``: model inputs if tagged CATEGORICAL or CONTINUOUS
``<column>-first``  the value of the session's first event. Other aggregations are refused: rows of training are
                    beginnings of sessions, and must not hold what happens afterwards
``timestamp-list``  needed by ``--split time``

``missrec etl`` runs FILE, which is code: pass only files that you trust. Before it transforms anything it checks that
every operator can be stored without pickle (`serialization.ALLOWED`) and that every event feature can be compiled for
serving (`request_transform.py`). ``workflows/session_features.py`` in the repository is a complete FILE to copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
from merlin.dag import Graph
from merlin.schema import Tags
from nvtabular import Workflow, ops

from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.dataframe import Frame
from missrec_t4r.etl.nvt.request_transform import (
    compile_event_features,
    longest_request,
    operators_of,
    request_vocabulary,
)
from missrec_t4r.etl.nvt.serialization import check_operators
from missrec_t4r.etl.nvt.workflows import fit_events
from missrec_t4r.schema import ITEM_ID, ITEM_LIST, LIST_SUFFIX, TIMESTAMP, USER_ID

FUNCTION = "session_workflow"
_EXAMPLE = "start from a copy of workflows/session_features.py"


@dataclass(frozen=True)
class EventColumns:
    """The cleaned events that a session workflow starts from.

    Parameters
    ----------
    vocabularies : mapping of str to Series
        For ``Categorify(vocabs=...)``: the raw values of ``item_id`` in the order of the catalogue and of every
        categorical event column in the order of their codes; the first value becomes code 3.
    numbers : sequence of str
        Event columns that hold numbers.
    newest : float
        Time of the newest event, unix seconds: what `TimeFeatures` counts ``recency`` from.
    storage : str
        Folder for the vocabulary files, for ``Categorify(out_path=...)``.
    """

    vocabularies: Mapping[str, pd.Series]
    numbers: Sequence[str]
    newest: float
    storage: str

    @property
    def categories(self) -> list[str]:
        """Return the categorical event columns."""
        return [name for name in self.vocabularies if name != ITEM_ID]


class WorkflowFile:
    """A file that defines a session workflow.

    Parameters
    ----------
    file : path
        Python file; it is executed.

    Raises
    ------
    ConfigError
        There is no such file, or it defines no function `session_workflow`.
    DataError
        Its code fails.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if not self.file.is_file() or self.file.suffix != ".py":
            raise ConfigError(f"--workflow {file}", f"a Python file that defines {FUNCTION}(columns)", _EXAMPLE)
        self.sha256 = hashlib.sha256(self.file.read_bytes()).hexdigest()
        self._module = _executed(self.file)
        if not callable(getattr(self._module, FUNCTION, None)):
            raise ConfigError(
                f"{self.file} defines no {FUNCTION}", f"def {FUNCTION}(columns) -> nvtabular.Workflow", _EXAMPLE
            )

    def build(self, columns: EventColumns) -> Workflow:
        """Return the file's workflow, not yet fitted.

        Raises
        ------
        DataError
            The function fails, returns something else, or uses an operator that cannot be stored without pickle.
        """
        try:
            workflow = getattr(self._module, FUNCTION)(columns)
        except Exception as error:  # whatever the team's code raises
            raise DataError(
                f"{FUNCTION} in {self.file} failed ({_described(error)})", "a workflow", _EXAMPLE
            ) from error
        if not isinstance(workflow, Workflow):
            raise DataError(f"{FUNCTION} in {self.file} returns {type(workflow).__name__}", "an nvtabular.Workflow")
        check_operators(workflow, "replace the operator, or compute its column before missrec etl")
        for node in Graph.get_nodes_by_op_type([workflow.output_node], ops.Categorify):
            if node.op.out_path == "./":  # NVTabular's default would leave a folder where the command is run
                node.op.out_path = columns.storage
        return workflow

    def fit(self, columns: EventColumns, events: Frame, partitions: int = 1) -> Workflow:
        """Return the file's workflow, fitted on all events: a frame, or a dask collection of frames.

        Raises
        ------
        DataError
            As `build`, or an operator fails on these events.
        """
        workflow = self.build(columns)
        try:
            return fit_events(workflow, events, partitions)
        except MemoryError:  # fewer events at a time may do
            raise
        except Exception as error:  # whatever an operator raises
            raise DataError(
                f"the workflow of {self.file} cannot be fitted ({_described(error)})",
                "operators that fit the columns of the events",
                f"the columns are {sorted([*events.columns])}",
            ) from error


def check_fitted(workflow: Workflow, items: pa.Array, split: str) -> tuple[dict[str, Any], int | None]:
    """Check what a fitted workflow makes, and compile its request transform.

    Parameters
    ----------
    items : pyarrow.Array
        Raw item ids in the order of the catalogue.
    split : {"leave_one_out", "time"}
        The time split needs ``timestamp-list``.

    Returns
    -------
    features : dict
        As `compile_event_features`.
    longest : int or None
        As `longest_request`.

    Raises
    ------
    SchemaError
        A column is missing, wrongly tagged, or a value that looks ahead in the session.
    DataError
        Items have other rows than in the catalogue, or an operator cannot be compiled for serving; it is named.
    """
    schema = workflow.output_schema
    needed = [USER_ID, ITEM_LIST, *([TIMESTAMP + LIST_SUFFIX] if split == "time" else [])]
    if missing := [name for name in needed if name not in schema.column_names]:
        raise SchemaError(f"the workflow makes {schema.column_names}", f"columns {missing} too", _EXAMPLE)
    if schema.select_by_tag(Tags.ITEM_ID).column_names != [ITEM_LIST]:
        raise SchemaError(
            f"columns tagged ITEM_ID: {schema.select_by_tag(Tags.ITEM_ID).column_names}",
            f"{ITEM_LIST} alone",
            f"add AddMetadata(tags=[Tags.ITEM_ID, ...]) to {ITEM_LIST}",
        )
    for name in schema.column_names:
        _check_aggregation(workflow, name)
    encoders = [operator for operator, _ in operators_of(workflow, ITEM_LIST) if isinstance(operator, ops.Categorify)]
    if len(encoders) != 1 or encoders[0].num_buckets or not request_vocabulary(workflow).equals(items):
        raise DataError(
            f"the workflow gives the items of {ITEM_LIST} other rows than the catalogue",
            "the rows of the catalogue, from 3 on",
            "encode item_id by Categorify(vocabs=columns.vocabularies)",
        )
    return compile_event_features(workflow), longest_request(workflow)


def refuse_uneven_lists(columns: Sequence[str]) -> None:
    """Refuse list columns whose lists are not as long as the items.

    Raises
    ------
    SchemaError
        There are some.
    """
    if columns:
        raise SchemaError(
            f"columns {columns} have lists of other lengths than {ITEM_LIST}",
            "one value per event",
            "slice all lists alike",
        )


def _check_aggregation(workflow: Workflow, name: str) -> None:
    """Refuse a value that is taken over a whole session: training rows would contain later events."""
    for operator, source in operators_of(workflow, name):
        if isinstance(operator, ops.Groupby) and source not in operator.groupby_cols:
            aggregation = name.removeprefix(source + operator.name_sep)
            if aggregation not in ("list", "first"):
                raise SchemaError(
                    f"the column {name!r} is the {aggregation} of {source!r} over a whole session",
                    "lists, or the value of the first event: training rows are beginnings of sessions and must not "
                    "hold what comes after them",
                    "aggregate the written splits instead, or leave the column out",
                )
            if aggregation == "list" and not name.endswith(LIST_SUFFIX):
                raise SchemaError(f"the list column {name!r}", f"a name that ends in {LIST_SUFFIX}", "name_sep='-'")
        name = source


def _executed(file: Path) -> ModuleType:
    """Return the module of a file without leaving it where `import` would find it."""
    name = f"missrec_workflow_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and dask look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the team's code raises
        raise DataError(f"{file} cannot be run ({_described(error)})", "a Python file without errors") from error
    return module


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
