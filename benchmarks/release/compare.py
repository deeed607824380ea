"""Compare the `paper` configuration with the authors' release: loss and gradients of the same batch.

    python -m benchmarks.release.compare --release path/to/MM23-MISSRec --data path/to/amazon_scientific

The release's weights are copied into ours, dropout is off, interests are shared. Then the loss of one batch of prefixes
and every gradient are compared, in double precision (equal formulas) and in single precision (equal training),
for the published setting and its variants: sequence and candidate fusions, with and without item IDs, one modality.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import parity_data
from benchmarks.measure import report, run_as_command
from benchmarks.release.loading import (
    copy_interests,
    copy_weights,
    release_model,
    release_rows,
    require_release,
    shared_part,
    weight_pairs,
)
from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import TrainingBatch, collate, prefix_examples
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.training.step import training_loss

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "static candidates": {"candidate_fusion": "static"},
    "phi per item": {"candidate_fusion": "dynamic_instance"},
    "inductive": {"item_ids": False},
    "contextual": {"sequence_fusion": "contextual"},
    "text only": {"modalities": ["text"]},
    "image only, inductive": {"modalities": ["image"], "item_ids": False},
    "two layers each": {"n_encoder_layers": 2, "n_decoder_layers": 2},
}
TOLERANCE = 1e-4


def main() -> None:
    """Compare every variant, write the result, and fail if one differs."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--release", type=Path, required=True, help="checkout of gimpong/MM23-MISSRec")
    options.add_argument("--data", type=Path, help="data folder; a generated shop of the same size without")
    options.add_argument("--batch", type=int, default=128, help="prefixes")
    chosen = options.parse_args()
    require_release(chosen.release)
    catalogue, train, _ = parity_data.load(chosen.data)
    found = {
        name: {
            precision: compare(chosen.release, catalogue, train, dict(settings), chosen.batch, dtype)
            for precision, dtype in (("float64", torch.float64), ("float32", torch.float32))
        }
        for name, settings in VARIANTS.items()
    }
    worst = max(max(part["loss"], part["gradient"]) for both in found.values() for part in both.values())
    report(
        "release-same-mathematics",
        {
            "data": chosen.data.name if chosen.data else "generated",
            "batch": chosen.batch,
            "differences": found,
            "largest_difference": worst,
            "tolerance": TOLERANCE,
            "same": worst <= TOLERANCE,
        },
    )
    if worst > TOLERANCE:
        raise SystemExit(f"loss or gradients differ by {worst:.1e}; expected: at most {TOLERANCE}")


def compare(
    path: Path, catalogue: Catalogue, train: Sessions, settings: dict[str, Any], size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the relative differences of loss and gradients of one batch.

    Returns
    -------
    dict
        ``loss``: both losses' relative difference. ``gradient``: the largest difference of a gradient, divided by the
        largest gradient of its tensor, and the ``tensor`` where that is. ``cosine``: the smallest of any tensor.
    """
    kept = settings.pop("modalities", list(catalogue.modalities))
    catalogue = dataclasses.replace(catalogue, modalities={name: catalogue.modalities[name] for name in kept})
    config = MISSRecConfig.paper(**{"dropout": 0.0, **settings})
    torch.manual_seed(0)
    theirs = release_model(path, catalogue, config)
    ours = build_missrec(config, catalogue)
    copy_weights(theirs, ours)
    if ours.fusion.phi is not None and len(kept) > 1:  # away from 0, where the fusion would be the plain mean
        with torch.no_grad():
            ours.fusion.phi.fill_(1.5)
            theirs.fusion_factor.fill_(1.5)
    ours.to(dtype).train(), theirs.to(dtype).train()
    ours.discover_interests(seed=0)
    copy_interests(ours, theirs)
    batch = sample(train, config, size)
    our_loss = training_loss(ours, batch, TrainConfig.paper())
    their_loss = theirs.calculate_loss(interaction(batch, config.max_sequence_length))
    our_loss.backward(), their_loss.backward()
    return {
        "our_loss": our_loss.item(),
        "release_loss": their_loss.item(),
        "loss": abs(our_loss.item() - their_loss.item()) / abs(their_loss.item()),
        **_gradients(ours, theirs),
    }


def sample(train: Sessions, config: MISSRecConfig, size: int) -> TrainingBatch:
    """Draw a batch of prefixes of mixed lengths."""
    rng = np.random.default_rng(0)
    examples = prefix_examples(train, config.max_sequence_length, 0, rng)
    rows = rng.permutation(len(examples.begin))[:size]
    return collate(train, type(examples)(*(part[rows] for part in examples)), 1, all_positions=False, backwards=False)


def interaction(batch: TrainingBatch, width: int) -> dict[str, Tensor]:
    """Return a batch as the release's model takes it, padded to ``width``."""
    item_ids = torch.nn.functional.pad(batch.item_ids, (0, max(width - batch.item_ids.shape[1], 0)))
    return {
        "item_id_list": release_rows(item_ids),
        "item_length": (batch.item_ids > 0).sum(1),
        "item_id": release_rows(batch.targets[:, 0]),
    }


def _gradients(ours: MISSRec, theirs: Any) -> dict[str, Any]:
    """Compare all gradients but those of the keys' biases, which cancel in the softmax and are rounding errors."""
    worst, where, cosine = 0.0, "", 1.0
    for name, (weight, other, rows) in weight_pairs(ours, theirs).items():
        if name.endswith("key.bias"):
            continue
        assert weight.grad is not None
        assert other.grad is not None, name
        left, right = shared_part(name, weight.grad), other.grad[rows] if other.grad.ndim else other.grad
        for one, two in _parts(name, left.double(), right.double().reshape(left.shape)):
            difference = float((one - two).abs().max() / two.abs().max().clamp_min(1e-300))
            if difference > worst:
                worst, where = difference, name
            cosine = min(cosine, float(torch.cosine_similarity(one.flatten(), two.flatten(), 0)))
    return {"gradient": worst, "tensor": where, "cosine": cosine}


def _parts(name: str, left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The padding's ID is zero, where normalising gives gradients of 1e12: compared separately."""
    if name == "item_encoder.id_embedding.weight":
        return [(left[:1], right[:1]), (left[1:], right[1:])] if bool(right[0].any()) else [(left[1:], right[1:])]
    return [(left, right)]


if __name__ == "__main__":
    run_as_command(main)
