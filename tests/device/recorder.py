"""CUDA graphs on a machine without a GPU, for the work on `second_device`: what is recorded is run again, nothing else.

`Recorder` stands in for `missrec_t4r.cuda_graph.GraphRecorder`. While it records, a dispatch mode notes every operation
with its very tensors and numbers. As with CUDA, recording leaves all that was there before as it was, random numbers
included, and gives results without values. A replay runs the operations again on the same tensors: what Python computed
from numbers meanwhile does not reach it. It refuses what a recording on CUDA refuses: values that the host reads, sizes
that depend on values, copies from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from tests.device.second_device import CPU, _Operations, tensors

Result = TypeVar("Result")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recording(TorchDispatchMode):
    """Notes the operations, and how what they overwrite was before."""

    def __init__(self) -> None:
        super().__init__()
        (self.places,) = (mode.places for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Operations))
        self.operations = list[tuple[Any, Any, Any, dict[int, Tensor]]]()
        self.own: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = kwargs or {}, tensors(args, kwargs)
        if func._schema.is_mutable:
            for one in given:
                if _memory(one) not in self.own and _memory(one) not in self.before:
                    whole = torch.empty(0, dtype=one.dtype).set_(one.untyped_storage())  # type: ignore[call-overload]
                    self.before[_memory(one)] = whole, whole.clone()
        if any(one.dim() and _memory(one) not in self.own and self.places.get(one) == CPU for one in given):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} on the host")
        result = func(*args, **kwargs)
        known = {_memory(one) for one in given}
        made = {place: one for place, one in enumerate(tensors(result)) if _memory(one) not in known}
        self.own |= {_memory(one) for one in made.values()}
        if made or func._schema.is_mutable:  # a view is there already
            self.operations.append((func, args, kwargs, made))
        return result


class Recorder:
    """Stand-in for `GraphRecorder`.

    Attributes
    ----------
    replays : int
        Of all graphs together.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.results, self.replays = device, list[Tensor](), 0

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """Run what is inside."""
        yield

    def record(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Return a call that runs the operations of ``work`` again, and its result without values."""
        random, recording = torch.get_rng_state(), _Recording()
        try:
            waits = len(recording.places.waits)
            with recording:
                result = work()
            if waited := recording.places.waits[waits:]:
                raise RuntimeError(f"operation not permitted when stream is capturing: {waited[0]}")
        finally:
            torch.set_rng_state(random)
            with torch.no_grad():
                for tensor, values in recording.before.values():
                    tensor.copy_(values)
        results = tensors(result)

        def replay() -> None:
            self.replays += 1
            _spoil(self.results)  # the graphs share their memory
            with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
                for func, args, kwargs, made in recording.operations:
                    again = tensors(func(*args, **kwargs))
                    for place, own in made.items():
                        own.copy_(again[place])

        _spoil(results)
        self.results += results
        return replay, result


def _spoil(results: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor in results:
            tensor.fill_(torch.nan)
