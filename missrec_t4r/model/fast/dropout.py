"""Dropout with cheap random numbers: on a CPU torch draws them one at a time, which takes longer than the layer.

One 64-bit draw makes four decisions of sixteen bits: probabilities are multiples of 1/65536, and the scale is that of
the probability in use. Other devices and compiled graphs use torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each entry with ``probability`` and scale the others so that the mean stays.

    Parameters
    ----------
    x : Tensor
        Of any shape.
    probability : float
        In [0, 1).
    """
    if not probability:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.dropout(x, probability)
    dropped = min(round(probability * _LEVELS), _LEVELS - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


class FastDropout(nn.Dropout):
    """`dropout` in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return dropout(x, self.p) if self.training else x
