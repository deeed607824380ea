"""Keep torch from running code of the files that it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_FORCED, _ANY_PICKLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Make `torch.load` read tensors only, whatever the environment variables say; they are put back afterwards."""
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _ANY_PICKLE)}
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
