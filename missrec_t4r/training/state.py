"""State of an interrupted run in one file: tensors by part, facts as JSON, written aside and renamed.

Killed at any moment, a run finds its last state whole: within an epoch it goes on at the step where that was saved,
with the same order of batches and the same random numbers, and ends as if it had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from missrec_t4r.errors import ConfigError
from missrec_t4r.training.checkpoint import load_metadata, load_tensors, save_tensors

Parts = Mapping[str, Mapping[str, Tensor]]


def save_state(file: Path, parts: Parts, facts: Mapping[str, Any], fingerprint: str) -> None:
    """Write the state.

    Parameters
    ----------
    file : Path
    parts : mapping of str to mapping of str to Tensor
        Weights, averages, moments, random states: each under its own names.
    facts : mapping
        What JSON can hold.
    fingerprint : str
        Of settings and data; `load_state` refuses another one.
    """
    tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    save_tensors(file, tensors, {"facts": json.dumps(facts), "fingerprint": fingerprint})


def load_state(file: Path, fingerprint: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the parts and the facts of a state.

    Raises
    ------
    ConfigError
        It belongs to another recipe or data set.
    CheckpointError
        The file is damaged.
    """
    tensors, metadata = load_tensors(file), load_metadata(file)
    if metadata.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"{file.parent} holds an interrupted run with other settings or data",
            "the same recipe, data and number of processes",
            "give another --out, or --restart to discard it",
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return parts, facts


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random numbers, those of the GPU in use among them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with the random numbers of a saved state."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
