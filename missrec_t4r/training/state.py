"""What a training reads, and its checkpoint: a safetensors file, tensors by part, other facts as JSON in its metadata.

A checkpoint belongs to a recipe, the content of the data, a warm start and a number of processes: their text is its
fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import changed_settings
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.runs.run_folder import (
    LOG_FILE,
    RECIPE_FILE,
    RUN_FILE,
    STATE_FILE,
    is_finished,
    load_metadata,
    load_tensors,
    save_tensors,
)
from missrec_t4r.training import distributed
from missrec_t4r.training.curves import TENSORBOARD_FOLDER

INTERRUPT = "interrupt"
"""Value of ``stopped_by`` after Ctrl-C."""
LIMITS = ("epochs", "patience", "max_minutes")
"""Settings that may grow when a run goes on: they say when it ends."""
_HARMLESS = ("checkpoint_minutes", "tensorboard", "cuda_graphs")
"""Settings that may change when an interrupted run is resumed: on a GPU the last draws other random numbers in dropout,
no other number depends on them."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""Named tensors by part: weights, averages, optimiser moments, random states."""


class TrainingData(NamedTuple):
    """What a training reads of a data folder: never the test split."""

    catalogue: Catalogue
    train: Sessions
    valid: Sessions
    """Histories with their target."""
    event_features: Sequence[EventColumn] = ()
    """Fitted to the training sessions, or as an earlier run fitted them."""


class Checkpoint:
    """The checkpoint of a run folder. The first process writes it and decides whether a run goes on from it.

    Parameters
    ----------
    out : Path
        Run folder.
    recipe : Recipe
    data : TrainingData
    facts : mapping
        What `run.json` says of a warm start.
    """

    def __init__(self, out: Path, recipe: Recipe, data: TrainingData, facts: Mapping[str, Any]) -> None:
        self.out, self.file = out, out / STATE_FILE
        self.recipe, self.data, self.facts = recipe, data, facts
        self.world = distributed.world()

    @cached_property
    def fingerprint(self) -> str:
        """Recipe, data and warm start as text: a checkpoint of another one is not resumed."""
        catalogue, train, valid, _ = self.data
        recipe = dataclasses.asdict(self.recipe)
        recipe["train"] = {name: value for name, value in recipe["train"].items() if name not in _HARMLESS}
        content = content_checksum(catalogue, (train, valid))
        facts = [recipe, catalogue.n_rows, len(train.values), len(valid), content]
        facts += [self.world.size] if self.world.size > 1 else []
        return json.dumps([*facts, self.facts] if self.facts else facts, sort_keys=True, default=str)

    def save(self, parts: Parts, facts: Mapping[str, Any]) -> None:
        """Write tensors and JSON-able facts, atomically."""
        tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        save_tensors(self.file, tensors, {"facts": json.dumps(facts), "fingerprint": self.fingerprint})

    def can_resume(self) -> bool:
        """Whether the folder holds an interrupted run, or a finished one that higher limits let go on.

        The first process decides for all, which call this together: the others may find another state of the folder.
        """
        return distributed.share(self.world.rank == 0 and self._has_unfinished_run())

    def _has_unfinished_run(self) -> bool:
        if not self.file.is_file():
            return False
        if not is_finished(self.out) or read_json(self.out / RUN_FILE).get("stopped_by") == INTERRUPT:
            return True
        stored = Recipe.from_stored(read_json(self.out / RECIPE_FILE)).train
        return any(getattr(stored, name) != getattr(self.recipe.train, name) for name in LIMITS)

    def load(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Return the tensors by part and the facts; None, with the earlier run's files deleted, where none can go on.

        Raises
        ------
        ConfigError
            The checkpoint belongs to another recipe, data set or number of processes.
        CheckpointError
            It is damaged, or not every process finds it.
        """
        if not self.can_resume():
            self.delete()
            return None
        if without := [rank for rank, found in enumerate(distributed.collect(self.file.is_file())) if not found]:
            raise CheckpointError(
                f"process {without[0]} does not find the checkpoint {self.file} of process 0",
                "one run folder for all processes",
                "put --out on a disk that all machines share, or train from the start with --restart",
            )
        tensors, metadata = load_tensors(self.file), load_metadata(self.file)
        stored = metadata.get("fingerprint", "null")
        if not _goes_on(stored, self.fingerprint):
            changes = _changes(stored, self.fingerprint)
            raise ConfigError(
                f"{self.out} holds an interrupted run with other settings or data: {changes}",
                "the same recipe, data and number of processes",
                "give another --out, or --restart to discard it; epochs, patience and max_minutes may grow",
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        facts: dict[str, Any] = json.loads(metadata["facts"])
        return parts, facts

    def delete(self) -> None:
        """Delete it, and the log and TensorBoard files of the run folder."""
        if self.world.rank == 0:
            for name in (STATE_FILE, LOG_FILE):
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / TENSORBOARD_FOLDER, ignore_errors=True)


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
