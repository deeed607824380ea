"""Checkpoint of a training in one safetensors file: tensors by part, other facts as JSON in its metadata."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config.checks import changed_settings
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.runs.run_folder import load_metadata, load_tensors, save_tensors

LIMITS = ("epochs", "patience", "max_minutes")
"""Settings that may grow when a run goes on: they say when it ends."""

Parts = Mapping[str, Mapping[str, Tensor]]


def save_state(file: Path, parts: Parts, facts: Mapping[str, Any], fingerprint: str) -> None:
    """Write a checkpoint atomically.

    Parameters
    ----------
    file : Path
    parts : mapping of str to mapping of str to Tensor
        Weights, averages, optimiser moments, random states: named tensors by part.
    facts : mapping
        JSON-able values.
    fingerprint : str
        Identifies settings and data; `load_state` raises an error for another one.
    """
    tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    save_tensors(file, tensors, {"facts": json.dumps(facts), "fingerprint": fingerprint})


def load_state(file: Path, fingerprint: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the parts and the facts of a checkpoint.

    Raises
    ------
    ConfigError
        The checkpoint belongs to another recipe or data set.
    CheckpointError
        The file is damaged.
    """
    tensors, metadata = load_tensors(file), load_metadata(file)
    stored = metadata.get("fingerprint", "null")
    if not _goes_on(stored, fingerprint):
        raise ConfigError(
            f"{file.parent} holds an interrupted run with other settings or data: {_changes(stored, fingerprint)}",
            "the same recipe, data and number of processes",
            "give another --out, or --restart to discard it; epochs, patience and max_minutes may grow",
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return parts, facts


def _goes_on(stored: str, own: str) -> bool:
    """Whether two fingerprints differ in grown limits alone; a cosine schedule depends on the epochs."""
    if stored == own:
        return True
    before, now = json.loads(stored), json.loads(own)
    try:
        for facts in (before, now):
            facts[0].pop("name", None)  # it has no influence on the settings
        limits = [{name: facts[0]["train"].pop(name) for name in LIMITS} for facts in (before, now)]
    except (KeyError, TypeError, IndexError):
        return False
    if before != now or (now[0]["train"]["schedule"] == "cosine" and limits[0]["epochs"] != limits[1]["epochs"]):
        return False
    return has_grown(*limits)


def _changes(stored: str, own: str) -> str:
    """Return in what two fingerprints differ, such as ``train.epochs 3 -> 2``."""
    before, now = json.loads(stored), json.loads(own)
    try:
        changes = changed_settings(before[0], now[0])
    except (KeyError, TypeError, IndexError, AttributeError):
        return "it is of another version"
    if before[1:] != now[1:]:
        changes.append("the data, the run that it starts from, or the number of processes")
    return ", ".join(changes) or "it is of another version"


def has_grown(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether no limit is lower than before; 0 minutes are no limit.

    Examples
    --------
    >>> before = {"epochs": 3, "patience": 5, "max_minutes": 2.0}
    >>> has_grown(before, before | {"epochs": 9, "max_minutes": 0}), has_grown(before, before | {"epochs": 2})
    (True, False)
    """
    return all((now[name] or math.inf) >= (before[name] or math.inf) for name in LIMITS)


def content_checksum(catalogue: Catalogue, splits: Sequence[Sessions]) -> int:
    """Return a checksum of all that a training reads of its data."""
    parts = [array for split in splits for array in (split.values, split.offsets, *split.features.values())]
    parts += [array for modality in catalogue.modalities.values() for array in (modality.vectors, modality.present)]
    checksum = zlib.crc32(catalogue.train_count.data)
    for part in parts:
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return checksum


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random generators: the CPU's and, if it is in use, the GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore torch's random generators."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
