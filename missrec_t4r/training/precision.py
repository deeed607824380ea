"""Mixed precision (AMP) and ``torch.compile`` of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from missrec_t4r.config import TrainConfig
from missrec_t4r.config.training import Precision
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.missrec import MISSRec

_AMPERE = (8, 0)
"""Compute capability from which GPUs multiply matrices in bf16."""
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision that ``auto`` stands for on a device: bf16 if it has instructions for it, else fp32.

    Without such instructions torch emulates bf16 in fp32, which is slower than fp32. A CPU whose capabilities torch
    does not report (an older torch, another architecture) counts as one without.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= _AMPERE else "fp32"
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def matmul_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype in which matrix products are computed."""
    return _TYPES.get(resolve_precision(precision, device), torch.float32)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context in which matrix products run in ``precision``; weights stay in fp32."""
    dtype = matmul_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def check_precision(train: TrainConfig, device: torch.device) -> None:
    """Raise an error for a precision that the device does not support.

    Raises
    ------
    ConfigError
        fp16 on a CPU: torch has no loss scaling for it there.
    """
    if train.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"train.precision fp16 on {device.type}", "a GPU", "use bf16, which needs no loss scaling")


def compile_blocks(model: MISSRec) -> None:
    """Compile encoder and decoder in place, with dynamic shapes; names and weights do not change.

    Item encoder and softmax are not compiled: each is dominated by one matrix product. Nor are interests, whose shape
    changes with every batch.
    """
    model.encoder.compile(dynamic=True)
    model.decoder.compile(dynamic=True)


@contextlib.contextmanager
def translate_compile_errors(active: bool) -> Iterator[None]:
    """Raise `ConfigError` if ``torch.compile`` fails, which happens at the first step.

    Raises
    ------
    ConfigError
        Usually no C++ compiler was found.
    """
    if not active:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"torch.compile failed ({message[0][:200]})",
            "a C++ compiler that torch can call",
            "install g++, or train without: --set train.compile=false",
        ) from error
