"""The regulariser of the authors' release without its padding: the same number, or the same mean under dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.release.seeds import EMPTY, padded_regulariser
from missrec_t4r.model.objectives import orthogonality_loss

DIM, PLACES = 6, 9


def memories(real: list[int], empty: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a part's memory, ``EMPTY`` places more than its largest set, and its mask."""
    width = max(real) + EMPTY
    mask = torch.arange(width) < torch.tensor(real)[:, None]
    values = torch.randn(len(real), width, DIM, generator=generator)
    return torch.where(mask.unsqueeze(-1), values, empty[:, None]), mask


def padded(memory: Tensor, mask: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same sets padded to the batch's largest, as the release pads them."""
    missing = PLACES - memory.shape[1]
    memory = torch.cat([memory, empty[:, None].expand(-1, max(missing, 0), -1)], 1)[:, :PLACES]
    return memory, torch.nn.functional.pad(mask, (0, max(missing, 0)))[:, :PLACES]


def test_parts_without_padding_give_the_padded_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, whole = [], []
    for real in ([1, 2], [4, 3, 2], [PLACES, 5]):
        empty = torch.randn(len(real), DIM, generator=generator)
        part = memories(real, empty, generator)
        parts.append(part)
        whole.append(padded(*part, empty))
    wanted = orthogonality_loss(*(torch.cat(x) for x in zip(*whole, strict=True)), "faithful")
    assert padded_regulariser(parts).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_empty_places_that_differ_count_in_expectation() -> None:
    """Every place draws its own dropout: seven of them have the mean that is computed from two."""
    generator = torch.Generator().manual_seed(1)
    real, n = 2, 20_000
    inside = torch.randn(1, real, DIM, generator=generator).expand(n, -1, -1)
    empty = torch.randn(1, DIM, generator=generator) + torch.randn(n, PLACES - real, DIM, generator=generator)
    mask = (torch.arange(PLACES) < real).expand(n, -1)
    wanted = orthogonality_loss(torch.cat([inside, empty], 1), mask, "faithful")
    few = (torch.cat([inside, empty[:, :EMPTY]], 1), mask[:, : real + EMPTY])
    largest = (torch.zeros(1, PLACES + EMPTY, DIM), torch.ones(1, PLACES + EMPTY, dtype=torch.bool))
    largest[1][:, PLACES:] = False
    found = padded_regulariser([few, largest])
    assert found.item() == pytest.approx(wanted.item(), rel=0.03)
