"""One training step's loss: the same for our trainer and for tests that compare it with other trainers."""

from __future__ import annotations

import torch
from torch import Tensor

from missrec_t4r.config import TrainConfig
from missrec_t4r.data.batches import TrainingBatch
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.objectives import next_item_loss, orthogonality_loss


def training_loss(model: MISSRec, batch: TrainingBatch, train: TrainConfig) -> Tensor:
    """Return the fine-tuning objective: full-softmax cross-entropy plus the weighted regulariser (specification 7).

    Parameters
    ----------
    model : MISSRec
        In training mode; its catalogue tokens are computed here, once.
    batch : TrainingBatch
        Of all positions for causal attention, of prefixes for bidirectional attention.
    train : TrainConfig
        Weight of the targets after the first.
    """
    catalogue = model.towers.catalogue()
    all_positions = batch.targets.ndim == 3
    encoded = model.encode(batch.item_ids, catalogue=catalogue, last_only=not all_positions, side=batch.side)
    vectors, history, targets = encoded.vectors, batch.item_ids, batch.targets
    if all_positions:
        session, step = torch.nonzero(targets[..., 0], as_tuple=True)
        vectors, targets = vectors[session, step], targets[session, step]
        visible = torch.arange(history.shape[1], device=history.device) <= step.unsqueeze(1)
        history = history[session] * visible
    logits = model.score(vectors, model.towers.candidates(catalogue), history).div_(model.config.temperature)
    weights = torch.full((targets.shape[1],), train.next_items_weight, device=logits.device, dtype=logits.dtype)
    weights[0] = 1.0
    loss = next_item_loss(logits, targets, weights, overwrite=True)
    regulariser = orthogonality_loss(encoded.memory, encoded.interests.mask, model.config.orthogonality)
    return loss + model.config.orthogonality_weight * regulariser
