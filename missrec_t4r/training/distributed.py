"""Several processes under torchrun: parts of every batch, summed gradients, rows gathered with their gradients.

Every process plans the same batches, works through its part of each and adds its gradients to the others' before the
optimiser steps, so all hold the same weights. A loss is a sum over a process's own rows divided by the counts of the
whole batch: gradients are summed, never averaged, and equal those of one process that sees the whole batch. Ours in
place of torch's DistributedDataParallel, which wants a forward for all of it, averages, and knows no unused weights.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = datetime.timedelta(hours=4)
"""How long a process waits for another: the first ranks the validation sessions while the others wait."""


class World(NamedTuple):
    """One process among those of the run."""

    rank: int = 0
    """0 writes; the others keep silent."""
    size: int = 1
    local_rank: int = 0
    """Number of the process on its machine, and of its GPU."""


def launched() -> World:
    """Return what torchrun put into the environment; one process without it."""
    found = [int(os.environ.get(name, default)) for name, default in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010")]
    return World(*found)


def world() -> World:
    """Return the process group that runs, one process if none does."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size(), launched().local_rank)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join torchrun's other processes for the block: NCCL between GPUs, gloo between CPUs.

    A group that runs already is used and left alone; without torchrun there is one process.
    """
    if launched().size == 1 or dist.is_initialized():
        yield world()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """Return the device of this process: ``"auto"`` takes a GPU if there is one, each process its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched().size > 1:
        torch.cuda.set_device(launched().local_rank)
        return torch.device("cuda", launched().local_rank)
    return torch.device(name)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of their ranks, with gradients.

    Parameters
    ----------
    rows : Tensor [own, ...]
        This process's; their number may differ between processes.

    Returns
    -------
    Tensor [total, ...]
        Its gradient goes back to the process that each row came from, summed over the processes' losses: whoever uses
        this must sum gradients over processes (`sum_gradients`), as everything here does.
    """
    if world().size == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def rows_before(n_rows: int, device: torch.device | str = "cpu") -> int:
    """Return where this process's rows begin among the gathered ones."""
    return sum(_row_counts(n_rows, device)[: world().rank])


def sum_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Add up every weight's gradient over the processes; a process without one adds zero.

    Dense gradients travel together, in one message per type. Sparse ones (rows of a large ID table) are gathered.
    """
    if world().size == 1:
        return
    trained = [weight for weight in weights if weight.requires_grad]
    sparse = _any_sparse(trained)
    dense: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for weight, is_sparse in zip(trained, sparse):
        if is_sparse:
            weight.grad = _summed_rows(weight)
        else:
            dense.setdefault(weight.dtype, []).append(weight)
    for group in dense.values():
        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in group]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        for weight, part in zip(group, flat.split([part.numel() for part in parts])):
            weight.grad = part.view_as(weight)


def sum_(values: Tensor) -> Tensor:
    """Add up a tensor over the processes, in place."""
    if world().size > 1:
        dist.all_reduce(values)
    return values


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of the first process."""
    if world().size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def share(value: T) -> T:
    """Return the first process's value in every process; any object that pickles."""
    if world().size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, 0)
    shared: T = box[0]
    return shared


def collect(value: T) -> list[T]:
    """Return the values of all processes in the order of their ranks."""
    if world().size == 1:
        return [value]
    box: list[Any] = [None] * world().size
    dist.all_gather_object(box, value)
    return box


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.counts = _row_counts(len(rows), rows.device)
        return torch.cat(_gathered(rows, ctx.counts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.split(ctx.counts)[world().rank]


def _row_counts(n_rows: int, device: torch.device | str) -> list[int]:
    if world().size == 1:
        return [n_rows]
    counts = torch.zeros(world().size, dtype=torch.int64, device=device)
    counts[world().rank] = n_rows
    dist.all_reduce(counts)
    return [int(count) for count in counts]


def _gathered(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Gather rows of different numbers: padded to the largest on the way."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded)
    return [part[:count] for part, count in zip(received, counts)]


def _any_sparse(weights: list[torch.nn.Parameter]) -> list[bool]:
    """Return which gradients are sparse in any process; one that saw no row has none at all."""
    if not weights:
        return []
    flags = torch.tensor([weight.grad is not None and weight.grad.is_sparse for weight in weights])
    flags = flags.to(weights[0].device, torch.int32)
    dist.all_reduce(flags)
    return [bool(flag) for flag in flags]


def _summed_rows(weight: torch.nn.Parameter) -> Tensor:
    own = torch.zeros_like(weight, layout=torch.sparse_coo) if weight.grad is None else weight.grad
    own = own.coalesce()
    rows, values = own.indices()[0], own.values()
    counts = _row_counts(len(rows), rows.device)
    every = torch.cat(_gathered(rows, counts)), torch.cat(_gathered(values, counts))
    return torch.sparse_coo_tensor(every[0].unsqueeze(0), every[1], weight.shape).coalesce()
