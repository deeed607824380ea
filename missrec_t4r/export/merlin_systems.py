"""A classic Merlin Systems ensemble of our model: TransformWorkflow >> PredictMISSRec, for teams that run such.

The same bundle, the same ranker and so the same top-k as the native ensemble; raw ids go through NVTabular itself. The
graph and the workflow are pickles, as Merlin Systems writes them (docs/security.md); our model stays a bundle.
Integer ids only: Merlin Systems' tables carry no strings. The native ensemble is several times faster.
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
"""The model to ask; the name is Merlin Systems'."""
_ARTEFACT = "missrec_bundle"


class PredictMISSRec(BaseOperator):  # type: ignore[misc]  # Merlin ships no types
    """Rows of sessions to recommended items, in the executor's own process.

    Parameters
    ----------
    bundle : path
        Travels beside the graph as it is.
    top_k : int
        Items per session; the classic ensemble has no such input.
    """

    def __init__(self, bundle: str | Path, top_k: int = 10) -> None:
        super().__init__()
        self.bundle, self.top_k = str(bundle), top_k
        self.ranker: Any = None
        self.transform_ids: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Keep the model out of the graph's pickle."""
        return {**self.__dict__, "ranker": None, "transform_ids": None, "bundle": ""}

    def save_artifacts(self, artifact_path: str | None = None) -> None:
        """Copy the bundle beside the graph."""
        target = Path(str(artifact_path)) / _ARTEFACT
        target.mkdir(parents=True)
        for name in (MANIFEST_FILE, *verify_bundle(self.bundle, only=())["files"]):
            shutil.copyfile(Path(self.bundle) / name, target / name)

    def load_artifacts(self, artifact_path: str | None = None) -> None:
        """Verify and load the bundle; the graph's constructor asks once with an empty path."""
        if not artifact_path:
            return
        from missrec_t4r.retrieval.ranker import Ranker

        loaded = load_bundle(Path(artifact_path) / _ARTEFACT)
        self.ranker, self.transform_ids = Ranker(loaded.model, loaded.catalogue, tables=loaded.tables), loaded.transform

    def compute_input_schema(self, root: Schema, parents: Schema, deps: Schema, selector: Any) -> Schema:  # noqa: ARG002
        """Return what the workflow gives."""
        return parents

    def compute_output_schema(self, *_: Any, **__: Any) -> Schema:
        """Return item ids and scores, best first."""
        kinds = {ITEM_ID: np.int64, "score": np.float32}
        return Schema([ColumnSchema(name, dtype=kind, dims=(None, self.top_k)) for name, kind in kinds.items()])

    def transform(self, col_selector: Any, transformable: Any) -> TensorTable:  # noqa: ARG002 - Merlin's contract
        """Answer a batch; fewer than ``top_k`` items are filled up with the missing id and the score 0."""
        table = transformable if isinstance(transformable, TensorTable) else TensorTable.from_df(transformable)
        arrays = table.to_dict()
        values, offsets = np.asarray(arrays[f"{ITEM_ID}__values"]), np.asarray(arrays[f"{ITEM_ID}__offsets"])
        lengths = np.diff(offsets)
        rows = np.full((len(lengths), max(int(lengths.max(initial=0)), 1)), PADDING_ROW, np.int64)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = values
        ranking = self.ranker.rank(rows, top_k=self.top_k)
        wide = np.zeros((len(rows), self.top_k), np.int64)
        scores = np.zeros(wide.shape, np.float32)
        wide[:, : ranking.rows.shape[1]], scores[:, : ranking.rows.shape[1]] = ranking.rows, ranking.scores
        return TensorTable({ITEM_ID: self.transform_ids.wire_ids_of(wide), "score": scores})


def export_merlin(bundle: str | Path, workflow: Any, out: str | Path, *, top_k: int = 10) -> dict[str, Any]:
    """Write a classic ensemble.

    Parameters
    ----------
    bundle : path
        Verified first.
    workflow : nvtabular.Workflow
        The fitted request workflow of the data folder: raw ids in, rows out.
    out : path
        The model repository; an older one of this function is replaced whole.
    top_k : int

    Returns
    -------
    dict
        The repository and the model to ask.

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
            "Merlin Systems' tables carry no strings: use the native ensemble",
        )
    if top_k < 1 or top_k > transform.n_items:
        raise BundleError(f"top_k {top_k} of a catalogue of {transform.n_items} items", "1 to that many")
    with atomic_write_dir(Path(out), f"{EXECUTOR}/config.pbtxt", "Merlin ensemble", BundleError) as folder:
        graph = [ITEM_ID] >> TransformWorkflow(workflow) >> PredictMISSRec(bundle, top_k)
        Ensemble(graph, workflow.input_schema).export(str(folder))
    return {"repository": str(out), "model": EXECUTOR, "top_k": top_k}
