"""The kinds of frames that operators are tested on."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from merlin.core.dispatch import HAS_GPU


def to_cudf(frame: pd.DataFrame) -> Any:
    import cudf

    return cudf.from_pandas(frame)


FRAMES = [
    pytest.param(lambda frame: frame, id="pandas"),
    pytest.param(
        to_cudf,
        id="cudf",
        marks=pytest.mark.skipif(not HAS_GPU, reason="needs cuDF and a CUDA device"),
    ),
]
