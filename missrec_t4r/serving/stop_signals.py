"""Ctrl-C and SIGTERM for commands that run until they are stopped."""

from __future__ import annotations

import signal
import threading


class UntilStopped:
    """Context manager whose block ends at Ctrl-C or SIGTERM, without an error; other threads get no signals."""

    def __enter__(self) -> None:
        self._gets_signals = threading.current_thread() is threading.main_thread()
        if self._gets_signals:
            self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        if self._gets_signals:
            signal.signal(signal.SIGTERM, self._before)
        return kind is KeyboardInterrupt
