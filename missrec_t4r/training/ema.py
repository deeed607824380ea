"""Exponentially averaged weights: what is evaluated and exported, while the raw weights go on training (ours)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Moving average of a model's parameters.

    Parameters
    ----------
    model : nn.Module
    decay : float
        Per step; 0 switches averaging off. Early steps use less, ``(1 + step) / (10 + step)``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the current weights."""
        if self.decay:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            current = [weight.detach() for _, weight in self.model.named_parameters()]
            torch._foreach_lerp_(list(self.weights.values()), current, share)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the averages of a checkpoint, whatever their order there."""
        self.weights = {name: weights[name].to(own) for name, own in self.weights.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model carry the averaged weights inside the block."""
        if not self.weights:
            yield
            return
        raw = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(raw)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, weight in self.model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])
