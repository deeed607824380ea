"""The bundle: everything that serving needs and nothing else, in files that hold data and never code.

======================== ============================================================================
manifest.json            SHA-256 sum and size of every other file, format version
model.json               `MISSRecConfig`, modality names and widths, side features, number of rows
weights.safetensors      what was learned
catalogue.safetensors    modality vectors, presence masks, interest centroids and assignments
items.parquet            vocabulary in row order, business columns, popularity
features.json            fingerprint of every modality's encoder
session_transform.json   the request transform
schema.pbtxt             Merlin schema of a session
search.safetensors       large catalogues only: the search tables, mapped by servers
======================== ============================================================================

A catalogue update exchanges items, vectors and search tables, and keeps the weights.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from missrec_t4r.bundle.extend import Uninitialised, load_weights, mark_rows
from missrec_t4r.bundle.id_encoder import SessionTransform, TransformSettings
from missrec_t4r.bundle.item_table import load_items, load_session_transform
from missrec_t4r.bundle.manifest import (
    CATALOGUE_FILE,
    FEATURES_FILE,
    FORMAT_VERSION,
    ITEMS_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    SEARCH_FILE,
    WEIGHTS_FILE,
    verify_bundle,
    write_manifest,
)
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import BundleError, MISSRecError
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.io.json_files import write_json
from missrec_t4r.io.tensor_file import advise_random_access, find_non_finite, write_tensors
from missrec_t4r.model.missrec import MISSRec, build_missrec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.retrieval.index_file import RetrievalIndex, write_index
from missrec_t4r.schema import SCHEMA_FILE, SESSION_TRANSFORM_FILE

SEARCH_FROM = 50_000
"""Rows from which a bundle holds search tables; smaller ones are worked out in milliseconds when a server starts."""
_INTERESTS = "interests."
"""Prefix of the model's buffers that belong to a catalogue version, not to the weights."""


@dataclass(frozen=True)
class LoadedBundle:
    """A verified bundle in memory."""

    model: MISSRec
    """In evaluation mode, on the CPU."""
    catalogue: Catalogue
    transform: SessionTransform
    tables: RetrievalIndex | None = None
    """Of a large catalogue, mapped; a small one's are worked out by the ranker."""


def write_bundle(out: str | Path, *, model: MISSRec, catalogue: Catalogue, data: str | Path) -> dict[str, Any]:
    """Write a bundle aside and rename it into place; an older bundle is replaced whole.

    Parameters
    ----------
    out : path
        The bundle folder.
    model : MISSRec
    catalogue : Catalogue
        The one the model was built for.
    data : path
        The data folder: its session transform and schema travel with the bundle.

    Returns
    -------
    dict
        The manifest's content.

    Raises
    ------
    BundleError
        ``out`` is in use by something else, or the data folder lacks a file.
    """
    with atomic_write_dir(Path(out), MANIFEST_FILE, "bundle", BundleError) as folder:
        return fill_bundle(folder, model=model, catalogue=catalogue, data=Path(data))


def fill_bundle(
    folder: Path, *, model: MISSRec, catalogue: Catalogue, data: Path, progress: Progress = quiet
) -> dict[str, Any]:
    """Write the bundle's files into an empty folder; `write_bundle` and `export` put it in place."""
    for name in (SESSION_TRANSFORM_FILE, SCHEMA_FILE):
        if not (data / name).is_file():
            raise BundleError(
                f"the data folder {data} holds no {name}", "a folder of missrec etl", "re-run `missrec etl`"
            )
    shutil.copyfile(data / SCHEMA_FILE, folder / SCHEMA_FILE)
    _write_transform(folder, data, model.config.max_sequence_length)
    write_weights(model, folder / WEIGHTS_FILE)
    write_catalogue(model.state_dict(), catalogue, folder / CATALOGUE_FILE)
    pq.write_table(catalogue.items, folder / ITEMS_FILE)
    widths = {name: modality.width for name, modality in catalogue.modalities.items()}
    described = {"format": FORMAT_VERSION, "config": dataclasses.asdict(model.config), "modalities": widths}
    event_features = (
        [] if model.event_features is None else [column.to_dict() for column in model.event_features.columns]
    )
    write_json(folder / MODEL_FILE, described | {"rows": catalogue.n_rows, "side_features": event_features})
    write_features(folder, catalogue)
    load_session_transform(folder, catalogue.items)  # refuses ids that a request could not carry
    if catalogue.n_rows >= SEARCH_FROM:
        write_index(model.eval(), folder / SEARCH_FILE, progress)
    return write_manifest(folder)


def load_bundle(folder: str | Path) -> LoadedBundle:
    """Verify a bundle and rebuild its model; nothing is unpickled, nothing imported by name.

    Raises
    ------
    BundleError
        The bundle is damaged, or its parts do not fit each other.
    """
    folder = Path(folder)
    listed = verify_bundle(folder)["files"]
    try:
        described = json.loads((folder / MODEL_FILE).read_bytes())
        features = json.loads((folder / FEATURES_FILE).read_bytes())["modalities"]
        stored, weights = load_file(folder / CATALOGUE_FILE), load_file(folder / WEIGHTS_FILE)
        items = load_items(folder)
        _refuse_nan(folder / CATALOGUE_FILE, described["modalities"])
        modalities = {name: _modality(name, stored, features) for name in described["modalities"]}
        catalogue = Catalogue(items, modalities, checked=True)
        config = Recipe.from_stored({"name": "bundle", "model": described["config"]}).model
        event_features = [EventColumn.from_dict(column) for column in described.get("side_features", [])]
        with Uninitialised():
            model = build_missrec(config, catalogue, event_features)
        interests = {name: tensor for name, tensor in stored.items() if name.startswith(_INTERESTS)}
        load_weights(model, weights, interests)
        mark_rows(model, catalogue, described["rows"])
        tables = RetrievalIndex.load(folder / SEARCH_FILE) if SEARCH_FILE in listed else None
        if tables is not None:
            tables.check(catalogue.n_rows, config.d_model)
    except BundleError:
        raise
    except (MISSRecError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"the parts of {folder} do not fit each other ({error})",
            "a bundle of one export",
            "export it again with the installed version",
        ) from error
    return LoadedBundle(model.eval(), catalogue, load_session_transform(folder, items), tables)


def _write_transform(folder: Path, data: Path, max_sequence_length: int) -> None:
    """Copy the request transform, cut to what the model takes: a recipe may differ from the data folder's default."""
    try:
        content = json.loads((data / SESSION_TRANSFORM_FILE).read_text(encoding="utf-8"))
        TransformSettings.from_dict(content)
    except ValueError as error:
        raise BundleError(
            f"{data / SESSION_TRANSFORM_FILE} is no JSON ({error})", "", "re-run `missrec etl`"
        ) from error
    write_json(folder / SESSION_TRANSFORM_FILE, content | {"max_sequence_length": max_sequence_length})


def write_weights(model: MISSRec, file: Path) -> None:
    """Write what was learned."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_tensors(file, {name: tensor for name, tensor in state.items() if not name.startswith(_INTERESTS)})


def with_index(folder: Path, loaded: LoadedBundle, progress: Progress = quiet) -> LoadedBundle:
    """Add search tables, and per-row weights as long as the catalogue, to a bundle that `load_bundle` has read."""
    write_weights(loaded.model, folder / f".{WEIGHTS_FILE}")
    (folder / f".{WEIGHTS_FILE}").replace(folder / WEIGHTS_FILE)  # the file before stays mapped by the model
    write_index(loaded.model, folder / SEARCH_FILE, progress)
    write_manifest(folder)
    return replace(loaded, tables=RetrievalIndex.load(folder / SEARCH_FILE))


def write_catalogue(interests: Mapping[str, Tensor], catalogue: Catalogue, file: Path) -> None:
    """Write what belongs to a catalogue version: the model's buffers of interests, vectors and presence masks."""
    tensors = {name: tensor for name, tensor in interests.items() if name.startswith(_INTERESTS)}
    for name, modality in catalogue.modalities.items():
        tensors[f"modality.{name}.vectors"] = torch.from_numpy(np.ascontiguousarray(modality.vectors))
        tensors[f"modality.{name}.present"] = torch.from_numpy(modality.present.copy())  # masks may be one array
    write_tensors(file, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def write_features(folder: Path, catalogue: Catalogue) -> None:
    """Write whose vectors a bundle holds."""
    encoders = {
        name: {"width": modality.width, "items": int(modality.present.sum()), "encoder": dict(modality.encoder)}
        for name, modality in catalogue.modalities.items()
    }
    write_json(folder / FEATURES_FILE, {"format": FORMAT_VERSION, "modalities": encoders})


def _modality(name: str, stored: dict[str, Tensor], features: dict[str, Any]) -> Modality:
    vectors, present = stored[f"modality.{name}.vectors"], stored[f"modality.{name}.present"]
    advise_random_access([vectors])
    return Modality(vectors.numpy(), present.numpy(), features[name]["encoder"])


def _refuse_nan(file: Path, modalities: Iterable[str]) -> None:
    """Look through the vectors by reading them: through the mapping, every page of them would become ours."""
    found = find_non_finite(file, [f"modality.{name}.vectors" for name in modalities])
    if found is not None:
        raise BundleError(f"{file} holds NaN or infinity in {found[0]}, row {found[1]}", "finite numbers")
