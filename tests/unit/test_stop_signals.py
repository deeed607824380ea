"""Commands that run until they are stopped: in the main thread by a signal, in another one without signals."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

from missrec_t4r.serving.stop_signals import UntilStopped


def test_a_signal_ends_the_block_without_an_error() -> None:
    before, steps = signal.getsignal(signal.SIGTERM), ["serving"]
    with UntilStopped():
        signal.raise_signal(signal.SIGTERM)
        steps.append("served on")
    assert steps == ["serving"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_serves_too() -> None:
    def serve() -> str:
        with UntilStopped():
            return "served"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(serve).result() == "served"
