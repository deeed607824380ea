"""`missrec bundle merlin`: a classic Merlin Systems ensemble, TransformWorkflow >> PredictMISSRec.

Bundle and ranker are those of the native ensemble, so the top-k is equal; raw ids are encoded by NVTabular itself.
Graph and workflow are pickles, as Merlin Systems writes them (docs/security.md); the model stays a bundle. Integer ids
only: Merlin Systems' tables cannot hold strings. The native ensemble is several times faster.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from merlin.dag import BaseOperator
from merlin.schema import ColumnSchema, Schema
from merlin.systems.dag import Ensemble
from merlin.systems.dag.ops.workflow import TransformWorkflow
from merlin.table import TensorTable

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.errors import BundleError, ConfigError
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.schema import ITEM_ID, PADDING_ROW

EXECUTOR = "executor_model"
"""Model that clients call; Merlin Systems defines the name."""
_ARTEFACT = "missrec_bundle"


class PredictMISSRec(BaseOperator):  # type: ignore[misc]  # Merlin ships no types
    """Operator from rows of sessions to recommended items, in the executor's process.

    Parameters
    ----------
    bundle : path
        Copied beside the graph.
    top_k : int
        Items per session; fixed, since the classic ensemble has no such input.
    """

    def __init__(self, bundle: str | Path, top_k: int = 10) -> None:
        super().__init__()
        self.bundle, self.top_k = str(bundle), top_k
        self.ranker: Any = None
        self.id_encoder: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model, which stays out of the graph's pickle."""
        return {**self.__dict__, "ranker": None, "id_encoder": None, "bundle": ""}

    def save_artifacts(self, artifact_path: str | None = None) -> None:
        """Copy the bundle beside the graph."""
        target = Path(str(artifact_path)) / _ARTEFACT
        target.mkdir(parents=True)
        for name in (MANIFEST_FILE, *verify_bundle(self.bundle, only=())["files"]):
            shutil.copyfile(Path(self.bundle) / name, target / name)

    def load_artifacts(self, artifact_path: str | None = None) -> None:
        """Verify and load the bundle."""
        if not artifact_path:  # the graph's constructor calls it once without a path
            return
        from missrec_t4r.retrieval.ranker import Ranker

        loaded = load_bundle(Path(artifact_path) / _ARTEFACT)
        self.ranker = Ranker(loaded.model, loaded.catalogue, tables=loaded.tables)
        self.id_encoder = loaded.transform

    def compute_input_schema(self, root: Schema, parents: Schema, deps: Schema, selector: Any) -> Schema:
        """Return the workflow's output schema."""
        return parents

    def compute_output_schema(self, *_: Any, **__: Any) -> Schema:
        """Return item ids and scores, best first."""
        dtypes = {ITEM_ID: np.int64, "score": np.float32}
        return Schema([ColumnSchema(name, dtype=dtype, dims=(None, self.top_k)) for name, dtype in dtypes.items()])

    def transform(self, col_selector: Any, transformable: Any) -> TensorTable:  # Merlin's contract
        """Return ids and scores [batch, top_k]; fewer items are padded with the missing id and the score 0."""
        table = transformable if isinstance(transformable, TensorTable) else TensorTable.from_df(transformable)
        arrays = table.to_dict()
        values, offsets = np.asarray(arrays[f"{ITEM_ID}__values"]), np.asarray(arrays[f"{ITEM_ID}__offsets"])
        lengths = np.diff(offsets)
        rows = np.full((len(lengths), max(int(lengths.max(initial=0)), 1)), PADDING_ROW, np.int64)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = values  # ragged to [batch, seq]
        ranking = self.ranker.rank(rows, top_k=self.top_k)
        best = np.zeros((len(rows), self.top_k), np.int64)  # [batch, top_k]
        scores = np.zeros(best.shape, np.float32)
        best[:, : ranking.rows.shape[1]], scores[:, : ranking.rows.shape[1]] = ranking.rows, ranking.scores
        return TensorTable({ITEM_ID: self.id_encoder.wire_ids_of(best), "score": scores})


def export_merlin(bundle: str | Path, workflow: Any, out: str | Path, *, top_k: int = 10) -> dict[str, Any]:
    """Write a classic ensemble.

    Parameters
    ----------
    bundle : path
        Verified before anything is written.
    workflow : nvtabular.Workflow
        Fitted request workflow of the data folder: raw ids to rows.
    out : path
        Model repository; an older one of this function is replaced as a whole.
    top_k : int
        Items per session.

    Returns
    -------
    dict
        The repository, and the name of the model that clients call.

    Raises
    ------
    ConfigError
        The catalogue's ids are strings.
    BundleError
        The bundle is damaged, or its sessions are cut to another length than the workflow's.
    """
    verify_bundle(bundle)
    transform = load_bundle(bundle).transform
    if transform.settings.id_type != "int64":
        raise ConfigError(
            "a catalogue with string ids",
            "integer ids",
            "use the native ensemble: Merlin Systems' tables cannot hold strings",
        )
    if top_k < 1 or top_k > transform.n_items:
        raise BundleError(f"top_k {top_k} of a catalogue of {transform.n_items} items", "1 to that many")
    with atomic_write_dir(Path(out), f"{EXECUTOR}/config.pbtxt", "Merlin ensemble", BundleError) as folder:
        graph = [ITEM_ID] >> TransformWorkflow(workflow) >> PredictMISSRec(bundle, top_k)
        Ensemble(graph, workflow.input_schema).export(str(folder))
    return {"repository": str(out), "model": EXECUTOR, "top_k": top_k}
