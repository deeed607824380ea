"""Extend the vocabularies of fitted workflows: new values are appended, all else stays the same.

Fitting the workflows anew for appended items would take longer than encoding an increment. Nothing is learned
from data here but vocabularies, so the stored graph is taken as it is, with other sizes of the columns' domains and
with vocabulary files that NVTabular itself writes. `tests/workflows/test_delta.py` compares them with fitted ones.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from merlin.io.worker import clean_worker_cache
from nvtabular import ops

from missrec_t4r.etl.nvt import serialization as storage
from missrec_t4r.etl.outputs import NVTABULAR_FOLDER, REQUEST_FOLDER, WORKFLOW_FOLDER, embedding_size
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.schema import FIRST_ITEM_ROW


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
        storage.load_workflow(new / WORKFLOW_FOLDER).save(str(new / NVTABULAR_FOLDER))


def _written(vocabularies: Mapping[str, pd.Series], folder: Path) -> dict[str, Path]:
    """Write vocabularies through NVTabular; return the files by their name in a stored workflow."""
    encoder = ops.Categorify(vocabs=dict(vocabularies), out_path=str(folder))
    clean_worker_cache()
    unique = [Path(file) for file in encoder.categories.values()]
    meta = [storage.meta_file(file) for file in unique]
    return {f"categories/{file.name}": file for file in [*unique, *meta]}


def _extend_workflow(old: Path, new: Path, files: Mapping[str, Path], rows: Mapping[str, int]) -> None:
    """Write one stored workflow with new vocabulary files and the resulting domain sizes."""
    graph = storage.read_graph(old)
    (new / "categories").mkdir(parents=True, exist_ok=True)
    for name in graph["files"]:
        if name in files:
            shutil.copyfile(files[name], new / name)
            graph["files"][name] = file_digest(new / name)
        else:
            link_or_copy(old / name, new / name)
    _resize(graph["nodes"], rows)
    storage.write_graph(graph, new)


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
