"""Files of a data folder beside the sessions: catalogue, fitted workflows, request transform, counts of the report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from merlin.io.worker import clean_worker_cache
from nvtabular import Workflow

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.etl import item_table
from missrec_t4r.etl.nvt import workflows as nvt_workflows
from missrec_t4r.etl.nvt.request_transform import compile_session_transform, request_vocabulary
from missrec_t4r.etl.nvt.serialization import save_workflow
from missrec_t4r.io.json_files import write_json
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, SCHEMA_FILE, SESSION_TRANSFORM_FILE, SPLITS

REPORT_FILE = "etl.json"
"""Marker file of a data folder."""
WORKFLOW_FOLDER = "workflow"
REQUEST_FOLDER = "request_workflow"
NVTABULAR_FOLDER = "nvtabular_workflow"


def write_workflow(workflow: Workflow, longest: int, folder: Path, *, pickled: bool = False) -> None:
    """Write the fitted session workflow, and ``schema.pbtxt`` for the folder and every split.

    Parameters
    ----------
    workflow : nvtabular.Workflow
        Fitted.
    longest : int
        Events of the longest session, for the schema.
    folder : Path
        Data folder.
    pickled : bool
        Also write NVTabular's own format.
    """
    schema = nvt_workflows.session_schema(workflow.output_schema, longest)
    folder.mkdir(exist_ok=True)
    nvt_workflows.write_schema(schema, folder)
    for name in SPLITS:
        (folder / name).mkdir(exist_ok=True)
        shutil.copyfile(folder / SCHEMA_FILE, folder / name / SCHEMA_FILE)
    save_workflow(workflow, folder / WORKFLOW_FOLDER)
    if pickled:
        workflow.save(str(folder / NVTABULAR_FOLDER))
    clean_worker_cache()  # NVTabular caches vocabularies by path, and this path may be written again


def write_catalogue(catalogue: Catalogue, train_counts: Ints, folder: Path) -> None:
    """Write the catalogue with its popularity: events of the training split, [item index], reserved rows included."""
    item_table.with_train_count(catalogue, train_counts[FIRST_ITEM_ROW:]).save(folder / CATALOGUE_FOLDER)


def write_request(
    item_ids: pa.Array, folder: Path, storage: Path, max_sequence_length: int, features: Mapping[str, Any]
) -> None:
    """Write the request workflow, and ``session_transform.json``, which serving runs without NVTabular.

    Parameters
    ----------
    item_ids : array [item]
        Raw ids in catalogue order.
    folder, storage : Path
        Data folder, and a temporary folder for vocabulary files.
    max_sequence_length : int
        Number of last items of a request that the model reads.
    features : mapping
        From `feature_codes`.

    Raises
    ------
    DataError
        NVTabular numbers the items differently from the catalogue.
    """
    request = nvt_workflows.build_request_workflow(
        item_ids, storage / "request", max_sequence_length=max_sequence_length
    )
    nvt_workflows.fit(request, pd.DataFrame({ITEM_ID: [item_ids[:2].to_pylist(), item_ids[:1].to_pylist()]}))
    save_workflow(request, folder / REQUEST_FOLDER)
    transform = compile_session_transform(request) | {"features": dict(features)}
    if not request_vocabulary(request).equals(item_ids):
        raise DataError(
            "NVTabular encodes the items in another order than the catalogue", "the order of the item table"
        )
    write_json(folder / SESSION_TRANSFORM_FILE, transform)
    clean_worker_cache()


def feature_codes(features: Sequence[str], categories: Mapping[str, pd.Series]) -> dict[str, Any]:
    """Return how event features of a request are encoded: the raw values of codes 3, 4, …; numbers are unchanged."""
    numbers = {name: {"kind": "continuous"} for name in features if name not in categories}
    return numbers | {name: {"kind": "categorical", "values": v.tolist()} for name, v in categories.items()}


def data_counts(
    catalogue: Catalogue, train_counts: Ints, events: int, users: int, rows: Mapping[str, int]
) -> dict[str, Any]:
    """Return the counts of ``etl.json``.

    Parameters
    ----------
    catalogue : Catalogue
        Of the data folder.
    train_counts : ndarray [item index]
        As in `write_catalogue`.
    events, users : int
        After cleaning and filtering.
    rows : mapping of str to int
        Rows per split.
    """
    return {
        "events": events,
        "users": users,
        "items": catalogue.n_items,
        "cold_items": int((train_counts[FIRST_ITEM_ROW:] == 0).sum()),
        "sessions": dict(rows),
        "modalities": {name: int(modality.present.sum()) for name, modality in catalogue.modalities.items()},
    }
