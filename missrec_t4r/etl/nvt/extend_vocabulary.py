"""Extend the vocabularies of fitted workflows: new values are appended, all else stays the same.

Fitting the workflows anew for appended items would take longer than encoding an increment. Nothing is learned
from data here but vocabularies, so the stored graph is taken as it is, with other sizes of the columns' domains and
with vocabulary files that NVTabular itself writes. `tests/workflows/test_delta.py` compares them with fitted ones.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from merlin.io.worker import clean_worker_cache
from nvtabular import ops
from nvtabular.ops.categorify import _emb_sz_rule

from missrec_t4r.etl.nvt import serialization as storage
from missrec_t4r.etl.nvt import workflows as sessions
from missrec_t4r.etl.outputs import NVTABULAR_FOLDER, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, SCHEMA_FILE, SESSION_TRANSFORM_FILE, SPLITS

_SIZES = ("cardinality", "dimension")
_SECOND_DIMENSION = r"(number_value: )[\d.]+((?:\s*\}){6}\s*fields \{\s*key: \"dtype_item_size\")"


def extend_vocabularies(old: Path, new: Path, vocabularies: Mapping[str, pd.Series], longest: int) -> None:
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
    sizes = {name: FIRST_ITEM_ROW + len(values) for name, values in vocabularies.items()}
    with tempfile.TemporaryDirectory() as place:
        files = _written(vocabularies, Path(place)) if vocabularies else {}
        for name in (WORKFLOW_FOLDER, REQUEST_FOLDER):
            _extend_workflow(old / name, new / name, files, sizes)
    text = resized_schema((old / SCHEMA_FILE).read_text(encoding="utf-8"), sizes, longest)
    if text is None:
        sessions.write_schema(sessions.session_schema(storage.output_schema(new / WORKFLOW_FOLDER), longest), new)
    else:
        (new / SCHEMA_FILE).write_text(text, encoding="utf-8")
    for split in SPLITS:
        (new / split).mkdir(exist_ok=True)
        shutil.copyfile(new / SCHEMA_FILE, new / split / SCHEMA_FILE)
    transform = read_json(old / SESSION_TRANSFORM_FILE)
    for name, values in vocabularies.items():
        if name == ITEM_ID:
            transform["item_id"]["items"] = len(values)
        else:
            transform["features"][name]["values"] = values.tolist()
    if (old / NVTABULAR_FOLDER).is_dir():
        storage.load_workflow(new / WORKFLOW_FOLDER).save(str(new / NVTABULAR_FOLDER))
    write_json(new / SESSION_TRANSFORM_FILE, transform)


def _written(vocabularies: Mapping[str, pd.Series], folder: Path) -> dict[str, Path]:
    """Write vocabularies through NVTabular; return the files by their name in a stored workflow."""
    encoder = ops.Categorify(vocabs=dict(vocabularies), out_path=str(folder))
    clean_worker_cache()
    found = [Path(file) for file in encoder.categories.values()]
    found += [file.with_name(file.name.replace("unique.", "meta.", 1)) for file in found]
    return {f"categories/{file.name}": file for file in found}


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
            content["embedding_sizes"] = dict(zip(_SIZES, _emb_sz_rule(count), strict=True))
        for inner in content.values():
            _resize(inner, rows)


def resized_schema(text: str, rows: Mapping[str, int], longest: int) -> str | None:
    """Return schema.pbtxt with new sizes, or None if its layout is not the expected one.

    Edits the text: importing Merlin's reader and writer of this format takes longer than a whole increment.

    Parameters
    ----------
    rows : mapping of str to int
        Domain -> number of its codes; longest : int
        Events of the longest session.
    """
    features = text.split("\nfeature {")
    for index, feature in enumerate(features):
        changes: list[tuple[str, Any]] = []
        if "\n  value_count {" in feature:
            changes += [(r"(\n  value_count \{\n    max: )\d+()", longest), (_SECOND_DIMENSION, float(longest))]
        found = re.search(r'\n  int_domain \{\n    name: "(.*)"\n', feature)
        if found and found[1] in rows:
            changes.append((r"(\n  int_domain \{\n    name: .*\n    max: )\d+()", rows[found[1]] - 1))
            numbers = zip(_SIZES, _emb_sz_rule(rows[found[1]]), strict=True)
            changes += [(rf'(key: "{name}"\s+value \{{\s+number_value: )[\d.]+()', float(n)) for name, n in numbers]
        for pattern, number in changes:
            feature, count = re.subn(pattern, rf"\g<1>{number}\g<2>", feature)
            if count != 1:
                return None
        features[index] = feature
    return "\nfeature {".join(features)
