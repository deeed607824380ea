"""Optimiser, learning-rate schedule and averaged weights (EMA) of a training run.

AdamW over all weights, gradient clipping, loss scaling for fp16, and torch's SparseAdam for a large ID table under the
sampled softmax. Not from torch, with the reasons:

* `AveragedWeights` instead of ``swa_utils.AveragedModel``: that one deep-copies the whole module, the catalogue's
  modality vectors included; here only the parameters are copied.
* `learning_rate` instead of ``lr_scheduler``: the cosine runs over the share of epochs, and the number of steps differs
  from epoch to epoch; a function of step and share has no state to save and to restore.
* `_clip` instead of ``clip_grad_norm_``, which does not support sparse gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from missrec_t4r.config import TrainConfig
from missrec_t4r.training import distributed


class Optimiser:
    """AdamW over all weights, except tables with sparse gradients, which SparseAdam updates.

    Adam updates every row of a table at every step. For a table of a million rows, of which a step touches ten
    thousand, that is four tables read and three written; SparseAdam updates the touched rows alone. This is another
    optimiser (lazy Adam), without weight decay; it is used with the sampled softmax only.

    Parameters
    ----------
    model : nn.Module
    train : TrainConfig
    sparse : set of Tensor
        Weights whose gradients are sparse.
    device : torch.device
    graphed : bool
        Keep the learning rate on the device, where a step that is recorded as a CUDA graph reads it anew.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        sparse: frozenset[Tensor],
        device: torch.device,
        *,
        graphed: bool = False,
    ) -> None:
        self.train, self.weights, self.sparse, self.rate = train, list(model.parameters()), sparse, 0.0
        self._rate = torch.zeros((), device=device) if graphed else None
        dense = [weight for weight in self.weights if weight not in sparse]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(dense, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
        ]
        if sparse:
            tables = [weight for weight in self.weights if weight in sparse]  # a set's order changes from run to run
            self.optimizers.append(torch.optim.SparseAdam(tables, lr=train.learning_rate))
        self.scaler = torch.amp.GradScaler() if train.precision == "fp16" and device.type == "cuda" else None

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss; under fp16 the loss is scaled against underflow."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the steps that follow."""
        self.rate = rate
        value = rate if self._rate is None else self._rate.fill_(rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = value

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Tell AdamW that the step inside is recorded as a CUDA graph; told so always, it would warn of all others."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return the weights and, by name, their moments and step counts: the very tensors that `update` changes."""
        tensors: dict[str, list[Tensor]] = {"weight": [weight.detach() for weight in self.weights]}
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for name, tensor in state.items():
                    tensors.setdefault(name, []).append(tensor)
        return tensors

    def step(self, rate: float) -> None:
        """Sum the gradients over the processes, clip them and update the weights at learning rate ``rate``."""
        self.set_rate(rate)
        self.update()

    def update(self) -> None:
        """Take the step at the rate that was set."""
        distributed.sum_gradients(self.weights, self.sparse)
        for optimizer in self.optimizers:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
        if self.train.clip_norm:
            _clip(self.weights, self.train.clip_norm)
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def state(self) -> dict[str, Tensor]:
        """Return moments, step counts and loss scale as named tensors, for safetensors."""
        tensors = {
            f"{number}.{index}.{key}": torch.as_tensor(value)
            for number, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        if self.scaler is not None:
            tensors |= {f"scaler.{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `state` returned."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if number == "scaler":
                continue
            # SparseAdam counts steps in a Python number, AdamW in a tensor
            is_number = isinstance(self.optimizers[int(number)], torch.optim.SparseAdam) and key == "step"
            states[int(number)]["state"].setdefault(int(index), {})[key] = int(tensor) if is_number else tensor
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
        if self.scaler is not None:
            named = {name.removeprefix("scaler."): t.item() for name, t in tensors.items() if name.startswith("scaler")}
            self.scaler.load_state_dict(named)


def _clip(weights: list[nn.Parameter], limit: float) -> None:
    """Scale all gradients, sparse ones too, so that their joint norm is at most ``limit``."""
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


class AveragedWeights:
    """Exponential moving average (EMA) of a model's parameters, which is evaluated and exported; ours.

        average += (1 - min(decay, (1 + step) / (10 + step))) * (weights - average)

    Parameters
    ----------
    model : nn.Module
    decay : float
        Decay per step; 0 switches averaging off.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the current weights."""
        if self.decay:
            share = 1 - min(self.decay, (1 + step) / (10 + step))
            current = [weight.detach() for _, weight in self.model.named_parameters()]
            torch._foreach_lerp_(list(self.weights.values()), current, share)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Restore the averages of a checkpoint."""
        self.weights = {name: weights[name].to(own) for name, own in self.weights.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replace the model's weights by the averages inside the block."""
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


def learning_rate(train: TrainConfig, step: int, share: float) -> float:
    """Return the learning rate of a step: linear warm-up, then constant (as published) or a cosine down to zero.

    Parameters
    ----------
    train : TrainConfig
    step : int
        Number of the step, from 1.
    share : float
        Share of ``train.epochs`` that was trained before the step, in [0, 1]. Early stopping ends a cosine early, so
        set ``epochs`` to the number that the run shall last.

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
