"""Time and memory of a training, predicted from a few of its own steps; nothing is written.

Everything that an epoch does is done once or in part: interests are discovered, some of the epoch's batches are
trained, some validation sessions are ranked. Steps are counted exactly; their mean time and that of the ranking are
scaled. The weights of the probe are thrown away with the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from missrec_t4r.data.batching import iterate, training_batches
from missrec_t4r.evaluation.full_ranking import KEPT_WITH_HISTORY_TERM, quick_metrics
from missrec_t4r.progress import track
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.training.memory import peak_memory, total_memory
from missrec_t4r.training.trainer import Trainer

_STEPS: Final = 16
"""Batches of the probe, the first one to warm up."""
_FEWEST_STEPS: Final = 3
_SECONDS: Final = 15.0
"""After which the probe takes no further step."""
_RANKED: Final = 1024
"""Validation sessions of the probe."""
_BEST_EPOCH: Final = {"every position": 12, "random windows": 25}
"""Epochs until the best one, where a training reads every position per epoch (`default` on Amazon Scientific: 5 to 13)
and where it draws windows (`long` on MovieLens 1M: 20 and more); docs/experiments.md."""
_TERM_PASSES: Final = 12
"""What tuning the score terms takes after the last epoch, in rankings of the sessions that they are tuned on."""
_TUNED_ON: Final = 3_000
_CHECKPOINT_COPIES: Final = 6
"""Copies of the weights beside the probe's: the best ones, and the checkpoint as bytes (weights, average, moments)."""


def predict(trainer: Trainer) -> dict[str, Any]:
    """Return how long a training would take and what it would need, from a short probe.

    Parameters
    ----------
    trainer : Trainer
        Ready to train. The probe changes its weights: it must not be trained afterwards.

    Returns
    -------
    dict
        ``seconds_per_epoch``; ``minutes_at_most`` for all epochs, or until ``train.max_minutes``; ``typical_epochs``
        and ``typical_minutes`` until validation usually stops; ``peak_memory_gib`` beside ``memory_gib`` of the device;
        ``probed_steps``.
    """
    train, model = trainer.recipe.train, trainer.recipe.model
    interests_s = _seconds(lambda: trainer.refresh_interests(0))
    slots_s = _seconds(lambda: trainer.count_slots(0))
    plan = training_batches(trainer.sessions, model, train, np.random.default_rng(train.seed))
    step_s = _step_seconds(trainer, plan[:_STEPS])
    per_session = _ranking_seconds(trainer)
    epoch_s = slots_s + interests_s / train.refresh_interests_every
    epoch_s += len(plan) * float(np.mean(step_s[1:] or step_s)) + per_session * len(trainer.valid)
    has_terms = model.n_neighbours > 0 or model.n_similar_items > 0
    terms_s = per_session * min(len(trainer.all_valid), _TUNED_ON) * _TERM_PASSES if has_terms else 0.0
    until_best = _BEST_EPOCH["random windows" if train.windows_per_session else "every position"]
    typical = min(train.epochs, until_best + train.patience)
    limit = 60 * train.max_minutes or np.inf
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    copies = _CHECKPOINT_COPIES if trainer.device.type == "cpu" else 0
    return {
        "seconds_per_epoch": round(epoch_s, 2),
        "typical_epochs": typical,
        "typical_minutes": round((min(epoch_s * typical, limit) + terms_s) / 60, 2),
        "minutes_at_most": round((min(epoch_s * train.epochs, limit) + terms_s) / 60, 2),
        "peak_memory_gib": round((peak_memory(trainer.device) + copies * weights) / 2**30, 2),
        "memory_gib": round(total_memory(trainer.device) / 2**30, 1),
        "probed_steps": len(step_s),
    }


def _step_seconds(trainer: Trainer, plan: list[Any]) -> list[float]:
    """Train some batches and return the seconds of each; the order of an epoch's batches is random already."""
    trainer.model.train()
    trainer.graphed = None  # to record a step takes longer than some of the probe's steps together
    recipe, seconds = trainer.recipe, list[float]()
    started = time.perf_counter()
    for batch in track(iterate(trainer.sessions, plan, recipe.model, recipe.train), "a probe of training", len(plan)):
        before = time.perf_counter()
        float(trainer._step(batch, 0.0))  # waits for a GPU
        seconds.append(time.perf_counter() - before)
        is_enough = len(seconds) >= _FEWEST_STEPS and time.perf_counter() - started > _SECONDS
        if is_enough and trainer.world.size == 1:  # several processes take the same number of steps
            break
    return seconds


def _ranking_seconds(trainer: Trainer) -> float:
    """Rank some of the validation sessions with the averaged weights; return the seconds for each."""
    count = min(len(trainer.valid), _RANKED)
    spread = np.linspace(0, len(trainer.valid) - 1, count).astype(np.int64)  # they are sorted by length
    sessions = trainer.valid.take(spread)

    def rank() -> None:
        with trainer.average.swapped_in():
            scorer = ModelScorer.with_popularity(trainer.model, trainer.catalogue)
            quick_metrics(scorer, sessions, trainer.catalogue.n_rows, protocols=[KEPT_WITH_HISTORY_TERM])

    return _seconds(rank) / count


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
