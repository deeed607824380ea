"""The faithful regulariser without padding: the same number as with it, or the same mean under dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.release.seeds import EMPTY, padded_regulariser
from missrec_t4r.config import TrainConfig
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.training.step import slots_of_random_batches, training_loss
from tests import shop

DIM, PLACES = 6, 9


def memories(real: list[int], empty: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a part's memory, with ``EMPTY`` slots more than its largest set, and its mask."""
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


def test_empty_slots_that_differ_count_in_expectation() -> None:
    """Every slot has its own dropout: seven slots have the mean that is computed from two."""
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


def step(sessions: list[list[str]], places: int | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a training step of the published model, with a loss of the regulariser alone."""
    net = shop.model(shop.paper(dropout=0.0, orthogonality_weight=1e4)).train()
    net.discover_interests(seed=0)
    batch = TrainingBatch(shop.batch(sessions), shop.targets()[: len(sessions), None])
    loss = training_loss(net, batch, TrainConfig.paper(), n_slots=places)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def test_short_sessions_are_regularised_as_in_a_batch_with_a_long_one() -> None:
    """A batch of similar length gives what its sessions would give in the batch of all, padded to its largest set."""
    short, whole = shop.SESSIONS[:3], shop.batch(shop.SESSIONS)
    net = shop.model(shop.paper()).eval()
    net.discover_interests(seed=0)
    padded = net.interests(whole)
    places = padded.mask.shape[1]
    assert places > net.interests(shop.batch(short)).mask.shape[1]
    wanted = orthogonality_loss(net.encoder(padded)[:3], padded.mask[:3], "faithful").item()
    own = net.interests(shop.batch(short))
    alone = orthogonality_loss(net.encoder(own), own.mask, "faithful").item()
    asked = net.interests(shop.batch(short), 2)
    found = orthogonality_loss(net.encoder(asked), asked.mask, "faithful", n_slots=places).item()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert alone != pytest.approx(wanted, rel=0.03)


def test_a_training_step_uses_the_given_number_of_slots() -> None:
    short = shop.SESSIONS[:3]
    (few, _), (many, gradients), (padded, wanted) = step(short, 8), step(short, 30), step(short, None)
    assert len({round(few, 3), round(many, 3), round(padded, 3)}) == 3
    assert gradients.keys() == wanted.keys()


def test_the_number_of_slots_is_that_of_random_batches() -> None:
    net = shop.model(shop.paper())
    net.discover_interests(seed=0)
    sessions = Sessions.from_lists([shop.rows(session) for session in shop.SESSIONS])
    found = slots_of_random_batches(net, sessions, TrainConfig.paper(batch_size=100), epoch=0)
    assert found == net.interests(shop.batch([session[:-1] for session in shop.SESSIONS])).mask.shape[1]
    assert slots_of_random_batches(net, sessions, TrainConfig.paper(group_by_length=False), epoch=0) is None
    assert slots_of_random_batches(shop.model(shop.default()), sessions, TrainConfig.paper(), epoch=0) is None
