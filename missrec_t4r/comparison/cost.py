"""Latency and memory of a system that can be called in this process, on this machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import Scorer, recommendable_rows
from missrec_t4r.schema import FIRST_ITEM_ROW

BATCHES: Final = (1, 64)
"""Sessions per call: a request, and a batch of them."""
_CALLS: Final = 11
_SHOWN: Final = 10


def cost(scorer: Scorer, histories: Sessions, n_rows: int) -> dict[str, Any]:
    """Return the median milliseconds of ranking 1 and 64 sessions, and what the scorer holds in memory.

    Parameters
    ----------
    scorer : Scorer
    histories : Sessions
        Known items only; the calls go through them.
    n_rows : int
        Rows of the catalogue.

    Returns
    -------
    dict
        ``milliseconds`` by sessions per call, ``parameters`` (trained weights), ``bytes_in_memory`` of weights, tables
        and vectors, ``threads``, ``load`` (of the machine in the last minute, per core; above 1 others wait).

    Examples
    --------
    >>> found = cost(lambda batch: torch.rand(len(batch), 9), Sessions.from_lists([[3], [4, 5]]), 9)
    >>> list(found["milliseconds"]), found["parameters"], found["bytes_in_memory"]
    (['1', '64'], 0, 0)
    """
    storages: dict[int, int] = {}
    weights: dict[int, int] = {}
    _collect(scorer, storages, weights, set())
    return {
        "milliseconds": {str(size): _milliseconds(scorer, histories, size, n_rows) for size in BATCHES},
        "parameters": sum(weights.values()),
        "bytes_in_memory": sum(storages.values()),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }


def _milliseconds(scorer: Scorer, histories: Sessions, size: int, n_rows: int) -> float:
    """Return the median over some calls, after one to warm up: all scores, and the first ten items."""
    seconds = []
    for call in range(_CALLS + 1):
        start = call * size % max(len(histories) - size, 1)
        batch = histories.slice(start, start + size)
        started = time.perf_counter()
        recommendable_rows(scorer(batch), min(_SHOWN, n_rows - FIRST_ITEM_ROW)).cpu()
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds[1:]), 3)


def _collect(value: Any, storages: dict[int, int], weights: dict[int, int], seen: set[int]) -> None:
    """Collect the storages of all tensors that an object holds, each once, and the sizes of its trained weights."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Parameter):
        weights[id(value)] = value.numel()
    if isinstance(value, Tensor):
        for tensor in (value.indices(), value.values()) if value.is_sparse else (value,):
            storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return
    inside: Iterable[Any] = ()
    if isinstance(value, nn.Module):
        inside = [*value.parameters(), *value.buffers()]
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif type(value).__module__.startswith("missrec_t4r."):
        inside = vars(value).values()
    for part in inside:
        _collect(part, storages, weights, seen)
