"""Types of NumPy arrays; a docstring states the shape, as in ``[event]`` or ``[batch, seq]``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]
"""Numbers of any type."""
