"""A second call that begins while a first one has the lock: for tests of what both leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def beginning_inside(
    read: str, module: ModuleType, second: Callable[[], Any], patch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Start ``second`` in a thread when the block first calls ``module.read``; leave the block when it has ended.

    The call of ``read`` returns when the second one waits for the lock: the first one goes on from what it read.
    """
    real, thread = getattr(module, read), threading.Thread(target=second)

    def meanwhile(*given: Any) -> Any:
        found = real(*given)
        if thread.ident is None:
            thread.start()
            while thread.is_alive() and "waiting until it ends" not in log.text:
                time.sleep(0.01)
        return found

    patch.setattr(module, read, meanwhile)
    yield
    thread.join()
