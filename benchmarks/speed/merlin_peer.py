"""Peer of the serving benchmark: a classic Merlin ensemble (NVTabular, then T4R's XLNet) in three configurations.

``executor``    merlin-systems' own export: one executor model that calls the workflow's Triton model for every request
``in_process``  the executor with the workflow inside it: one Triton model, one process, no call in between
``ensemble``    a Triton ensemble of the exported workflow model and a Python model that merges all waiting requests

All serve one model with the same random weights: XLNet, two layers, d = 64, sessions of up to 20 integer ids, weight
tying, top-k in the model, one torch thread. Only speed is measured, so nothing is trained. With ``content`` an item
also has a vector, which Merlin's EmbeddingOperator looks up as in its own examples; without it the peer is leaner than
any multi-modal model can be, and the comparison the hardest. merlin-systems
writes a TorchScript model by default, which needs the libtorch backend that the embedded server lacks: the operator
below runs the model in the executor's process instead, which saves it a call.

    python -m benchmarks.speed.merlin_peer --out work/peers --items 4000
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIGURATIONS = {"executor": "executor_model", "in_process": "executor_model", "ensemble": "merlin_ensemble"}
"""Configuration -> the model that gets the requests."""
OUTPUTS = ("item_id_scores", "item_ids")

_LENGTH, _WIDTH, _LAYERS, _HEADS = 20, 64, 2, 4
_FIRST_ITEM = 3  # Categorify: 0 padding, 1 missing, 2 unknown

_WORKFLOW_MODEL, _RANKER_MODEL = "merlin_workflow", "merlin_t4r"
_RAGGED = '{{ name: "item_id__{part}" data_type: {kind} dims: [ -1 ] }}'
_INPUT = ", ".join(
    _RAGGED.format(part=part, kind=kind) for part, kind in (("values", "TYPE_INT64"), ("offsets", "TYPE_INT32"))
)
_OUTPUT = (
    '{{ name: "item_id_scores" data_type: TYPE_FP32 dims: [ -1, {k} ] }}, '
    '{{ name: "item_ids" data_type: TYPE_INT64 dims: [ -1, {k} ] }}'
)

_MERGING_MODEL = '''"""Merges the requests that wait, as one ragged batch, into one pass of the T4R model."""
import pathlib
import cloudpickle
import numpy as np
import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        torch.set_num_threads(1)
        with (pathlib.Path(__file__).parent / "model.pkl").open("rb") as file:
            self.model = cloudpickle.load(file).eval()
        content = pathlib.Path(__file__).parent / "content.npy"
        self.content = torch.from_numpy(np.load(content)) if content.is_file() else None

    def execute(self, requests):
        read = lambda request, part: pb_utils.get_input_tensor_by_name(request, "item_id__" + part).as_numpy()
        lengths = [np.diff(read(request, "offsets")) for request in requests]
        values = torch.from_numpy(np.concatenate([read(request, "values") for request in requests]))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64))
        inputs = {"item_id__values": values, "item_id__offsets": offsets}
        if self.content is not None:
            inputs |= {"content__values": self.content[values], "content__offsets": offsets}
        with torch.inference_mode():
            scores, items = self.model(inputs)
        ends = np.cumsum([len(each) for each in lengths])
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("item_id_scores", part), pb_utils.Tensor("item_ids", found)]
            )
            for part, found in zip(np.split(scores.numpy(), ends[:-1]), np.split(items.numpy(), ends[:-1]))
        ]
'''


def request(sessions: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of one request: ragged raw ids as values and offsets."""
    offsets = np.concatenate([[0], np.cumsum([len(session) for session in sessions])]).astype(np.int32)
    values = np.concatenate([np.asarray(session, np.int64) for session in sessions])
    return {"item_id__values": values, "item_id__offsets": offsets}


def build(
    out: Path, n_items: int, *, top_k: int = 10, content: int = 0, only: Sequence[str] = tuple(CONFIGURATIONS)
) -> dict[str, Path]:
    """Write a model repository per configuration.

    Parameters
    ----------
    out : Path
        Replaced.
    n_items : int
        Raw ids are 1 to ``n_items``.
    top_k : int
        Items per answer.
    content : int
        Width of the items' vectors; 0 for ids alone.
    only : sequence of str
        Configurations to write.

    Returns
    -------
    dict
        Configuration -> repository.
    """
    warnings.filterwarnings("ignore")  # Merlin's remarks on its own dependencies
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    workflow = _workflow(out / "work", n_items)
    vectors = _vectors(n_items + _FIRST_ITEM, content)
    model = _model(workflow, vectors, top_k)
    made = {}
    for configuration in only:
        made[configuration] = out / configuration
        made[configuration].mkdir()
        if configuration == "ensemble":
            _write_ensemble(made[configuration], workflow, model, vectors)
        else:
            _write_executor(made[configuration], workflow, model, vectors, in_process=configuration == "in_process")
    return made


def _workflow(work: Path, n_items: int) -> Any:
    import nvtabular as nvt
    import pandas as pd
    from merlin.io import Dataset
    from merlin.schema import Tags
    from nvtabular import ops

    work.mkdir()
    ids = np.arange(1, n_items + 1)
    frame = pd.DataFrame({"item_id": [list(part) for part in np.array_split(ids, max(1, n_items // _LENGTH))]})
    encoded = ["item_id"] >> ops.Categorify(out_path=str(work)) >> ops.ListSlice(-_LENGTH) >> ops.TagAsItemID()
    workflow = nvt.Workflow(encoded >> ops.AddMetadata(tags=[Tags.CATEGORICAL, Tags.LIST]))
    frame.to_parquet(work / "sessions.parquet")  # from a frame alone Merlin does not learn that the column holds lists
    workflow.fit(Dataset(str(work / "sessions.parquet")))
    return workflow


def _vectors(n_rows: int, content: int) -> npt.NDArray[np.float32] | None:
    return np.random.default_rng(0).normal(size=(n_rows, content)).astype(np.float32) if content else None


def _looked_up(vectors: npt.NDArray[np.float32]) -> Any:
    from merlin.dataloader.ops.embeddings import EmbeddingOperator

    return EmbeddingOperator(vectors, lookup_key="item_id", embedding_name="content")


def _model(workflow: Any, vectors: npt.NDArray[np.float32] | None, top_k: int) -> Any:
    import torch
    import transformers4rec.torch as tr
    from merlin.systems.dag import Ensemble
    from merlin.systems.dag.ops.workflow import TransformWorkflow

    torch.manual_seed(0)
    schema = workflow.output_schema
    if vectors is not None:
        schema = Ensemble(["item_id"] >> TransformWorkflow(workflow) >> _looked_up(vectors), workflow.input_schema)
        schema = schema.output_schema
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=_LENGTH, d_output=_WIDTH, masking="causal", embedding_dim_default=_WIDTH
    )
    config = tr.XLNetConfig.build(d_model=_WIDTH, n_head=_HEADS, n_layer=_LAYERS, total_seq_length=_LENGTH)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([_WIDTH]), tr.TransformerBlock(config, masking=inputs.masking))
    head = tr.Head(body, tr.NextItemPredictionTask(weight_tying=True), inputs=inputs)
    model = tr.Model(head, max_sequence_length=_LENGTH, top_k=top_k).eval()
    first = {name: torch.from_numpy(array).long() for name, array in request([[_FIRST_ITEM]]).items()}
    if vectors is not None:
        content = torch.from_numpy(vectors[[_FIRST_ITEM]])
        first |= {"content__values": content, "content__offsets": first["item_id__offsets"]}
    model(first)  # the first pass builds what is lazy
    return model


def _operators() -> tuple[type, type]:
    """Return the two operators; defined in a function so that cloudpickle stores them by value, not by module name."""
    from merlin.dag import BaseOperator
    from merlin.schema import ColumnSchema, Schema
    from merlin.systems.dag.ops.workflow import TransformWorkflow
    from merlin.table import TensorTable

    class PredictT4R(BaseOperator):
        """Runs a T4R model in the executor's process; its pickle is an artefact beside the graph."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, k = model, model.top_k
            kinds = {"item_id_scores": np.float32, "item_ids": np.int64}
            self.output_schema = Schema(
                [ColumnSchema(name, dtype=kind, dims=(None, k)) for name, kind in kinds.items()]
            )

        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in self.__dict__.items() if name != "model"}

        def save_artifacts(self, artifact_path: str | None = None) -> None:
            import cloudpickle

            with (Path(str(artifact_path)) / "t4r.pkl").open("wb") as file:
                cloudpickle.dump(self.model, file)

        def load_artifacts(self, artifact_path: str | None = None) -> None:
            if artifact_path:  # the graph's constructor calls it with an empty one
                import cloudpickle
                import torch

                torch.set_num_threads(1)
                with (Path(artifact_path) / "t4r.pkl").open("rb") as file:
                    self.model = cloudpickle.load(file).eval()

        def compute_output_schema(self, *_: Any, **__: Any) -> Any:
            return self.output_schema

        def transform(self, col_selector: Any, transformable: Any) -> Any:  # Merlin's contract
            import torch

            if not isinstance(transformable, TensorTable):
                transformable = TensorTable.from_df(transformable)
            arrays = transformable.to_dict()
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            with torch.inference_mode():
                scores, items = self.model(tensors)
            return TensorTable({"item_id_scores": scores.numpy(), "item_ids": items.numpy()})

    class LocalWorkflow(TransformWorkflow):
        """Keeps the workflow in the executor: merlin-systems splits off the exact class only, not a subclass."""

        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in self.__dict__.items() if name != "workflow"}

        def save_artifacts(self, artifact_path: str | None = None) -> None:
            self.workflow.save(str(Path(str(artifact_path)) / "workflow"))

        def load_artifacts(self, artifact_path: str | None = None) -> None:
            if artifact_path:
                import nvtabular as nvt

                self.workflow = nvt.Workflow.load(str(Path(artifact_path) / "workflow"))

        def transform(self, col_selector: Any, transformable: Any) -> Any:
            rows = super().transform(col_selector, transformable)
            return rows if isinstance(rows, TensorTable) else TensorTable.from_df(rows)  # what the look-up takes

        def compute_output_schema(self, *_: Any, **__: Any) -> Any:
            return self.output_schema

    return PredictT4R, LocalWorkflow


def _write_executor(
    repository: Path, workflow: Any, model: Any, vectors: npt.NDArray[np.float32] | None, *, in_process: bool
) -> None:
    from merlin.systems.dag import Ensemble
    from merlin.systems.dag.ops.workflow import TransformWorkflow

    predict, local = _operators()
    rows = ["item_id"] >> (local(workflow) if in_process else TransformWorkflow(workflow))
    inputs = rows if vectors is None else rows >> _looked_up(vectors)
    Ensemble(inputs >> predict(model), workflow.input_schema).export(str(repository))


def _write_ensemble(repository: Path, workflow: Any, model: Any, vectors: npt.NDArray[np.float32] | None) -> None:
    import cloudpickle

    with tempfile.TemporaryDirectory() as folder:  # merlin-systems' own workflow model, under a plain name
        _write_executor(Path(folder), workflow, model, vectors, in_process=False)
        (exported,) = Path(folder).glob("*transformworkflow*")
        shutil.move(exported, repository / _WORKFLOW_MODEL)
    config = repository / _WORKFLOW_MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace(exported.name, _WORKFLOW_MODEL))
    ranker = repository / _RANKER_MODEL
    (ranker / "1").mkdir(parents=True)
    (ranker / "1" / "model.py").write_text(_MERGING_MODEL)
    with (ranker / "1" / "model.pkl").open("wb") as file:
        cloudpickle.dump(model, file)
    if vectors is not None:
        np.save(ranker / "1" / "content.npy", vectors)
    output = _OUTPUT.format(k=model.top_k)
    (ranker / "config.pbtxt").write_text(
        f'name: "{_RANKER_MODEL}"\nbackend: "python"\nmax_batch_size: 0\ninput [ {_INPUT} ]\noutput [ {output} ]\n'
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
    )
    ensemble = repository / CONFIGURATIONS["ensemble"]
    (ensemble / "1").mkdir(parents=True)

    def mapped(kind: str, names: dict[str, str]) -> str:
        return " ".join(f'{kind} {{ key: "{key}" value: "{value}" }}' for key, value in names.items())

    raw = {name: name for name in ("item_id__values", "item_id__offsets")}
    rows = {name: f"rows_{name}" for name in raw}
    answer = {name: name for name in OUTPUTS}
    first = f"{mapped('input_map', raw)} {mapped('output_map', rows)}"
    second = f"{mapped('input_map', rows)} {mapped('output_map', answer)}"
    (ensemble / "config.pbtxt").write_text(
        f'name: "{ensemble.name}"\nplatform: "ensemble"\nmax_batch_size: 0\ninput [ {_INPUT} ]\noutput [ {output} ]\n'
        "ensemble_scheduling { step [\n"
        f'{{ model_name: "{_WORKFLOW_MODEL}" model_version: -1 {first} }},\n'
        f'{{ model_name: "{_RANKER_MODEL}" model_version: -1 {second} }}\n] }}\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the repositories, and with ``--check`` send a request to each, served by the embedded Triton."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--content", type=int, default=0, help="width of the items' vectors; 0 for ids alone")
    parser.add_argument("--check", action="store_true", help="serve them and compare their answers")
    chosen = parser.parse_args(arguments)
    made = build(chosen.out, chosen.items, top_k=chosen.top_k, content=chosen.content)
    result: dict[str, Any] = {"repositories": {name: str(path) for name, path in made.items()}}
    if chosen.check:
        result["answers"] = {name: _ask(name, repository) for name, repository in made.items()}
        result["equal"] = len({json.dumps(answer["item_ids"]) for answer in result["answers"].values()}) == 1
    print(json.dumps(result))
    return 0 if result.get("equal", True) else 1


def _ask(configuration: str, repository: Path) -> dict[str, Any]:
    import time

    from missrec_t4r.serving.client.transports import TritonTransport
    from missrec_t4r.serving.triton.local_server import LocalTriton

    sessions = [[5, 9, 17], [1], list(range(2, 40))]
    with LocalTriton(repository) as server:
        transport = TritonTransport(server.grpc_url, "grpc", 60)
        answer = transport.infer(CONFIGURATIONS[configuration], request(sessions), OUTPUTS)
        times = []
        for _ in range(40):
            started = time.perf_counter()
            transport.infer(CONFIGURATIONS[configuration], request(sessions[:1]), OUTPUTS)
            times.append(time.perf_counter() - started)
        transport.close()
    return {"item_ids": answer["item_ids"].tolist(), "p50_ms": round(float(np.median(times)) * 1e3, 2)}


if __name__ == "__main__":
    sys.exit(main())
