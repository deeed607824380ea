"""Commands that run until they are stopped: in the main thread by a signal, in another one without signals."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from missrec_t4r.serving.stop_signals import UntilStopped


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_without_an_error(stop: signal.Signals) -> None:
    before, steps = signal.getsignal(stop), ["serving"]
    with UntilStopped():
        signal.raise_signal(stop)
        steps.append("served on")
    assert steps == ["serving"]
    assert signal.getsignal(stop) is before


def test_a_thread_serves_too() -> None:
    def serve() -> str:
        with UntilStopped():
            return "served"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(serve).result() == "served"
