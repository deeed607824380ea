"""What a data folder holds beside the sessions: catalogue, fitted workflows, the transform of requests, the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from merlin.io.worker import clean_worker_cache
from nvtabular import Workflow

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.etl import item_table as catalogues
from missrec_t4r.etl.nvt import workflows as sessions
from missrec_t4r.etl.nvt.request_transform import compile_session_transform, request_vocabulary
from missrec_t4r.etl.nvt.serialization import save_workflow
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, SCHEMA_FILE, SESSION_TRANSFORM_FILE, SPLITS

REPORT_FILE = "etl.json"
WORKFLOW_FOLDER = "workflow"
REQUEST_FOLDER = "request_workflow"
NVTABULAR_FOLDER = "nvtabular_workflow"


def write_workflow(workflow: Workflow, longest: int, folder: Path, *, pickled: bool = False) -> None:
    """Write schema.pbtxt beside every split, and the fitted workflow; ``pickled`` adds NVTabular's own format."""
    schema = sessions.session_schema(workflow.output_schema, longest)
    folder.mkdir(exist_ok=True)
    sessions.write_schema(schema, folder)
    for name in SPLITS:
        (folder / name).mkdir(exist_ok=True)
        shutil.copyfile(folder / SCHEMA_FILE, folder / name / SCHEMA_FILE)
    save_workflow(workflow, folder / WORKFLOW_FOLDER)
    if pickled:
        workflow.save(str(folder / NVTABULAR_FOLDER))
    clean_worker_cache()  # NVTabular caches vocabularies by path, and this path may be written again


def write_catalogue(catalogue: Catalogue, counts: np.ndarray[Any, Any], folder: Path) -> None:
    """Write the catalogue with its popularity: events of the training split per row, reserved rows included."""
    catalogues.with_train_count(catalogue, counts[FIRST_ITEM_ROW:]).save(folder / CATALOGUE_FOLDER)


def write_request(
    item_ids: pa.Array, folder: Path, storage: Path, max_sequence_length: int, features: Mapping[str, Any]
) -> None:
    """Write the workflow of a request, and what serving compiles of it.

    Raises
    ------
    DataError
        NVTabular gives the items other rows than the catalogue.
    """
    request = sessions.build_request_workflow(item_ids, storage / "request", max_sequence_length=max_sequence_length)
    sessions.fit(request, pd.DataFrame({ITEM_ID: [item_ids[:2].to_pylist(), item_ids[:1].to_pylist()]}))
    save_workflow(request, folder / REQUEST_FOLDER)
    transform = compile_session_transform(request) | {"features": dict(features)}
    if not request_vocabulary(request).equals(item_ids):
        raise DataError(
            "NVTabular encodes the items in another order than the catalogue", "the order of the item table"
        )
    (folder / SESSION_TRANSFORM_FILE).write_text(json.dumps(transform, indent=2) + "\n", encoding="utf-8")
    clean_worker_cache()


def feature_codes(features: Sequence[str], categories: Mapping[str, pd.Series]) -> dict[str, Any]:
    """Return how a request's side features are encoded: the values of the codes from 3 on, numbers as they are."""
    numbers = {name: {"kind": "continuous"} for name in features if name not in categories}
    return numbers | {name: {"kind": "categorical", "values": v.tolist()} for name, v in categories.items()}


def counted(
    catalogue: Catalogue, train_count: np.ndarray[Any, Any], events: int, users: int, rows: Mapping[str, int]
) -> dict[str, Any]:
    """Return the counts of a report; ``train_count`` as in `write_catalogue`."""
    return {
        "events": events,
        "users": users,
        "items": catalogue.n_items,
        "cold_items": int((train_count[FIRST_ITEM_ROW:] == 0).sum()),
        "sessions": dict(rows),
        "modalities": {name: int(modality.present.sum()) for name, modality in catalogue.modalities.items()},
    }
