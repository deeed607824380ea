"""A second device on a machine without one: tensors whose ``device`` is ``cuda`` and which do not mix with the CPU's.

Values stay in the CPU's memory and every kernel is the CPU's. What is kept beside them is where each storage is said to
be: a dispatch mode follows it through all operations, also those of the backward pass, and raises `WrongDevice` where
real CUDA would raise: an operation over both devices, ``.numpy()`` of a CUDA tensor, a generator of the other device.
As in CUDA, a CPU tensor without dimensions may take part in any operation, and CPU indices may index a CUDA tensor.

It also lists where the host would wait for the device: values read by Python, results whose size depends on values,
blocking copies. What it cannot show: other numbers (another order of sums, bf16), memory, speed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

_MOVES = {"_to_copy.default", "copy_.default", "_copy_from.default", "copy.default"}
_INDEXED = {"index.Tensor": 1, "index_put_.default": 1, "index_put.default": 1, "_index_put_impl_.default": 1}
"""Operations whose argument of this number may be on the CPU."""
_FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange empty empty_strided eye from_numpy full linspace ones rand randint randn randperm scalar_tensor "
        "tensor zeros as_tensor asarray frombuffer sparse_coo_tensor sparse_csr_tensor"
    ).split()
}
_TO_NUMPY = {Tensor.numpy, Tensor.__array__}
_WAITS = set(
    "_local_scalar_dense nonzero masked_select unique_dim _unique _unique2 unique_consecutive unique_dim_consecutive "
    "bincount equal _coalesce".split()
)
"""Operations after which a CUDA host waits: they return a number, or a size that depends on values."""
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
_ROOT = str(Path(__file__).parents[2])


class WrongDevice(RuntimeError):
    """Two devices meet."""


class _Places:
    """Where each storage is said to be; a tensor made inside another operation belongs to whichever device uses it."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.of: dict[int, tuple[StorageWeakRef, torch.device | None]] = {}

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        for part in _dense(tensor):
            weak = StorageWeakRef(part.untyped_storage())  # keeps the address from being used again
            self.of[weak.cdata] = weak, device

    def wait(self, what: str) -> None:
        """Note that the host waits here, and which line of the package makes it."""
        frames = [one for one in traceback.extract_stack() if one.filename.startswith(f"{_ROOT}/missrec_t4r")]
        at = f"{frames[-1].filename.removeprefix(_ROOT + '/')}:{frames[-1].lineno}" if frames else "the backward pass"
        self.waits.append(f"{what} at {at}")

    def get(self, tensor: Tensor) -> torch.device | None:
        found = self.of.get(_dense(tensor)[0].untyped_storage()._cdata)
        return CPU if found is None else found[1]


def _dense(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    if tensor.layout is torch.sparse_csr:
        return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
    return [tensor]


def tensors(*structure: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries, in order; torch's own search is far slower."""
    found: list[Tensor] = []
    for one in structure:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += tensors(*one)
        elif isinstance(one, dict):
            found += tensors(*one.values())
    return found


class _Operations(TorchDispatchMode):
    """Every operation, whoever calls it: refuses two devices and says where the result is."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places, self.factory = places, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        given = tensors(args, kwargs)
        device = self._device(name, given, args, kwargs)
        if any(self.places.get(one) == CUDA for one in given) and self._is_waited_for(name, args, kwargs):
            self.places.wait(name)
        result = func(*args, **kwargs)
        for made in tensors(result):
            if not any(made is one for one in given):
                self.places.put(made, device)
        for one in given:  # what had no device yet has it now
            if device is not None and self.places.get(one) is None:
                self.places.put(one, device)
        return result

    def _is_waited_for(self, name: str, args: Any, kwargs: Any) -> bool:
        kind = name.split(".")[0]
        if name in _INDEXED:
            indices = tensors(args[_INDEXED[name]])
            by_mask = any(one.dtype in (torch.bool, torch.uint8) for one in indices)
            one_value = kind != "index" and args[2].numel() == 1  # CUDA fills under the mask then
            return (by_mask and not one_value) or any(self.places.get(one) == CPU for one in indices)
        if kind == "copy_":
            apart = self.places.get(args[0]) != self.places.get(
                args[1]
            )  # also one number: `x[0] = 1.0` copies and waits
            return apart and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if kind == "repeat_interleave":
            return name.endswith(".Tensor") and kwargs.get("output_size") is None
        return kind in _WAITS

    def _device(self, name: str, given: list[Tensor], args: Any, kwargs: Any) -> torch.device | None:
        if not given:
            return CPU if self.factory else None
        if name in _MOVES:
            return self.places.get(given[0])
        free = tensors(args[_INDEXED[name]]) if name in _INDEXED and self.places.get(given[0]) == CUDA else []
        held = {self.places.get(one) for one in given if one.dim() and not any(one is index for index in free)}
        held.discard(None)
        if len(held) > 1:
            found = ", ".join(f"{tuple(one.shape)} on {self.places.get(one)}" for one in given)
            raise WrongDevice(f"Expected all tensors to be on the same device: {name} of {found}")
        scalars = {self.places.get(one) for one in given if not one.dim()} - {None}
        device = next(iter(held), None) or (CUDA if CUDA in scalars else next(iter(scalars), None))
        if device == CUDA and any(isinstance(one, torch.Generator) for one in (*args, *kwargs.values())):
            raise WrongDevice(f"Expected a 'cuda' device type for generator but found 'cpu': {name}")
        return device


class _Calls(TorchFunctionMode):
    """The calls of Python code: moves between the devices, ``device=`` of new tensors, ``.device``, ``.numpy()``."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations, self.places = operations, operations.places

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.places.get(args[0]) or CPU
        if func == Tensor.is_cuda.__get__:
            return self.places.get(args[0]) == CUDA
        if func in _TO_NUMPY and self.places.get(args[0]) == CUDA and not kwargs.get("force"):
            raise WrongDevice("can't convert cuda:0 device type tensor to numpy")
        if func == Tensor.pin_memory:
            return args[0]
        if func in (Tensor.tolist, *_TO_NUMPY) and self.places.get(args[0]) == CUDA:
            self.places.wait(func.__name__)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        wanted = kwargs.pop("device", None)
        if func in _FACTORIES:
            return self._made(func, args, kwargs, wanted)
        if wanted is not None:
            wanted = torch.device(wanted)
            kwargs["device"] = "cpu" if wanted.type == "cuda" else wanted
        self.operations.factory = False
        result = func(*args, **kwargs)
        if wanted is not None and wanted.type != "meta":
            for tensor in tensors(result):
                self.places.put(tensor, CUDA if wanted.type == "cuda" else CPU)
        elif func == Tensor.__deepcopy__ or func == Tensor.new_tensor:
            self.places.put(result, self.places.get(args[0]))
        return result

    def _made(self, func: Callable[..., Any], args: Any, kwargs: Any, wanted: Any) -> Any:
        before, self.operations.factory = self.operations.factory, True
        try:
            device = None if wanted is None else torch.device(wanted)
            if device is not None and device.type != "cuda":
                kwargs["device"] = device
            if device is not None and device.type == "cuda" and kwargs.get("generator") is not None:
                raise WrongDevice(f"Expected a 'cuda' device type for generator but found 'cpu': {func.__name__}")
            result = func(*args, **kwargs)
        finally:
            self.operations.factory = before
        given = tensors(args, kwargs)
        if device is not None and device.type == "cuda":
            if func in _FROM_HOST and not any(self.places.get(one) == CUDA for one in given):
                self.places.wait(func.__name__)
            if any(result.untyped_storage()._cdata == one.untyped_storage()._cdata for one in given):
                result = result.clone() if self.places.get(given[0]) != CUDA else result
            self.places.put(result, CUDA)
        elif not given or isinstance(args[0], np.ndarray):
            self.places.put(result, CPU) if result.device.type != "meta" else None
        return result

    def _moved(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        was = self.places.get(tensor) or CPU
        target = {Tensor.cpu: CPU, Tensor.cuda: CUDA}.get(func)
        if "device" in kwargs:
            named = kwargs.pop("device")
            target = None if named is None else torch.device(named)
        elif func == Tensor.to and rest and isinstance(rest[0], str | torch.device):
            target = torch.device(rest.pop(0))
        elif func == Tensor.to and rest and rest[0] is None:
            rest.pop(0)
        elif func == Tensor.to and rest and isinstance(rest[0], Tensor):
            other = rest.pop(0)
            target, kwargs["dtype"] = self.places.get(other) or CPU, other.dtype
        target = was if target is None else CUDA if target.type == "cuda" else target
        self.operations.factory = False
        if target != was and not kwargs.get("non_blocking") and "meta" not in (target.type, tensor.device.type):
            self.places.wait(func.__name__)
        if target.type == "meta":
            return Tensor.to(tensor, target)
        options = {key: value for key, value in kwargs.items() if key in ("dtype", "copy", "memory_format")}
        if func == Tensor.to:
            kinds = [one for one in rest if isinstance(one, torch.dtype)]
            options |= {"dtype": kinds[0]} if kinds else {}
        if tensor.is_meta:
            return Tensor.to(tensor, *([options["dtype"]] if "dtype" in options else []))
        if target == was:
            if not options:
                return tensor
            result = Tensor.to(tensor, **({"dtype": tensor.dtype} | options))
        else:
            result = Tensor.to(tensor, **({"dtype": tensor.dtype} | options | {"copy": True}))
        self.places.put(result, target)
        return result


_parse_in_c = torch._C._nn._parse_to


def _parse_to(*args: Any, **kwargs: Any) -> Any:
    """What `Module.to` makes of its arguments; C++ would read the device of a tensor past the modes."""
    parsed = list(_parse_in_c(*args, **kwargs))
    like = next(iter(tensors(args, kwargs)), None)
    return (like.device, *parsed[1:]) if like is not None else tuple(parsed)


@contextmanager
def second_device() -> Iterator[list[str]]:
    """Within it ``"cuda"`` is a device that holds tensors of its own and refuses those of the CPU.

    Yields the list of the places where the host has waited for it so far.
    """
    operations = _Operations(_Places())
    state = torch.zeros(16, dtype=torch.uint8)
    with ExitStack() as stack:
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "synchronize": lambda device=None: None,
            "mem_get_info": lambda device=None: (1 << 36, 1 << 36),
            "get_device_capability": lambda device=None: (7, 5),  # without bf16
            "get_rng_state": lambda device=None: state.clone(),
            "set_rng_state": lambda state, device=None: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
            if hasattr(torch.cuda.random, name):  # where transformers calls it
                stack.enter_context(mock.patch.object(torch.cuda.random, name, value))
        stack.enter_context(mock.patch.object(torch._C._nn, "_parse_to", _parse_to))
        stack.enter_context(operations)
        stack.enter_context(_Calls(operations))
        yield operations.places.waits
