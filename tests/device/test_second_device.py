"""The stand-in: what raises on CUDA raises on it, also in modules and the backward pass; what works there works."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.device.second_device import WrongDevice, second_device


@pytest.fixture(autouse=True)
def two_devices() -> Iterator[None]:
    with second_device():
        yield


def _there(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


def _assigned(target: Tensor, at: Any, values: Tensor) -> Tensor:
    target[at] = values
    return target


class _Doubled(torch.autograd.Function):
    """Its backward pass multiplies by a tensor of the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.tensor([2.0, 2.0, 2.0])


REFUSED: dict[str, Callable[[], object]] = {
    "a sum": lambda: _there(3) + torch.ones(3),
    "item-kNN at 10bf1f3": lambda: _assigned(
        torch.zeros(4, 4, dtype=torch.int32, device="cuda"), torch.from_numpy(np.array([1, 2])), torch.ones(2).int()
    ),
    "rows from numpy": lambda: nn.Embedding(4, 2).to("cuda")(torch.from_numpy(np.array([1, 2]))),
    "a mask": lambda: _there(3).masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "an index on the GPU": lambda: torch.ones(3)[torch.tensor([1]).to("cuda")],
    "a module": lambda: nn.TransformerEncoderLayer(4, 1, 4, batch_first=True).cuda()(torch.ones(1, 2, 4)),
    "a new tensor": lambda: _there(2, 3).gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "numpy": lambda: _there(3).numpy(),
    "numpy, implicitly": lambda: np.asarray(_there(3)),
    "a generator of the CPU": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a permutation": lambda: torch.randperm(3, device="cuda", generator=torch.Generator()),
    "a copy of the module": lambda: copy.deepcopy(nn.Linear(2, 2).to("cuda"))(torch.ones(1, 2)),
    "a sparse product": lambda: torch.sparse_coo_tensor([[0], [1]], [1.0], (2, 2)).to("cuda") @ torch.ones(2, 2),
    "the backward pass": lambda: _Doubled.apply(_there(3).requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_are_refused(name: str) -> None:
    with pytest.raises(WrongDevice):
        REFUSED[name]()


def test_what_cuda_allows_is_allowed() -> None:
    there = torch.arange(6, device="cuda").view(2, 3).float()
    assert there[torch.tensor([1])].tolist() == [[3, 4, 5]]  # indices of the CPU
    assert (there * torch.tensor(2.0)).device.type == "cuda"  # a number
    assert there.cpu().numpy().sum() == there.numpy(force=True).sum() == 15
    assert torch.zeros(6).copy_(there.flatten()).device.type == "cpu"
    assert torch.ones(3).to(there).device == there.device
    assert there.new_zeros(2).device == torch.zeros_like(there).device == there[0].device == there.device


def test_a_model_trains_on_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 1)
    ).to("cuda")
    optimiser = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for _ in range(5):
        loss = model(torch.tensor([[1, 2, 3]]).to("cuda")).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    states = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
    assert {part.device.type for part in [*model.parameters(), *states]} == {"cuda"}
