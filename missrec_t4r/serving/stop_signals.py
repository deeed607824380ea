"""Ctrl-C and SIGTERM for commands that run until they are stopped."""

from __future__ import annotations

import signal


class UntilStopped:
    """Context manager whose block ends at Ctrl-C or SIGTERM, without an error; for the main thread."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        signal.signal(signal.SIGTERM, self._before)
        return kind is KeyboardInterrupt
