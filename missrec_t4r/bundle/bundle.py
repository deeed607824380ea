"""The serving bundle: all files that serving needs, as data without code.

======================== ============================================================================
manifest.json            SHA-256 sum and size of every other file, format version; what ``--recount`` counted
model.json               `MISSRecConfig`, modality names and widths, event features, number of rows
weights.safetensors      trained parameters
catalogue.safetensors    modality vectors, presence masks, interest centroids and assignments
items.parquet            vocabulary in row order, business columns, popularity
features.json            fingerprint of every modality's encoder
session_transform.json   the request transform
schema.pbtxt             Merlin schema of a session
search.safetensors       large catalogues only: the retrieval index, memory-mapped by servers
======================== ============================================================================

A catalogue update replaces items, vectors and retrieval index, and keeps the weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from missrec_t4r.bundle.id_encoder import SessionTransform, read_transform
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
from missrec_t4r.bundle.shapes import check_numbers, check_weights, stated
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import BundleError, ConfigError, MISSRecError
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.io.json_files import write_json
from missrec_t4r.io.tensor_file import advise_random_access, write_tensors
from missrec_t4r.io.weight_names import current_names
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.retrieval.index_file import RetrievalIndex, check_belongs, check_index, write_index
from missrec_t4r.runs.extend import Uninitialised, load_weights, mark_rows
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.schema import SCHEMA_FILE, SESSION_TRANSFORM_FILE

log = logging.getLogger(__name__)

SEARCH_FROM = 50_000
"""Rows from which a bundle has a retrieval index; a smaller one is computed in milliseconds when a server starts."""
_INTERESTS = "interests."
"""Prefix of the model's buffers that belong to a catalogue version, not to the weights."""
_MISFITS = (
    MISSRecError,
    SafetensorError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
)
"""What libraries raise for well-formed files that do not belong together."""


@dataclass(frozen=True)
class LoadedBundle:
    """A verified bundle in memory."""

    model: MISSRec
    """In evaluation mode, on the CPU."""
    catalogue: Catalogue
    transform: SessionTransform
    manifest: Mapping[str, Any]
    """Its SHA-256 sums identify the bundle; ``recount`` says in which data co-occurrences were counted again."""
    tables: RetrievalIndex | None = None
    """Retrieval index of a large catalogue, memory-mapped; None for a small one, whose ranker computes it."""


def write_bundle(out: str | Path, *, model: MISSRec, catalogue: Catalogue, data: str | Path) -> dict[str, Any]:
    """Write a bundle atomically; an older bundle is replaced as a whole.

    Parameters
    ----------
    out : path
        Bundle folder.
    model : MISSRec
    catalogue : Catalogue
        The one that the model was built for.
    data : path
        Data folder, whose request transform and schema are copied.

    Returns
    -------
    dict
        Content of the manifest.

    Raises
    ------
    BundleError
        ``out`` was not written by missrec, or the data folder lacks a file.
    """
    with atomic_write_dir(Path(out), MANIFEST_FILE, "bundle", BundleError) as folder:
        return fill_bundle(folder, model=model, catalogue=catalogue, data=Path(data))


def fill_bundle(
    folder: Path,
    *,
    model: MISSRec,
    catalogue: Catalogue,
    data: Path,
    n_trained: int | None = None,
    recount: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the bundle's files into an empty folder and return the manifest.

    Rows from ``n_trained`` on are new since the training; None: there are none. ``recount``: as of `write_manifest`.
    """
    for name in (SESSION_TRANSFORM_FILE, SCHEMA_FILE):
        if not (data / name).is_file():
            raise BundleError(
                f"the data folder {data} holds no {name}", "a folder of missrec etl", "re-run `missrec etl`"
            )
    shutil.copyfile(data / SCHEMA_FILE, folder / SCHEMA_FILE)
    _write_transform(folder, data, model.config.max_sequence_length)
    _write_weights(model, folder / WEIGHTS_FILE)
    write_catalogue(folder, model.state_dict(), catalogue)
    content = {
        "format": FORMAT_VERSION,
        "config": dataclasses.asdict(model.config),
        "modalities": {name: modality.width for name, modality in catalogue.modalities.items()},
        "rows": n_trained or catalogue.n_rows,
        "event_features": [column.to_dict() for column in model.event_columns],
    }
    write_json(folder / MODEL_FILE, content)
    load_session_transform(folder, catalogue.items)  # refuses ids that a request cannot hold
    if catalogue.n_rows >= SEARCH_FROM:
        write_index(model.eval(), folder / SEARCH_FILE)
    return write_manifest(folder, recount)


@contextmanager
def bundle_or_run(bundle: str | Path | None, run: str | Path | None) -> Iterator[Path]:
    """Yield the folder of a bundle; a temporary one is removed at the end.

    Parameters
    ----------
    bundle : path, optional
        Existing bundle.
    run : path, optional
        Run folder of `missrec train`, which is exported to a temporary bundle.

    Raises
    ------
    ConfigError
        Both or neither are given.
    """
    if (bundle is None) == (run is None):
        given = "neither --bundle nor --run" if bundle is None else "both --bundle and --run"
        raise ConfigError(given, "one of the two", "a bundle comes from `missrec export`, a run from `missrec train`")
    if bundle is not None:
        yield Path(bundle)
        return
    assert run is not None
    loaded = load_run(run)
    with tempfile.TemporaryDirectory(prefix="missrec-bundle-") as folder:
        log.info(f"reading the run {run}")
        fill_bundle(
            Path(folder), model=loaded.model, catalogue=loaded.catalogue, data=loaded.data, n_trained=loaded.n_trained
        )
        yield Path(folder)


def load_bundle(folder: str | Path) -> LoadedBundle:
    """Verify a bundle and rebuild its model; nothing is unpickled, nothing imported by name.

    Raises
    ------
    BundleError
        The bundle is damaged, or its files belong to different models or catalogues.
    """
    folder = Path(folder)
    manifest = verify_bundle(folder)
    has_index = SEARCH_FILE in manifest["files"]
    says = stated(folder)
    try:
        features = json.loads((folder / FEATURES_FILE).read_bytes())["modalities"]
        items = load_items(folder)
        stored = load_file(folder / CATALOGUE_FILE)
        modalities = {name: _modality(name, stored, features) for name in says.widths}
        catalogue = Catalogue(items, modalities, checked=True)
        config = Recipe.from_stored({"name": "bundle", "model": says.model["config"]}).model
        event_features = [EventColumn.from_dict(column) for column in says.model.get("event_features", [])]
        check_weights(folder, says, config, catalogue, event_features)
        if has_index:
            check_index(folder / SEARCH_FILE, catalogue.n_rows, config.d_model, len(modalities))
        check_numbers(folder, says)
        weights = current_names(load_file(folder / WEIGHTS_FILE))
        with Uninitialised():
            model = build_missrec(config, catalogue, event_features)
        interests = {name: tensor for name, tensor in stored.items() if name.startswith(_INTERESTS)}
        load_weights(model, weights | interests)
        mark_rows(model, catalogue, says.n_trained)
        tables = RetrievalIndex.load(folder / SEARCH_FILE) if has_index else None
        if tables is not None:
            check_belongs(tables, model.eval(), folder / SEARCH_FILE)
    except BundleError:
        raise
    except _MISFITS as error:
        raise BundleError(
            f"the parts of {folder} do not fit each other ({error})",
            "a bundle of one export",
            "export it again with the installed version",
        ) from error
    return LoadedBundle(model.eval(), catalogue, load_session_transform(folder, items), manifest, tables)


def _write_transform(folder: Path, data: Path, max_sequence_length: int) -> None:
    """Copy the request transform with the model's session length, which may differ from the data folder's."""
    content = read_transform(data / SESSION_TRANSFORM_FILE) | {"max_sequence_length": max_sequence_length}
    write_json(folder / SESSION_TRANSFORM_FILE, content)


def _write_weights(model: MISSRec, file: Path) -> None:
    """Write the trained parameters: the model's state without the buffers of a catalogue version."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_tensors(file, {name: tensor for name, tensor in state.items() if not name.startswith(_INTERESTS)})


def with_index(folder: Path, loaded: LoadedBundle) -> LoadedBundle:
    """Add a retrieval index, and weights extended to all rows, to a bundle that `load_bundle` has read."""
    temporary = folder / f".{WEIGHTS_FILE}"  # written beside the old file, which the model still has mapped
    _write_weights(loaded.model, temporary)
    temporary.replace(folder / WEIGHTS_FILE)
    write_index(loaded.model, folder / SEARCH_FILE)
    manifest = write_manifest(folder, loaded.manifest.get("recount"))
    return replace(loaded, manifest=manifest, tables=RetrievalIndex.load(folder / SEARCH_FILE))


def write_catalogue(folder: Path, interests: Mapping[str, Tensor], catalogue: Catalogue) -> None:
    """Write the files of a catalogue version: its tensors, item table and encoders' fingerprints.

    ``interests`` are the model's interest buffers, among other tensors.
    """
    tensors = {name: tensor for name, tensor in interests.items() if name.startswith(_INTERESTS)}
    for name, modality in catalogue.modalities.items():
        tensors[f"modality.{name}.vectors"] = torch.from_numpy(np.ascontiguousarray(modality.vectors))
        tensors[f"modality.{name}.present"] = torch.from_numpy(modality.present.copy())  # masks may share memory
    write_tensors(folder / CATALOGUE_FILE, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
    pq.write_table(catalogue.items, folder / ITEMS_FILE)
    encoders = {
        name: {"width": modality.width, "items": int(modality.present.sum()), "encoder": dict(modality.encoder)}
        for name, modality in catalogue.modalities.items()
    }
    write_json(folder / FEATURES_FILE, {"format": FORMAT_VERSION, "modalities": encoders})


def _modality(name: str, stored: dict[str, Tensor], features: dict[str, Any]) -> Modality:
    vectors, present = stored[f"modality.{name}.vectors"], stored[f"modality.{name}.present"]
    advise_random_access([vectors])
    return Modality(vectors.numpy(), present.numpy(), features[name]["encoder"])
