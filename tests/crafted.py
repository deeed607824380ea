"""A pickle that leaves a mark when it is read: the attack of the tests that forbid unpickling."""

from pathlib import Path
from typing import Any


class Crafted:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)
