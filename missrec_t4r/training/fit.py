"""Training (fine-tuning) on one data folder: read and check the data, build the trainer, train or describe the run.

The objective is the softmax cross-entropy of `missrec_t4r.training.step` (arXiv:2308.11175; `docs/equations.md`, E13).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import training_batches
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn, event_columns, fit_event_columns, load_sessions
from missrec_t4r.errors import DataError
from missrec_t4r.runs.run_folder import RECIPE_FILE, RUN_FILE, VOCABULARY_FILE, WEIGHTS_FILE
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.training import distributed
from missrec_t4r.training.memory import translate_out_of_memory
from missrec_t4r.training.predict import predict
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Prepare, Trainer

log = logging.getLogger(__name__)


def train(
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "default",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    prepare: Prepare | None = None,
    event_features: Sequence[EventColumn] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train MISSRec on a data folder and write a run folder.

    Parameters
    ----------
    data : path
        Folder written by ``missrec etl``.
    out : path
        Run folder to write. An interrupted run with the same recipe is resumed.
    recipe : str, path or Recipe
        Name of a shipped recipe, YAML file, or the recipe itself.
    settings : mapping, optional
        Settings that override the recipe, such as ``{"train.epochs": 3}``.
    resume : bool
        False trains from the start, also if there is a checkpoint.
    device : str
        auto (a GPU if there is one; under torchrun one for each process), cpu or cuda.
    prepare : function, optional
        As in `Trainer`: loads an earlier run's weights and freezes parts (`missrec_t4r.training.warm_start`).
    event_features : sequence of EventColumn, optional
        Event features as an earlier run fitted them; by default chosen by the recipe and fitted to the data.
    dry_run : bool
        Read and check everything and return what would be trained; write nothing.

    Returns
    -------
    dict
        Run folder, best epoch, its validation NDCG@10, what ended training (``stopped_by``), seconds, precision and the
        settings of the score terms (``score_terms``).

    Raises
    ------
    DataError, ConfigError, CheckpointError
        Unusable data, contradictory settings, or a checkpoint of another recipe or data set.
    """
    data, out = Path(data), Path(out)
    resolved = Recipe.load(recipe, settings)
    read = read_training_data(data, resolved, event_features)
    with distributed.joined(distributed.own_device(device)), translate_out_of_memory():
        trainer = Trainer(resolved, read, out, device, prepare)
        return run_or_describe(trainer, data, resume=resume, dry_run=dry_run)


def read_training_data(data: Path, recipe: Recipe, event_features: Sequence[EventColumn] | None = None) -> TrainingData:
    """Read and check the data folder for a recipe.

    Parameters
    ----------
    data : Path
    recipe : Recipe
        Chooses the event features.
    event_features : sequence of EventColumn, optional
        As an earlier run fitted them.

    Raises
    ------
    DataError
        No session to learn from, or sessions and catalogue of different ETL runs.
    """
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    columns = event_features
    if columns is None:
        columns = event_columns(data, recipe.model.event_features, recipe.model.event_feature_width)
    valid = load_sessions(data, "valid", columns)
    splits = {"train": load_sessions(data, "train", columns).known(), "valid": valid.with_known_target()}
    if not (splits["train"].lengths >= 2).any():
        raise DataError(f"no training session in {data} has two known items", "sessions to learn from", "check the ETL")
    for name, sessions in splits.items():
        if (highest := int(sessions.values.max(initial=0))) >= catalogue.n_rows:
            raise DataError(
                f"split {name!r} holds row {highest}",
                f"rows below {catalogue.n_rows}",
                "sessions and catalogue are of different ETL runs; re-run the ETL",
            )
    if event_features is None:
        columns = fit_event_columns(columns, splits["train"])
    if distributed.launched().rank == 0:
        if left_out := len(valid) - len(splits["valid"]):
            log.info(
                f"{left_out:,} of {len(valid):,} validation sessions are left out: their target is an unknown item"
            )
        if columns:
            log.info(f"event features: {', '.join(column.name for column in columns)}")
    return TrainingData(catalogue, splits["train"], splits["valid"], columns)


def run_or_describe(trainer: Trainer, data: Path, *, resume: bool, dry_run: bool) -> dict[str, Any]:
    """Train, from the run folder's checkpoint if there is one, or return what `describe_run` says about it."""
    if dry_run:
        return describe_run(trainer, data, resume=resume)
    if resume:
        trainer.resume()
    else:
        trainer.checkpoint.delete()
    return trainer.run(data)


def describe_run(trainer: Trainer, data: Path, *, resume: bool) -> dict[str, Any]:
    """Return the result of a dry run: inputs, sizes, steps per epoch, predicted time and memory, and what is resumed.

    Parameters
    ----------
    trainer : Trainer
        Ready to train; a warm start has loaded its weights already, so that unfit ones have raised their error.
    data : Path
        The data folder; of several, the first.
    resume : bool
        Whether an interrupted run in the folder would be resumed.

    Raises
    ------
    CheckpointError, ConfigError
        The interrupted run belongs to another recipe or other data.
    """
    recipe = trainer.recipe
    if resumes := resume and trainer.checkpoint.can_resume():
        trainer.resume()
    steps = training_batches(trainer.sessions, recipe.model, recipe.train, np.random.default_rng(recipe.train.seed))
    return {
        "dry_run": True,
        "data": str(data),
        "run": str(trainer.out),
        "items": trainer.catalogue.n_items,
        "modalities": list(trainer.catalogue.modalities),
        "event_features": [column.name for column in trainer.model.event_columns],
        "sessions": {"train": len(trainer.sessions), "valid": len(trainer.all_valid)},
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "device": str(trainer.device),
        "epochs_at_most": recipe.train.epochs,
        "minutes_at_most": recipe.train.max_minutes or None,
        "steps_per_epoch": len(steps),
        "resumes": {"epoch": trainer.status["epoch"], "steps_done": trainer.status["done"]} if resumes else None,
        "predicted": predict(trainer),
        "recipe": {"model": dataclasses.asdict(recipe.model), "train": dataclasses.asdict(recipe.train)},
        **trainer.facts,
        "would_write": [str(trainer.out / name) for name in (WEIGHTS_FILE, RECIPE_FILE, RUN_FILE, VOCABULARY_FILE)],
        "would_replace": (trainer.out / RUN_FILE).is_file(),
    }
