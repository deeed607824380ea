"""The optimiser of a run: AdamW, loss scaling for fp16, clipping, and Adam by rows for a large table of IDs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from missrec_t4r.config import TrainConfig
from missrec_t4r.training import distributed


class Optimiser:
    """AdamW over all weights; those of ``by_rows`` get Adam for the rows that a step touched (torch's SparseAdam).

    Adam moves every row at every step by its running mean. For a table of a million rows, of which a step touches ten
    thousand, that is four tables read and three written; by rows, a row rests until its next gradient. This is another
    optimiser (lazy Adam), without weight decay, and only the sampled softmax uses it.

    Parameters
    ----------
    model : nn.Module
    train : TrainConfig
    by_rows : set of Tensor
        Tables whose gradients are sparse.
    device : torch.device
    """

    def __init__(self, model: nn.Module, train: TrainConfig, by_rows: frozenset[Tensor], device: torch.device) -> None:
        self.train, self.weights, self.rate = train, list(model.parameters()), 0.0
        whole = [weight for weight in self.weights if weight not in by_rows]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(whole, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
        ]
        if by_rows:
            self.parts.append(torch.optim.SparseAdam(list(by_rows), lr=train.learning_rate))
        self.scaler = _scaler() if train.precision == "fp16" and device.type == "cuda" else None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients; under fp16 scaled, so that small ones survive."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, rate: float) -> None:
        """Sum the gradients over the processes, clip them and move the weights at this learning rate."""
        self.rate = rate
        distributed.sum_gradients(self.weights)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            if self.scaler is not None:
                self.scaler.unscale_(part)
        if self.train.clip_norm:
            _clip(self.weights, self.train.clip_norm)
        for part in self.parts:
            if self.scaler is None:
                part.step()
            else:
                self.scaler.step(part)
        if self.scaler is not None:
            self.scaler.update()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, by name."""
        tensors = {
            f"{number}.{index}.{key}": torch.as_tensor(value)
            for number, part in enumerate(self.parts)
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }
        if self.scaler is not None:
            tensors |= {f"scaler.{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` returned."""
        states = [part.state_dict() for part in self.parts]
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if number == "scaler":
                continue
            lazy = isinstance(self.parts[int(number)], torch.optim.SparseAdam) and key == "step"
            states[int(number)]["state"].setdefault(int(index), {})[key] = int(tensor) if lazy else tensor
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)
        if self.scaler is not None:
            named = {name.removeprefix("scaler."): t.item() for name, t in tensors.items() if name.startswith("scaler")}
            self.scaler.load_state_dict(named)


def _scaler() -> Any:
    """Return the scaler of losses; torch moved it in 2.3."""
    return getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)()


def _clip(weights: list[nn.Parameter], limit: float) -> None:
    """Scale the gradients down together, so that their norm is at most ``limit``."""
    values = []
    for weight in weights:
        if weight.grad is not None and weight.grad.is_sparse:
            weight.grad = weight.grad.coalesce()
            values.append(weight.grad.values())
        elif weight.grad is not None:
            values.append(weight.grad)
    factor = (limit / (torch.stack([value.norm() for value in values]).norm() + 1e-6)).clamp_max(1.0)
    for value in values:
        value.mul_(factor)


# Exponentially averaged weights: what is evaluated and exported, while the raw weights go on training (ours)


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


# Learning rate of a step: a linear warm-up, then constant as published or down to zero along a cosine


def learning_rate(train: TrainConfig, step: int, share: float) -> float:
    """Return the step's learning rate.

    Parameters
    ----------
    train : TrainConfig
    step : int
        Steps taken, this one included.
    share : float
        Share of the ``epochs`` that was trained before the step, in [0, 1]. Early stopping ends a cosine early: give it
        the number of epochs that the run is meant to last.

    Examples
    --------
    >>> cosine = TrainConfig(schedule="cosine", warmup_steps=4)
    >>> [round(learning_rate(cosine, step, share), 6) for step, share in [(1, 0.0), (4, 0.0), (9, 0.5), (17, 1.0)]]
    [0.00025, 0.001, 0.0005, 0.0]
    """
    rate = train.learning_rate * min(1.0, step / max(train.warmup_steps, 1))
    if train.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return rate
