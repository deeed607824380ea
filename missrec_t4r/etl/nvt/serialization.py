"""Save and load fitted workflows without pickle: the graph and its operators in JSON, vocabularies in parquet.

NVTabular's own ``Workflow.save`` writes a pickle, which can run any code when it is loaded. Here the JSON names
operators of an allow-list (ours, and those of NVTabular whose state is plain data) with their settings and fitted
state; loading builds them again, with the schemas they were fitted with, after checking the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import merlin.dtypes as md
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from merlin.dag import Node
from merlin.dag.ops.concat_columns import ConcatColumns
from merlin.dag.ops.selection import SelectionOp
from merlin.dag.ops.subset_columns import SubsetColumns
from merlin.dag.ops.subtraction import SubtractionOp
from merlin.dag.selector import ColumnSelector
from merlin.schema import ColumnSchema, Schema, Tags
from nvtabular import Workflow, ops

from missrec_t4r.errors import DataError
from missrec_t4r.etl.nvt.event_ops import EventWeights, KCore, SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.io.hashing import file_digest

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
    nodes = list(_ordered(workflow.output_node))
    number = {id(node): index for index, node in enumerate(nodes)}
    files: dict[str, str] = {}
    described = [_describe(node, number, folder, files) for node in nodes]
    graph = {"format": FORMAT, "nodes": described, "files": files}
    write_graph(graph, folder)


def write_graph(graph: dict[str, Any], folder: Path) -> None:
    """Write the graph of a workflow with its checksum; its files must have been written before."""
    nodes = ",\n  ".join(json.dumps(node) for node in graph["nodes"])
    rest = {name: value for name, value in graph.items() if name != "nodes"} | {"sha256": _checksum(graph)}
    entries = "".join(f',\n "{name}": {json.dumps(value)}' for name, value in rest.items())
    (folder / GRAPH_FILE).write_text(f'{{"nodes": [\n  {nodes}\n ]{entries}\n}}\n', encoding="utf-8")


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
        node = Node()
        node.op = _operator(described, folder)
        node._selector = ColumnSelector(described["selector"]) if described["selector"] is not None else None
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
        graph: dict[str, Any] = json.loads((folder / GRAPH_FILE).read_text(encoding="utf-8"))
        checksum = graph.pop("sha256")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder / GRAPH_FILE} cannot be read ({error})",
            "a workflow written by missrec etl",
            "re-run missrec etl, with NVTabular installed",
        ) from error
    if graph.get("format") != FORMAT:
        raise DataError(f"workflow format {graph.get('format')!r}", f"format {FORMAT}", "re-run missrec etl")
    changed = [] if checksum == _checksum(graph) else [GRAPH_FILE]
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


def _ordered(output: Node) -> Iterator[Node]:
    """Yield every node once, after its parents and dependencies."""
    visited: set[int] = set()

    def visit(node: Node) -> Iterator[Node]:
        if id(node) in visited:
            return
        visited.add(id(node))
        for parent in node.parents_with_dependencies:
            yield from visit(parent)
        yield node

    yield from visit(output)


def check_operators(workflow: Workflow, cure: str = _CURE) -> None:
    """Refuse a workflow with an operator that is not on the allow-list.

    Raises
    ------
    DataError
        Names the operator.
    """
    for node in _ordered(workflow.output_node):
        _check_operator(type(node.op), cure)


def _check_operator(kind: type, cure: str) -> None:
    if ALLOWED.get(kind.__name__) is not kind:
        name = "LambdaOp" if kind is ops.LambdaOp else kind.__name__  # NVTabular's LambdaOp is Merlin's class UDF
        raise DataError(f"the workflow has the operator {name}", f"one of {', '.join(sorted(ALLOWED))}", cure)


def _describe(node: Node, number: dict[int, int], folder: Path, files: dict[str, str]) -> dict[str, Any]:
    kind = type(node.op)
    _check_operator(kind, _CURE)
    if node.selector is not None and (node.selector.subgroups or node.selector.tags):
        raise DataError(f"{kind.__name__} selects by tags or groups", "a fitted workflow with plain columns", _CURE)
    state = {
        name: _as_data(value, kind.__name__, folder, files)
        for name, value in vars(node.op).items()
        if name not in _NOT_STORED
    }
    described = {
        "operator": kind.__name__,
        "state": state,
        "selector": list(node.selector.names) if node.selector is not None else None,
        "parents": [number[id(parent)] for parent in node.parents],
        "dependencies": [number[id(dependency)] for dependency in node.dependencies],
        "input_schema": _schema_data(node.input_schema),
        "output_schema": _schema_data(node.output_schema),
    }
    if isinstance(node.op, ops.Categorify):
        described["vocabularies"] = {
            column: _copy_vocabulary(Path(file), folder, files) for column, file in node.op.categories.items()
        }
    return described


def _copy_vocabulary(file: Path, folder: Path, files: dict[str, str]) -> str:
    """Copy a vocabulary file and its metadata into the folder; return its relative name."""
    (folder / "categories").mkdir(exist_ok=True)
    meta = file.with_name(file.name.replace("unique.", "meta.", 1))
    for source in (file, meta):
        copy = folder / "categories" / source.name
        if source.is_file():
            if not copy.exists() or not copy.samefile(source):
                shutil.copyfile(source, copy)
            files[f"categories/{source.name}"] = file_digest(copy)
    return f"categories/{file.name}"


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


def _as_data(value: Any, owner: str, folder: Path, files: dict[str, str]) -> Any:
    def convert(inner: Any) -> Any:
        return _as_data(inner, owner, folder, files)

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
        name = f"{owner}.{len(files)}.parquet"
        pq.write_table(pa.table({"value": pa.Array.from_pandas(value)}), folder / name)
        files[name] = file_digest(folder / name)
        return {"series": name}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [convert(inner) for inner in value]}
    if isinstance(value, dict):
        return {"dict": [[convert(key), convert(inner)] for key, inner in value.items()]}
    raise DataError(
        f"{owner} holds a {type(value).__name__}, which is not plain data", "an operator without code", _CURE
    )


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
    kept = {
        name: value for name, value in column.properties.items() if name != "cat_path"
    }  # a path on the machine that fitted it
    return {
        "name": column.name,
        "dtype": column.dtype.name,
        "dims": None if column.shape.dims is None else [[dim.min, dim.max] for dim in column.shape.dims],
        "tags": sorted(tag.value if isinstance(tag, Tags) else str(tag) for tag in column.tags),
        "properties": kept,
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


def _checksum(graph: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()
