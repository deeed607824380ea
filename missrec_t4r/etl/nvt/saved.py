"""The fitted NVTabular workflows of a data folder: with sessions, and of requests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from merlin.io.worker import clean_worker_cache
from nvtabular import Workflow

from missrec_t4r.errors import DataError
from missrec_t4r.etl.nvt import workflows as nvt_workflows
from missrec_t4r.etl.nvt.request_transform import compile_session_transform, request_vocabulary
from missrec_t4r.etl.nvt.serialization import save_workflow
from missrec_t4r.etl.outputs import NVTABULAR_FOLDER, REQUEST_FOLDER, WORKFLOW_FOLDER
from missrec_t4r.schema import ITEM_ID, SCHEMA_FILE, SPLITS


def write_schema(workflow: Workflow, longest: int, folder: Path) -> None:
    """Write ``schema.pbtxt`` of a fitted session workflow, for the data folder and every split.

    Parameters
    ----------
    workflow : nvtabular.Workflow
        Fitted.
    longest : int
        Events of the longest session.
    folder : Path
        Data folder.
    """
    folder.mkdir(exist_ok=True)
    nvt_workflows.write_schema(nvt_workflows.session_schema(workflow.output_schema, longest), folder)
    for name in SPLITS:
        (folder / name).mkdir(exist_ok=True)
        shutil.copyfile(folder / SCHEMA_FILE, folder / name / SCHEMA_FILE)


def write_workflow(workflow: Workflow, folder: Path, *, pickled: bool = False) -> None:
    """Write the fitted session workflow; ``pickled``: in NVTabular's own format too."""
    save_workflow(workflow, folder / WORKFLOW_FOLDER)
    if pickled:
        workflow.save(str(folder / NVTABULAR_FOLDER))
    clean_worker_cache()  # NVTabular caches vocabularies by path, and this path may be written again


def write_request(
    item_ids: pa.Array, folder: Path, storage: Path, max_sequence_length: int, features: Mapping[str, Any]
) -> dict[str, Any]:
    """Fit and write the request workflow; return what it does as plain data, as `outputs.request_transform`.

    Parameters
    ----------
    item_ids : array [item]
        Raw ids in catalogue order.
    folder, storage : Path
        Data folder, and a temporary folder for vocabulary files.
    max_sequence_length : int
        Number of last items of a request that the model reads.
    features : mapping
        From `outputs.feature_codes`.

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
    clean_worker_cache()
    return transform
