"""One training step's loss: the same for our trainer and for tests that compare it with other trainers."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import TrainConfig
from missrec_t4r.data.batching import TrainingBatch, iterate, trained_positions, training_batches
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.item_encoder import to_fp32
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.training.loss.chunked import ChunkedSoftmax
from missrec_t4r.training.loss.full import FullSoftmax, Softmax, TrainedPositions, candidate_rows
from missrec_t4r.training.loss.sampled import SampledSoftmax
from missrec_t4r.training.precision import autocast, matmul_dtype

LARGEST_TABLE = 1 << 26
"""Scores [position, catalogue] up to which ``softmax: auto`` keeps them all: 256 MiB, of which a step holds several."""

_EMPTY_SLOTS = 2
"""Empty slots of every set of interests that are encoded for the ``faithful`` regulariser."""
_RANDOM_BATCHES = 4
"""Random batches whose largest sets of interests are averaged."""


class Totals(NamedTuple):
    """What a step's means are taken over, for batches that are worked through in parts."""

    targets: Tensor
    """[target]: real targets in each column."""
    sessions: Tensor
    """Sessions with two interests."""


def training_loss(
    model: MISSRec,
    batch: TrainingBatch,
    train: TrainConfig,
    *,
    totals: Totals | None = None,
    softmax: Softmax | None = None,
    n_slots: int | None = None,
) -> Tensor:
    """Return the fine-tuning objective: softmax cross-entropy over the catalogue plus the weighted regulariser.

    ``train.precision`` holds for item encoder, contextual encoder and decoder; the softmax has its own for the scores.

    Parameters
    ----------
    model : MISSRec
        In training mode; the catalogue's embeddings are computed here, once.
    batch : TrainingBatch
        Of all positions for causal attention, of prefixes for bidirectional attention.
    train : TrainConfig
        Weight of the targets after the first, and precision.
    totals : Totals, optional
        Of the batch that this one is a part of: the losses of the parts add up to that of the whole. The ``faithful``
        regulariser is a sum already.
    softmax : Softmax, optional
        Over the full table by default.
    n_slots : int, optional
        To which the ``faithful`` regulariser pads the sets of interests (`slots_of_random_batches`).
    """
    softmax = FullSoftmax(matmul_dtype(train.precision, batch.item_ids.device)) if softmax is None else softmax
    all_positions = batch.targets.ndim == 3
    with autocast(train.precision, batch.item_ids.device):
        embeddings = softmax.embed(model, batch.item_ids, batch.targets)
        encoded = model.encode(
            batch.item_ids,
            items=embeddings.items,
            last_only=not all_positions,
            event_features=batch.event_features,
            empty_slots=0 if n_slots is None else _EMPTY_SLOTS,
            n_interests=batch.n_interests,
        )
    vectors, history, targets = to_fp32(encoded.vectors), batch.item_ids, batch.targets
    if all_positions:
        session, step = trained_positions(targets) if batch.positions is None else batch.positions
        vectors, targets = vectors[session, step], targets[session, step]
        visible = torch.arange(history.shape[1], device=history.device) <= step.unsqueeze(1)
        history = history[session] * visible
    weights = torch.full((targets.shape[1],), train.next_items_weight, device=vectors.device, dtype=vectors.dtype)
    weights[:1] = 1.0  # to one element, CUDA copies the number and waits
    counts, sessions = (None, None) if totals is None else totals
    loss = softmax.loss(model, embeddings, TrainedPositions(vectors, history, targets, weights, counts))
    if not model.config.has_interests:
        return loss
    memory, mask = to_fp32(encoded.memory), encoded.interests.mask
    slots: int | Tensor | None = batch.slots
    if n_slots is not None and slots is None:
        slots = slots_counted(mask.shape[1], n_slots)
    regulariser = orthogonality_loss(
        memory, mask, model.config.orthogonality, sessions=sessions, n_slots=slots, expected=n_slots is not None
    )
    return loss + model.config.orthogonality_weight * regulariser


def with_interests_counted(
    batch: TrainingBatch, model: MISSRec, assignment: Tensor, n_slots: int | None
) -> TrainingBatch:
    """Return a batch on the host with the number of its interests' slots, which `training_loss` then need not read.

    Parameters
    ----------
    batch : TrainingBatch
    model : MISSRec
    assignment : Tensor [modality, row]
        The model's ``interests.assignment``, on the host.
    n_slots : int, optional
        As `training_loss` gets it.
    """
    width = model.interests.width(batch.item_ids, 0 if n_slots is None else _EMPTY_SLOTS, assignment)
    if model.config.orthogonality == "faithful":
        batch = batch._replace(slots=torch.tensor(slots_counted(width, n_slots)))
    return batch._replace(n_interests=width)


def slots_counted(width: int, n_slots: int | None) -> int:
    """Return the slots that the ``faithful`` regulariser counts in a batch whose interests have ``width`` of them."""
    return width if n_slots is None else max(n_slots, width - _EMPTY_SLOTS)


def batch_totals(model: MISSRec, batch: TrainingBatch) -> Totals:
    """Count what the means of a whole batch are taken over."""
    real = (batch.targets > 0) & candidate_rows(model)[batch.targets]
    interest = model.interests.assignment[:, batch.item_ids].transpose(0, 1).flatten(1)
    lowest = interest.masked_fill(interest == 0, len(model.interests.centroids)).amin(1)
    return Totals(real.flatten(0, -2).sum(0), (lowest < interest.amax(1)).sum())


def slots_of_random_batches(model: MISSRec, sessions: Sessions, train: TrainConfig, epoch: int) -> int | None:
    """Return to how many slots the ``faithful`` regulariser pads where batches are of similar length, None otherwise.

    The published batches are of random prefixes, and every set of interests is padded to the largest of its batch:
    about the same number of slots for all sessions. Batches of similar length would make it another regulariser.

    Parameters
    ----------
    model : MISSRec
        With interests.
    sessions : Sessions
        Training sessions.
    train : TrainConfig
    epoch : int
        Other random batches in every epoch.
    """
    if model.config.orthogonality != "faithful" or not train.group_by_length:
        return None
    rng = np.random.default_rng([train.seed, epoch])
    plan = training_batches(sessions, model.config, replace(train, group_by_length=False), rng)[:_RANDOM_BATCHES]
    batches = iterate(sessions, plan, model.config, train)
    device = model.interests.assignment.device
    widths = [model.interests(batch.item_ids.to(device)).mask.shape[1] for batch in batches]
    return round(sum(widths) / max(len(widths), 1))


def choose_softmax(train: TrainConfig, n_rows: int, positions: int, frequency: Tensor, device: torch.device) -> Softmax:
    """Return the softmax that the settings select.

    Parameters
    ----------
    train : TrainConfig
    n_rows : int
        Rows of the catalogue.
    positions : int
        Trained positions that are worked through at once.
    frequency : Tensor [row]
        How often a row is a target in training.
    device : torch.device
        Where it is computed: what precision ``auto`` means depends on it.
    """
    if train.softmax == "sampled":
        return SampledSoftmax(frequency, train.negatives)
    if train.softmax == "chunked" or (train.softmax == "auto" and positions * n_rows > LARGEST_TABLE):
        return ChunkedSoftmax(train.chunk_size)
    return FullSoftmax(matmul_dtype(train.precision, device))
