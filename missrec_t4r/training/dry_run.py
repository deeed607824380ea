"""What a training run would do: what it reads, how large it is, whether it resumes; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from missrec_t4r.data.batches import training_batches
from missrec_t4r.training.checkpoint import RECIPE_FILE, RUN_FILE, STATE_FILE, VOCABULARY_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from missrec_t4r.training.trainer import Trainer


def planned(trainer: Trainer, data: Path, *, resume: bool) -> dict[str, Any]:
    """Return what a trainer that is ready to start would do.

    Parameters
    ----------
    trainer : Trainer
        Its model is built and, with ``--from`` or ``--continue``, loaded: what does not fit was said by then.
    data : Path
        The data folder; of several, the first.
    resume : bool
        Whether an interrupted run in the folder would be continued.

    Raises
    ------
    CheckpointError, ConfigError
        The interrupted run belongs to another recipe or other data.
    """
    recipe = trainer.recipe
    if resumes := resume and (trainer.out / STATE_FILE).is_file():
        trainer.resume()
    steps = training_batches(trainer.sessions, recipe.model, recipe.train, np.random.default_rng(recipe.train.seed))
    return {
        "dry_run": True,
        "data": str(data),
        "run": str(trainer.out),
        "items": trainer.catalogue.n_items,
        "modalities": list(trainer.catalogue.modalities),
        "side_features": [] if trainer.model.side is None else [c.name for c in trainer.model.side.columns],
        "sessions": {"train": len(trainer.sessions), "valid": len(trainer.all_valid)},
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "device": str(trainer.device),
        "epochs_at_most": recipe.train.epochs,
        "minutes_at_most": recipe.train.max_minutes or None,
        "steps_per_epoch": len(steps),
        "resumes": {"epoch": trainer.status["epoch"], "steps_done": trainer.status["done"]} if resumes else None,
        **trainer.facts,
        "would_write": [str(trainer.out / name) for name in (WEIGHTS_FILE, RECIPE_FILE, RUN_FILE, VOCABULARY_FILE)],
        "would_replace": (trainer.out / RUN_FILE).is_file(),
    }
