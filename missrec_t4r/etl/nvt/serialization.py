"""Save, load and extend fitted workflows without pickle: graph and operators in JSON, vocabularies in parquet.

NVTabular's own ``Workflow.save`` writes a pickle, which can run any code when it is loaded. Here the JSON names
operators of an allow-list (ours, and those of NVTabular whose state is plain data) with their settings and fitted
state; loading builds them again, with the schemas they were fitted with, after checking the SHA-256 of every file.

Fitting the workflows anew for appended items would take longer than encoding an increment. Nothing is learned from data
there but vocabularies, so `extend_workflows` takes the stored graph as it is, with other sizes of the columns' domains
and with vocabulary files that NVTabular itself writes. `tests/workflows/test_delta.py` compares them with fitted ones.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import merlin.dtypes as md
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from merlin.dag import Node, postorder_iter_nodes
from merlin.dag.ops.concat_columns import ConcatColumns
from merlin.dag.ops.selection import SelectionOp
from merlin.dag.ops.subset_columns import SubsetColumns
from merlin.dag.ops.subtraction import SubtractionOp
from merlin.dag.selector import ColumnSelector
from merlin.io.worker import clean_worker_cache
from merlin.schema import ColumnSchema, Schema, Tags
from nvtabular import Workflow, ops

from missrec_t4r.errors import DataError
from missrec_t4r.etl.nvt.event_ops import EventWeights, KCore, SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.etl.outputs import NVTABULAR_FOLDER, REQUEST_FOLDER, WORKFLOW_FOLDER, embedding_size
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.io.hashing import file_digest, json_digest
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import FIRST_ITEM_ROW

FORMAT = 1
GRAPH_FILE = "workflow.json"
ALLOWED: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(SelectionOp, ConcatColumns, SubsetColumns, SubtractionOp),
        *(SessionGroupby, SessionSlice, SessionGap, TimeFeatures, EventWeights, KCore),
        *(ops.Categorify, ops.Groupby, ops.ListSlice, ops.Rename, ops.FillMissing, ops.Clip, ops.LogOp, ops.HashBucket),
        *(ops.Normalize, ops.NormalizeMinMax, ops.Bucketize, ops.DifferenceLag, ops.ValueCount),
        *(ops.AddMetadata, ops.AddTags, ops.TagAsItemID, ops.TagAsUserID, ops.TagAsItemFeatures, ops.TagAsUserFeatures),
    )
}
"""Operators whose state is plain data. LambdaOp and Filter are excluded: they hold functions."""
_NOT_STORED = {"out_path", "vocabs", "categories", "selector", "_label"}
_CURE = "store it with --save-nvtabular-workflow (a pickle: load it only where you trust its source)"


def save_workflow(workflow: Workflow, folder: Path) -> None:
    """Write a fitted workflow: ``workflow.json`` and, for vocabularies, ``categories/*.parquet``.

    Raises
    ------
    DataError
        An operator is not on the allow-list, or its state is not plain data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nodes = list(postorder_iter_nodes(workflow.output_node))
    writer = _Writer(nodes, folder)
    described = [writer.describe(node) for node in nodes]
    write_graph({"format": FORMAT, "nodes": described, "files": writer.files}, folder)


def write_graph(graph: dict[str, Any], folder: Path) -> None:
    """Write the graph of a workflow with its checksum; its files must have been written before."""
    write_json(folder / GRAPH_FILE, graph | {"sha256": json_digest(graph)}, indent=1)


def load_workflow(folder: Path | str) -> Workflow:
    """Return the workflow of a folder, fitted and ready to transform.

    Raises
    ------
    DataError
        There is no stored workflow in the folder, a file was changed, or an operator is not on the allow-list.
    """
    folder = Path(folder)
    graph = read_graph(folder)
    nodes: list[Node] = []
    for described in graph["nodes"]:
        node, names = Node(), described["selector"]
        node.op = _operator(described, folder)
        node._selector = None if names is None else ColumnSelector(names)
        node.parents = [nodes[index] for index in described["parents"]]
        node.dependencies = [nodes[index] for index in described["dependencies"]]
        for parent in node.parents:
            parent.children.append(node)
        node.input_schema, node.output_schema = (_schema(described[name]) for name in ("input_schema", "output_schema"))
        if isinstance(node.op, SelectionOp):
            node.op.selector = node._selector
        nodes.append(node)
    return Workflow(nodes[-1])


def read_graph(folder: Path) -> dict[str, Any]:
    """Return the graph of a stored workflow, after checking its files.

    Raises
    ------
    DataError
        There is no stored workflow in the folder, or a file was changed.
    """
    try:
        graph = read_json(folder / GRAPH_FILE)
        checksum = graph.pop("sha256")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder / GRAPH_FILE} cannot be read ({error.__cause__ or error})",
            "a workflow written by missrec etl",
            "re-run missrec etl, with NVTabular installed",
        ) from error
    if graph.get("format") != FORMAT:
        raise DataError(f"workflow format {graph.get('format')!r}", f"format {FORMAT}", "re-run missrec etl")
    changed = [] if checksum == json_digest(graph) else [GRAPH_FILE]
    for name, digest in graph["files"].items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file() or file_digest(file) != digest:
            changed.append(name)
    if changed:
        raise DataError(
            f"{', '.join(changed)} in {folder} was changed or lost",
            "the files as they were written",
            "re-run missrec etl",
        )
    return graph


def check_operators(workflow: Workflow, cure: str) -> None:
    """Refuse a workflow with an operator that is not on the allow-list.

    Raises
    ------
    DataError
        Names the operator.
    """
    for node in postorder_iter_nodes(workflow.output_node):
        _check_operator(type(node.op), cure)


def _check_operator(kind: type, cure: str) -> None:
    if ALLOWED.get(kind.__name__) is not kind:
        name = "LambdaOp" if kind is ops.LambdaOp else kind.__name__  # NVTabular's LambdaOp is Merlin's class UDF
        raise DataError(f"the workflow has the operator {name}", f"one of {', '.join(sorted(ALLOWED))}", cure)


class _Writer:
    """Describes the nodes of a fitted workflow as plain data, and writes what is kept in files beside it.

    Parameters
    ----------
    nodes : sequence of Node
        All nodes; one is referred to by its place among them.
    folder : Path
        Of the workflow.
    """

    def __init__(self, nodes: Sequence[Node], folder: Path) -> None:
        self.folder = folder
        self.number = {node: index for index, node in enumerate(nodes)}
        self.files: dict[str, str] = {}
        """Files that were written -> their SHA-256."""

    def describe(self, node: Node) -> dict[str, Any]:
        """Return operator, state and edges of a node."""
        kind = type(node.op)
        _check_operator(kind, _CURE)
        if node.selector is not None and (node.selector.subgroups or node.selector.tags):
            raise DataError(f"{kind.__name__} selects by tags or groups", "a fitted workflow with plain columns", _CURE)
        state = {name: value for name, value in vars(node.op).items() if name not in _NOT_STORED}
        described = {
            "operator": kind.__name__,
            "state": {name: self._as_data(value, kind.__name__) for name, value in state.items()},
            "selector": list(node.selector.names) if node.selector is not None else None,
            "parents": [self.number[parent] for parent in node.parents],
            "dependencies": [self.number[dependency] for dependency in node.dependencies],
            "input_schema": _schema_data(node.input_schema),
            "output_schema": _schema_data(node.output_schema),
        }
        if isinstance(node.op, ops.Categorify):
            categories = node.op.categories.items()
            described["vocabularies"] = {column: self._copy_vocabulary(Path(file)) for column, file in categories}
        return described

    def _copy_vocabulary(self, file: Path) -> str:
        """Copy a vocabulary file and its metadata into the folder; return its relative name."""
        (self.folder / "categories").mkdir(exist_ok=True)
        for source in (file, meta_file(file)):
            copy = self.folder / "categories" / source.name
            if source.is_file():
                if not copy.exists() or not copy.samefile(source):
                    shutil.copyfile(source, copy)
                self.files[f"categories/{source.name}"] = file_digest(copy)
        return f"categories/{file.name}"

    def _as_data(self, value: Any, owner: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.integer | np.floating):
            return value.item()
        if isinstance(value, Tags):
            return {"tag": value.value}
        if value is list:
            return {"type": "list"}
        if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
            return {"dtype": np.dtype(value).name}
        if isinstance(value, pd.Series):
            name = f"{owner}.{len(self.files)}.parquet"
            pq.write_table(pa.table({"value": pa.Array.from_pandas(value)}), self.folder / name)
            self.files[name] = file_digest(self.folder / name)
            return {"series": name}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self._as_data(inner, owner) for inner in value]}
        if isinstance(value, dict):
            pairs = value.items()
            return {"dict": [[self._as_data(key, owner), self._as_data(inner, owner)] for key, inner in pairs]}
        raise DataError(
            f"{owner} holds a {type(value).__name__}, which is not plain data", "an operator without code", _CURE
        )


def meta_file(vocabulary: Path) -> Path:
    """Return the file with the metadata of a vocabulary file of NVTabular."""
    return vocabulary.with_name(vocabulary.name.replace("unique.", "meta.", 1))


def _operator(described: dict[str, Any], folder: Path) -> Any:
    kind = ALLOWED.get(described["operator"])
    if kind is None:
        raise DataError(
            f"the stored workflow names the operator {described['operator']!r}",
            f"one of {', '.join(sorted(ALLOWED))}",
            "load only workflows that missrec wrote",
        )
    operator: Any = object.__new__(kind)
    for name, value in described["state"].items():
        if name.startswith("__") or callable(getattr(kind, name, None)):
            raise DataError(
                f"the stored {kind.__name__} sets {name!r}", "settings only", "load only what missrec wrote"
            )
        operator.__dict__[name] = _from_data(value, folder)
    if isinstance(operator, SubsetColumns):
        operator._label = None
    if isinstance(operator, ops.Categorify):
        operator.out_path, operator.vocabs = str(folder), {}
        operator.categories = {column: str(folder / name) for column, name in described["vocabularies"].items()}
    return operator


def _from_data(value: Any, folder: Path) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    readers: dict[str, Callable[[], Any]] = {
        "tag": lambda: Tags(content),
        "type": lambda: list,
        "dtype": lambda: np.dtype(content).type,
        "series": lambda: pq.read_table(folder / Path(content).name)["value"].to_pandas(),
        "tuple": lambda: tuple(_from_data(inner, folder) for inner in content),
        "list": lambda: [_from_data(inner, folder) for inner in content],
        "dict": lambda: {_from_data(key, folder): _from_data(inner, folder) for key, inner in content},
    }
    return readers[kind]()


def _schema_data(schema: Schema | None) -> list[dict[str, Any]] | None:
    return None if schema is None else [_column_data(column) for column in schema]


def _column_data(column: ColumnSchema) -> dict[str, Any]:
    # cat_path is a path on the machine that fitted the workflow
    properties = {name: value for name, value in column.properties.items() if name != "cat_path"}
    return {
        "name": column.name,
        "dtype": column.dtype.name,
        "dims": None if column.shape.dims is None else [[dim.min, dim.max] for dim in column.shape.dims],
        "tags": sorted(tag.value if isinstance(tag, Tags) else str(tag) for tag in column.tags),
        "properties": properties,
    }


def _schema(columns: list[dict[str, Any]] | None) -> Schema | None:
    if columns is None:
        return None
    schemas = []
    for column in columns:
        dims = None if column["dims"] is None else tuple(tuple(dim) for dim in column["dims"])
        kind = md.dtype(column["dtype"]) if column["dtype"] != "unknown" else md.unknown
        schemas.append(ColumnSchema(column["name"], column["tags"], column["properties"], kind, dims=dims))
    return Schema(schemas)


# Longer vocabularies


def extend_workflows(old: Path, new: Path, vocabularies: Mapping[str, pd.Series]) -> None:
    """Write the workflows of a data folder with longer vocabularies.

    Parameters
    ----------
    old, new : Path
        Data folder before, and the one that is being written; vocabularies that stay the same are linked.
    vocabularies : mapping of str to Series
        Columns with new values, all their values in the order of their codes.
    """
    sizes = {name: FIRST_ITEM_ROW + len(values) for name, values in vocabularies.items()}
    with tempfile.TemporaryDirectory() as place:
        files = _written(vocabularies, Path(place)) if vocabularies else {}
        for name in (WORKFLOW_FOLDER, REQUEST_FOLDER):
            _extend_workflow(old / name, new / name, files, sizes)
    if (old / NVTABULAR_FOLDER).is_dir():
        load_workflow(new / WORKFLOW_FOLDER).save(str(new / NVTABULAR_FOLDER))


def _written(vocabularies: Mapping[str, pd.Series], folder: Path) -> dict[str, Path]:
    """Write vocabularies through NVTabular; return the files by their name in a stored workflow."""
    encoder = ops.Categorify(vocabs=dict(vocabularies), out_path=str(folder))
    clean_worker_cache()
    unique = [Path(file) for file in encoder.categories.values()]
    meta = [meta_file(file) for file in unique]
    return {f"categories/{file.name}": file for file in [*unique, *meta]}


def _extend_workflow(old: Path, new: Path, files: Mapping[str, Path], rows: Mapping[str, int]) -> None:
    """Write one stored workflow with new vocabulary files and the resulting domain sizes."""
    graph = read_graph(old)
    (new / "categories").mkdir(parents=True, exist_ok=True)
    for name in graph["files"]:
        if name in files:
            shutil.copyfile(files[name], new / name)
            graph["files"][name] = file_digest(new / name)
        else:
            link_or_copy(old / name, new / name)
    _resize(graph["nodes"], rows)
    write_graph(graph, new)


def _resize(content: Any, rows: Mapping[str, int]) -> None:
    """Set the sizes of the named domains in every column schema of the graph."""
    if isinstance(content, list):
        for inner in content:
            _resize(inner, rows)
    elif isinstance(content, dict):
        domain = content.get("domain")
        if isinstance(domain, dict) and domain.get("name") in rows:
            count = rows[domain["name"]]
            domain["max"] = count - 1
            content["embedding_sizes"] = {"cardinality": count, "dimension": embedding_size(count)}
        for inner in content.values():
            _resize(inner, rows)
