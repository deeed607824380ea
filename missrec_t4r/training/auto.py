"""The recipe ``auto``: a shipped recipe and its sizes, chosen for a data folder and a device by a few rules.

| where | what it sets | reason (docs/experiments.md) |
|---|---|---|
| the median session has fewer than 50 events | `default` as it is | more width brought nothing there |
| others | `long` as it is | its settings are those that MovieLens 1M was measured with |
| others, 500,000 events and more, on a GPU | twice the width of `long` | .1959 NDCG@10 on MovieLens 1M (dropout .3) |
| 200,000 items and more (a GPU: 2 million) | sampled softmax | an exact step over a million items takes 78 s |
| a step takes over a quarter of the memory | the batch in parts | the step stays that of the whole batch |

The rules read lengths, sizes and the device, never the load of the machine, and set no time limit: the same data on the
same kind of machine give the same recipe. A run stores the chosen values, not the rules.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from missrec_t4r.config import Recipe
from missrec_t4r.config.recipe import AUTO
from missrec_t4r.config.training import Precision
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.training import distributed
from missrec_t4r.training.memory import total_memory
from missrec_t4r.training.precision import resolve_precision
from missrec_t4r.training.step import LARGEST_TABLE

log = logging.getLogger(__name__)

LONG_SESSIONS: Final = 50
"""Median events from which sessions are long: half of them fill the window of `default`."""
_MANY_EVENTS: Final = 500_000
"""Training events from which the larger model of a GPU has enough to learn from."""
_LARGE_CATALOGUE: Final = {"cpu": 200_000, "cuda": 2_000_000}
"""Items from which the softmax is sampled; the second figure is scaled from a CPU's, not measured."""
_ON_GPU: Final = {
    "model.d_model": 256,
    "model.d_feedforward": 512,
    "train.learning_rate": 0.001,
    "train.patience": 12,
}
"""On top of `long`: the sizes that an H200 trained on MovieLens 1M in seven minutes (interests, a dropout of .3)."""
_FOR_LARGE_CATALOGUES: Final = {
    "model.n_neighbours": 32,
    "model.n_similar_items": 0,
    "train.softmax": "sampled",
    "train.validation_sessions": 2000,
}
"""docs/howto/train.md, "Large catalogues"."""
_MOST_PARTS: Final = 16


class Facts(NamedTuple):
    """What the rules read."""

    sessions: int
    events: int
    median: int
    """Events of the session in the middle, of those with at least two."""
    ninetieth: int
    """Events that nine of ten sessions do not exceed."""
    items: int
    coverage: Mapping[str, float]
    """Share of the items that have each modality."""
    device: str
    """``cpu`` or ``cuda``."""
    memory: int
    """Bytes (`total_memory`)."""
    precision: Precision = "fp32"
    """What ``auto`` stands for on the device."""


class Choice(NamedTuple):
    """The chosen recipe and the reasons for it."""

    recipe: Recipe
    base: str
    """Shipped recipe whose other values were taken."""
    changes: Mapping[str, Any]
    """What the rules set on top of it."""
    reasons: tuple[str, str, str]
    """What was read; architecture; training."""


def choose(data: str | Path, settings: Mapping[str, Any] | None = None, device: str = "auto") -> Choice:
    """Choose a recipe for a data folder and say why, in three lines of the log.

    Parameters
    ----------
    data : path
        Folder written by ``missrec etl``.
    settings : mapping, optional
        Settings that win over what is chosen, such as ``{"train.epochs": 3}``.
    device : str
        auto, cpu or cuda.
    """
    choice = by_rules(read_facts(Path(data), device), settings)
    if distributed.launched().rank == 0:
        for reason in choice.reasons:
            log.info(f"recipe {AUTO}: {reason}")
    return choice


def read_facts(data: Path, device: str = "auto") -> Facts:
    """Read what the rules depend on from a data folder and a device."""
    catalogue, lengths = Catalogue.load(data / CATALOGUE_FOLDER), Sessions.load(data / "train", []).known().lengths
    lengths = lengths[lengths >= 2]
    median, ninetieth = np.quantile(lengths, [0.5, 0.9]) if len(lengths) else (0, 0)
    where = distributed.own_device(device)
    return Facts(
        sessions=len(lengths),
        events=int(lengths.sum()),
        median=int(median),
        ninetieth=int(ninetieth),
        items=catalogue.n_items,
        coverage={
            name: float(modality.present.sum()) / max(catalogue.n_items, 1)
            for name, modality in catalogue.modalities.items()
        },
        device=where.type,
        memory=total_memory(where),
        precision=resolve_precision("auto", where),
    )


def by_rules(facts: Facts, settings: Mapping[str, Any] | None = None) -> Choice:
    """Return the recipe that the rules choose; ``settings`` win over them."""
    is_long = facts.median >= LONG_SESSIONS
    is_larger = is_long and facts.events >= _MANY_EVENTS and facts.device == "cuda"
    base = "long" if is_long else "default"
    changes: dict[str, Any] = dict(_ON_GPU) if is_larger else {}
    if facts.items >= _LARGE_CATALOGUE[facts.device]:
        changes |= _FOR_LARGE_CATALOGUES
        if facts.device == "cpu":
            changes["train.ema_decay"] = 0.0
    parts = _parts(Recipe.load(base, changes), facts)
    if parts > 1:
        changes["train.accumulate"] = parts
    recipe = dataclasses.replace(Recipe.load(base, {**changes, **(settings or {})}), name=AUTO)
    return Choice(recipe, base, changes, _reasons(facts, base, is_larger, recipe, settings or {}))


def _parts(recipe: Recipe, facts: Facts) -> int:
    """Return into how many parts a batch is split so that scores and activations take a quarter of the memory."""
    parts = 1
    while parts < _MOST_PARTS and _step_bytes(recipe, facts.items, parts) > facts.memory / 4:
        parts *= 2
    return parts


def _step_bytes(recipe: Recipe, n_items: int, parts: int) -> int:
    """Return about how many bytes a part of a step needs beside the weights: scores, and what the layers keep."""
    model, train = recipe.model, recipe.train
    positions = max(train.batch_size // parts, 1)
    candidates = train.negatives if train.softmax == "sampled" else min(n_items, LARGEST_TABLE // positions)
    per_layer = 12 * model.d_model + 2 * model.d_feedforward + 3 * model.n_head * model.max_sequence_length
    return 4 * positions * (3 * candidates + model.n_decoder_layers * per_layer)


def _reasons(
    facts: Facts, base: str, is_larger: bool, recipe: Recipe, settings: Mapping[str, Any]
) -> tuple[str, str, str]:
    model, train = recipe.model, recipe.train
    modalities = ", ".join(f"{name} {share:.0%}" for name, share in facts.coverage.items()) or "no modality"
    read = (
        f"{facts.sessions:,} training sessions (median {facts.median} events, nine of ten up to {facts.ninetieth}), "
        f"{facts.items:,} items ({modalities}), {facts.device} with {facts.memory / 2**30:.1f} GiB"
    )
    if is_larger:
        why = "sessions are long and many, and a GPU is there: twice the width of long"
    elif base == "long":
        why = f"sessions are long (a median of {LONG_SESSIONS} or more), as those that long was measured with"
    else:
        why = f"sessions are short (a median below {LONG_SESSIONS}): more width brought nothing there"
    layers = f"{model.n_decoder_layers} decoder layer{'s' if model.n_decoder_layers > 1 else ''}"
    shape = f"{base}: width {model.d_model}, {layers}, {model.max_sequence_length} events read; {why}"
    batch = f"{train.batch_size:,} positions" + (f" in {train.accumulate} parts" if train.accumulate > 1 else "")
    softmax = "sampled" if train.softmax == "sampled" else "exact"
    precision = facts.precision if train.precision == "auto" else train.precision
    limit = f"{train.max_minutes:g} minutes" if train.max_minutes else "no time limit"
    given = "; set: " + ", ".join(f"{name}={value}" for name, value in settings.items()) if settings else ""
    training = (
        f"{softmax} softmax, steps of {batch} in {precision}; ends after {train.patience} epochs without a gain "
        f"or after {train.epochs}, {limit}{given}"
    )
    return read, shape, training
