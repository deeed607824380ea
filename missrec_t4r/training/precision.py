"""Mixed precision and compilation: how a step is computed, not what it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from missrec_t4r.config import Precision, TrainConfig
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.missrec import MISSRec

_AMPERE = (8, 0)
"""Compute capability from which GPUs have products in bf16."""
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(precision: Precision, device: torch.device) -> Precision:
    """Return what ``auto`` means on a device: bf16 where it has instructions for it, fp32 elsewhere.

    Without them torch computes bf16 by way of fp32, which is slower than fp32. A CPU that torch says nothing about
    (an older torch, another architecture) is one without.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= _AMPERE else "fp32"
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def product_type(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type in which matrix products are computed."""
    return _TYPES.get(resolved(precision, device), torch.float32)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context in which matrix products run in ``precision``; weights stay in fp32."""
    dtype = product_type(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in fp32, any other as it is."""
    return tensor.float() if tensor.dtype in _TYPES.values() else tensor


def check(train: TrainConfig, device: torch.device) -> None:
    """Refuse arithmetic that the device does not have.

    Raises
    ------
    ConfigError
        Half precision with five bits of exponent on a CPU, whose torch has no scaled gradients for it.
    """
    if train.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"train.precision fp16 on {device.type}", "a GPU", "use bf16, which needs no loss scaling")


def compile_(model: MISSRec) -> None:
    """Compile encoder and decoder in place, for any batch and length; names and weights stay as they are.

    The towers' and the softmax's time is one matrix product each, and interests change shape with every batch.
    """
    model.encoder.compile(dynamic=True)
    model.decoder.compile(dynamic=True)


@contextlib.contextmanager
def compiling(active: bool) -> Iterator[None]:
    """Say in words when compilation fails, which torch notices at the first step.

    Raises
    ------
    ConfigError
        torch.compile failed: no C++ compiler, mostly.
    """
    if not active:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        found = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"torch.compile failed ({found[0][:200]})",
            "a C++ compiler that torch can call",
            "install g++, or train without: --set train.compile=false",
        ) from error
