"""Runs and checkpoints: safetensors and JSON, written aside and renamed, loaded strictly with every gap explained."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import CheckpointError
from missrec_t4r.model.missrec import MISSRec, build_missrec
from missrec_t4r.schema import CATALOGUE_FOLDER, ITEM_ID

ADDED_LATER = ("item_knn.cold_start.",)
VOCABULARY_FILE = "vocabulary.parquet"
RECIPE_FILE, RUN_FILE, WEIGHTS_FILE, STATE_FILE = "recipe.json", "run.json", "weights.safetensors", "state.safetensors"


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to score."""

    model: MISSRec
    """In evaluation mode."""
    catalogue: Catalogue
    recipe: Recipe
    data: Path
    """The data folder that the run was trained on, or the one given to `load_run`."""


def save_run(
    out: Path, model: MISSRec, recipe: Recipe, data: Path, info: Mapping[str, Any], catalogue: Catalogue | None = None
) -> None:
    """Write a run: weights, resolved recipe, and where it comes from.

    Parameters
    ----------
    out : Path
        Run folder; created, files replaced one by one by rename, `run.json` last.
    model : MISSRec
    recipe : Recipe
    data : Path
        Data folder; stored relative to the run so that both can be moved together.
    info : mapping
        JSON-able facts: seconds, best epoch, validation metrics.
    catalogue : Catalogue, optional
        Its ids and encoders are kept with the run, so that another catalogue can be compared with it later, when the
        data folder has changed (`missrec train --from`, ``--continue``).
    """
    out.mkdir(parents=True, exist_ok=True)
    if catalogue is not None:
        info = {**info, "modalities": _encoders(catalogue)}
        _write_vocabulary(out / VOCABULARY_FILE, catalogue)
    save_tensors(out / WEIGHTS_FILE, model.state_dict())
    write_json(out / RECIPE_FILE, recipe.to_dict())
    where = os.path.relpath(data.resolve(), out.resolve())
    event_features = [] if model.event_features is None else [column.to_dict() for column in model.event_features.columns]
    write_json(out / RUN_FILE, {"data": where, "versions": versions(), "side_features": event_features, **info})


def load_run(run: str | Path, data: str | Path | None = None) -> LoadedRun:
    """Read a run and build its model.

    Parameters
    ----------
    run : path
        Folder written by ``missrec train``.
    data : path, optional
        Data folder, if it was moved since.

    Raises
    ------
    CheckpointError
        The run is unfinished, or its weights do not fit the catalogue; every gap is listed.
    """
    run = Path(run)
    if not (run / RUN_FILE).is_file():
        raise CheckpointError(f"{run} holds no {RUN_FILE}", "a finished run", "run or resume `missrec train --out`")
    info = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    if "pretraining" in info:
        cure = f"train on one of your data sets from it: `missrec train --from {run}`"
        raise CheckpointError(f"{run} was pre-trained on several domains", "a run of `missrec train`", cure)
    recipe = Recipe.from_dict(json.loads((run / RECIPE_FILE).read_text(encoding="utf-8")))
    folder = Path(data) if data is not None else Path(os.path.normpath(run.resolve() / info["data"]))
    catalogue = Catalogue.load(folder / CATALOGUE_FOLDER)
    event_features = [EventColumn.from_dict(column) for column in info.get("side_features", [])]
    model = build_missrec(recipe.model, catalogue, event_features)
    load_strictly(model, load_tensors(run / WEIGHTS_FILE), str(run / WEIGHTS_FILE))
    return LoadedRun(model.eval(), catalogue, recipe, folder)


def load_strictly(model: torch.nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, refusing any difference and naming each.

    Raises
    ------
    CheckpointError
        Missing, unexpected or differently shaped tensors.
    """
    own = model.state_dict()
    weights = since_then(own, weights) | dict(weights)
    gaps = [f"missing {name}" for name in own if name not in weights]
    gaps += [f"unexpected {name}" for name in weights if name not in own]
    gaps += [
        f"{name} has shape {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if gaps:
        more = f" and {len(gaps) - 8} more" if len(gaps) > 8 else ""
        cure = "use the data folder and recipe of this run, or train again"
        raise CheckpointError(
            f"{source}: " + "; ".join(gaps[:8]) + more, "the weights of this model and catalogue", cure
        )
    model.load_state_dict(dict(weights))


def since_then(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's tensors that weights of an earlier version lack; as built they change no score."""
    return {name: own[name] for name in own if name.startswith(ADDED_LATER) and name not in weights}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it into place."""
    aside = path.with_name(f".{path.name}.partial")
    seen: set[int] = set()
    save_file({name: _apart(tensor, seen) for name, tensor in tensors.items()}, aside, dict(metadata or {}))
    os.replace(aside, path)


def _apart(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return the tensor in memory of its own, as the format wants it: a copy only where it shares its memory."""
    tensor = tensor.detach().contiguous()
    storage = tensor.untyped_storage()
    shared = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
    seen.add(storage.data_ptr())
    return tensor.clone() if shared else tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    CheckpointError
        Missing or damaged file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", "a safetensors file", "train again") from error
    return tensors


def load_metadata(path: Path) -> dict[str, str]:
    """Read the text that `save_tensors` stored beside the tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON aside and rename it into place."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=2, default=float) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _encoders(catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    return {
        name: {"width": modality.width, "fingerprint": modality.fingerprint}
        for name, modality in catalogue.modalities.items()
    }


def _write_vocabulary(path: Path, catalogue: Catalogue) -> None:
    """Write the raw ids in row order (from row 3 on) aside and rename them into place."""
    aside = path.with_name(f".{path.name}.partial")
    pq.write_table(catalogue.items.select([ITEM_ID]), aside)
    os.replace(aside, path)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("missrec-t4r", "torch", "numpy", "transformers4rec", "nvtabular"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
