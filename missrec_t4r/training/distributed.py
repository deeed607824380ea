"""Data-parallel training under torchrun: part of every batch per process, summed gradients, gathered rows.

Every process plans the same batches, computes its part of each, and sums its gradients with those of the others before
the optimiser's step, so all hold the same weights. A loss is a sum over the process's own rows divided by the counts of
the whole batch: gradients are summed, never averaged, and equal those of one process with the whole batch. Used instead
of torch's DistributedDataParallel, which averages gradients and must wrap one forward call that uses every weight.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from missrec_t4r.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

_DRIVER = Path("/dev/nvidiactl")
"""There where a machine, or a container that was given a GPU, has NVIDIA's driver."""
_TIMEOUT = datetime.timedelta(hours=4)
"""How long a process waits for another: the first one ranks the validation sessions while the others wait."""


class World(NamedTuple):
    """Position of this process in the process group."""

    rank: int = 0
    """Rank 0 validates, writes and logs."""
    size: int = 1
    local_rank: int = 0
    """Index of the process on its machine, and of its GPU."""


def launched() -> World:
    """Return the position that torchrun set in the environment; one process without torchrun."""
    values = [int(os.environ.get(name, default)) for name, default in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010")]
    return World(*values)


def is_launched() -> bool:
    """Return whether torchrun started this process, with whatever number of others."""
    return launched().size > 1 or (dist.is_available() and dist.is_torchelastic_launched())


def is_grouped() -> bool:
    """Return whether there is a process group; one of a single process sends its messages as well."""
    return dist.is_available() and dist.is_initialized()


def world() -> World:
    """Return this process's position in the initialised process group; one process without a group."""
    if not is_grouped():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), launched().local_rank)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Initialise the process group of torchrun for the block: NCCL for GPUs, gloo for CPUs.

    An initialised group is used and not destroyed; without torchrun there is one process and no group. The group's
    threads end with the block: threads of gloo that live until the interpreter exits may abort it.
    """
    if not is_launched() or is_grouped():
        yield world()
        return
    importlib.import_module("torch.distributed.nn")  # optimisers import it, and its default arguments hold the group
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """Return the device of this process; ``"auto"`` is a GPU if there is one, another one for each process.

    Raises
    ------
    ConfigError
        No device has this name, or PyTorch finds no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            _warn_of_an_idle_gpu()
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"--device {name!r}", "auto, cpu or cuda", "leave --device out for the GPU if there is one")
    if name == "cuda" and is_launched():
        name = f"cuda:{launched().local_rank}"
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= n_gpus:
        cure = "--device auto takes a GPU if there is one; `nvidia-smi` and torch.version.cuda show what is installed"
        raise ConfigError(f"--device {name}, and PyTorch {torch.__version__} finds {n_gpus} GPUs", "a GPU", cure)
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)  # pinned memory, NCCL and new streams belong to the current one
    return device


@cache
def _warn_of_an_idle_gpu() -> None:
    """Say once that a GPU is there which torch does not find, for which a training takes the CPU."""
    if _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
        log.warning(
            f"this machine has an NVIDIA GPU, and torch {torch.__version__}, built {built}, finds none: on the CPU. "
            "A driver older than torch's CUDA needs another torch (docs/howto/gpu.md, Install); --device cpu is silent"
        )


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of their ranks, with gradients.

    Parameters
    ----------
    rows : Tensor [own, ...]
        Rows of this process; their number may differ between processes.

    Returns
    -------
    Tensor [total, ...]
        In the backward pass each row's gradient is summed over the processes' losses and returned to its process, so
        gradients must be summed over processes (`sum_gradients`), not averaged.
    """
    if not is_grouped():
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def rows_before(n_rows: int, device: torch.device | str = "cpu") -> int:
    """Return the index of this process's first row among the gathered rows."""
    return sum(_row_counts(n_rows, device)[: world().rank])


def sum_gradients(weights: Iterable[torch.nn.Parameter], sparse: frozenset[Tensor] = frozenset()) -> None:
    """Sum every weight's gradient over the processes; a missing gradient counts as zero.

    Dense gradients are reduced together, in one message per dtype. Those of ``sparse`` weights (rows of a large ID
    table) are gathered.
    """
    if not is_grouped():
        return
    dense: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for weight in weights:
        if weight in sparse:
            weight.grad = _summed_rows(weight)
        elif weight.requires_grad:
            dense.setdefault(weight.dtype, []).append(weight)
    for group in dense.values():
        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in group]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        for weight, part in zip(group, flat.split([part.numel() for part in parts])):
            weight.grad = part.view_as(weight)


def sum_(values: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if is_grouped():
        dist.all_reduce(values)
    return values


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of rank 0."""
    if is_grouped():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def share(value: T) -> T:
    """Return the value of rank 0 in every process; any object that pickles."""
    if not is_grouped():
        return value
    objects: list[Any] = [value]
    dist.broadcast_object_list(objects, 0)
    shared: T = objects[0]
    return shared


def collect(value: T) -> list[T]:
    """Return the values of all processes in the order of their ranks."""
    if not is_grouped():
        return [value]
    objects: list[Any] = [None] * world().size
    dist.all_gather_object(objects, value)
    return objects


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
    if not is_grouped():
        return [n_rows]
    counts = torch.zeros(world().size, dtype=torch.int64, device=device)
    counts[world().rank] = n_rows
    dist.all_reduce(counts)
    return [int(count) for count in counts]


def _gathered(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Gather the rows of every process, which may differ in number; padded to the largest number for the message."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded)
    return [part[:count] for part, count in zip(received, counts)]


def _summed_rows(weight: torch.nn.Parameter) -> Tensor:
    """Return a sparse gradient summed over the processes."""
    own = torch.zeros_like(weight, layout=torch.sparse_coo) if weight.grad is None else weight.grad
    own = own.coalesce()
    rows, values = own.indices()[0], own.values()
    counts = _row_counts(len(rows), rows.device)
    indices, gradients = torch.cat(_gathered(rows, counts)), torch.cat(_gathered(values, counts))
    return torch.sparse_coo_tensor(indices.unsqueeze(0), gradients, weight.shape).coalesce()  # adds up equal rows
