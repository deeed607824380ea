"""`missrec bundle merlin`: a classic Merlin Systems ensemble with the bundle and the ranker of the native one.

    integer ids   TransformWorkflow >> PredictMISSRec: raw ids are encoded by NVTabular itself
    string ids    PredictMISSRec alone, from raw ids to raw ids, with the bundle's encoder: Merlin Systems' model for a
                  workflow reads texts as ASCII, and refuses other ones. Export has compared encoder and workflow

The top-k equals the native ensemble's. Graph and workflow are pickles, as Merlin Systems writes them
(docs/security.md); the model stays a bundle. The native ensemble is several times faster.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import merlin.dtypes as md
import numpy as np
from merlin.dag import BaseOperator
from merlin.schema import ColumnSchema, Schema
from merlin.systems.dag import Ensemble
from merlin.systems.dag.ops.workflow import TransformWorkflow
from merlin.table import TensorTable

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.bundle.id_encoder import NULL_STRING
from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.errors import BundleError
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.schema import ITEM_ID, PADDING_ROW

EXECUTOR = "executor_model"
"""Model that clients call; Merlin Systems defines the name."""
_ARTEFACT = "missrec_bundle"
_STRINGS = md.object_
"""Texts of Triton are arrays of bytes objects; Merlin's dtype ``string`` would cast them to numpy's ASCII."""


class PredictMISSRec(BaseOperator):  # type: ignore[misc]  # Merlin ships no types
    """Operator from rows of sessions, or from their raw string ids, to recommended items, in the executor's process.

    Parameters
    ----------
    bundle : path
        Copied beside the graph.
    top_k : int
        Items per session; fixed, since the classic ensemble has no such input.
    strings : bool
        The input is a list column of raw string ids, and so is the output; otherwise rows come in and integers go out.
    """

    def __init__(self, bundle: str | Path, top_k: int = 10, *, strings: bool = False) -> None:
        super().__init__()
        self.bundle, self.top_k, self.strings = str(bundle), top_k, strings
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
        dtypes = {ITEM_ID: _STRINGS if self.strings else np.int64, "score": np.float32}
        return Schema([ColumnSchema(name, dtype=dtype, dims=(None, self.top_k)) for name, dtype in dtypes.items()])

    def transform(self, col_selector: Any, transformable: Any) -> TensorTable:  # Merlin's contract
        """Return ids and scores [batch, top_k]; fewer items are padded with the missing id and the score 0."""
        table = transformable if isinstance(transformable, TensorTable) else TensorTable.from_df(transformable)
        arrays = table.to_dict()
        values, lengths = np.asarray(arrays[f"{ITEM_ID}__values"]).ravel(), np.diff(arrays[f"{ITEM_ID}__offsets"])
        if self.strings:
            rows, _ = self.id_encoder.padded(_padded(values, lengths, NULL_STRING), lengths)
        else:
            rows = _padded(values, lengths, PADDING_ROW)
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
        Fitted request workflow of the data folder: raw ids to rows. With string ids only its columns are used.
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
    BundleError
        The bundle is damaged, or has fewer items than ``top_k``.
    """
    transform = load_bundle(bundle).transform
    strings = transform.settings.id_type == "string"
    if not 1 <= top_k <= transform.n_items:
        raise BundleError(f"top_k {top_k} of a catalogue of {transform.n_items} items", "1 to that many")
    with atomic_write_dir(Path(out), f"{EXECUTOR}/config.pbtxt", "Merlin ensemble", BundleError) as folder:
        predict = PredictMISSRec(bundle, top_k, strings=strings)
        graph = [ITEM_ID] >> predict if strings else [ITEM_ID] >> TransformWorkflow(workflow) >> predict
        request = Schema([ColumnSchema(ITEM_ID, dtype=_STRINGS, dims=(None, (0, None)))])
        Ensemble(graph, request if strings else workflow.input_schema).export(str(folder))
    return {"repository": str(out), "model": EXECUTOR, "top_k": top_k}


def _padded(values: AnyArray, lengths: Ints, padding: int | bytes) -> AnyArray:
    """Return ragged values as [batch, longest], padded on the right; longest is at least 1."""
    padded = np.full((len(lengths), max(int(lengths.max(initial=0)), 1)), padding, values.dtype)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = values
    return padded
