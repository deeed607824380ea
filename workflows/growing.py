"""Fitted workflows whose vocabularies got longer: the new values stand after the old ones, nothing else changes

An update that appends items could fit the workflows anew, which takes longer than its events do. Nothing is learned
from data here but vocabularies, so the stored graph is taken as it is, with other sizes of the columns' domains and
with vocabulary files that NVTabular itself writes. `tests/workflows/test_delta.py` holds it to the fitted ones.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from merlin.io.worker import clean_worker_cache
from nvtabular import ops
from nvtabular.ops.categorify import _emb_sz_rule

from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, SCHEMA_FILE, SESSION_TRANSFORM_FILE, SPLITS
from missrec_t4r.workflows import sessions, storage
from missrec_t4r.workflows.outputs import NVTABULAR_FOLDER, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.workflows.places import link


def grow(old: Path, new: Path, vocabularies: Mapping[str, pd.Series], longest: int) -> None:
    """Write the workflows, schemas and request transform of a data folder with longer vocabularies.

    Parameters
    ----------
    old, new : Path
        Data folder before, and the one that is being written; vocabularies that stay the same are linked.
    vocabularies : mapping of str to Series
        Columns with new values, all their values in the order of their codes.
    longest : int
        Events of the longest session.
    """
    with tempfile.TemporaryDirectory() as place:
        files = _written(vocabularies, Path(place)) if vocabularies else {}
        for name in (WORKFLOW_FOLDER, REQUEST_FOLDER):
            _grow_workflow(old / name, new / name, files, {name: len(v) for name, v in vocabularies.items()})
    schema = sessions.session_schema(storage.output_schema(new / WORKFLOW_FOLDER), longest)
    sessions.write_schema(schema, new)
    for split in SPLITS:
        (new / split).mkdir(exist_ok=True)
        shutil.copyfile(new / SCHEMA_FILE, new / split / SCHEMA_FILE)
    transform = json.loads((old / SESSION_TRANSFORM_FILE).read_text(encoding="utf-8"))
    for name, values in vocabularies.items():
        if name == ITEM_ID:
            transform["item_id"]["items"] = len(values)
        else:
            transform["features"][name]["values"] = values.tolist()
    if (old / NVTABULAR_FOLDER).is_dir():
        storage.load_workflow(new / WORKFLOW_FOLDER).save(str(new / NVTABULAR_FOLDER))
    (new / SESSION_TRANSFORM_FILE).write_text(json.dumps(transform, indent=2) + "\n", encoding="utf-8")


def _written(vocabularies: Mapping[str, pd.Series], folder: Path) -> dict[str, Path]:
    """Let NVTabular write vocabularies; return its files by their name in a stored workflow."""
    encoder = ops.Categorify(vocabs=dict(vocabularies), out_path=str(folder))
    clean_worker_cache()
    found = [Path(file) for file in encoder.categories.values()]
    found += [file.with_name(file.name.replace("unique.", "meta.", 1)) for file in found]
    return {f"categories/{file.name}": file for file in found}


def _grow_workflow(old: Path, new: Path, files: Mapping[str, Path], sizes: Mapping[str, int]) -> None:
    """Write one stored workflow with other vocabulary files and the sizes that follow from them."""
    graph = storage.read_graph(old)
    (new / "categories").mkdir(parents=True, exist_ok=True)
    for name in graph["files"]:
        if name in files:
            shutil.copyfile(files[name], new / name)
            graph["files"][name] = storage.digest_of(new / name)
        else:
            link(old / name, new / name)
    _resize(graph["nodes"], {name: FIRST_ITEM_ROW + size for name, size in sizes.items()})
    storage.write_graph(graph, new)


def _resize(content: Any, rows: Mapping[str, int]) -> None:
    """Set the sizes of the domains that are named, wherever a column of them is described."""
    if isinstance(content, list):
        for inner in content:
            _resize(inner, rows)
    elif isinstance(content, dict):
        domain = content.get("domain")
        if isinstance(domain, dict) and domain.get("name") in rows:
            count = rows[domain["name"]]
            domain["max"] = count - 1
            content["embedding_sizes"] = dict(zip(("cardinality", "dimension"), _emb_sz_rule(count), strict=True))
        for inner in content.values():
            _resize(inner, rows)
