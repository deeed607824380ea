"""Recording of work on a GPU as CUDA graphs: one launch in place of hundreds, where the same shapes come again.

A graph reads and writes the memory that it was recorded with: inputs are copied there before a replay, results are
copied away after it. All graphs of a recorder share one pool for what lies in between, so that they are replayed one
after the other.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


class GraphRecorder:
    """Records work on one GPU.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """Run what is inside on the stream of the recordings, where libraries then have made their workspaces."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Record what ``work`` does on the GPU, without doing it.

        Returns
        -------
        (callable, Result)
            Does the work, on the current stream; and what ``work`` returned, which holds values after that.

        Raises
        ------
        RuntimeError
            The work waits for the GPU, or does something else that no graph can hold. Random numbers go on as before.
        """
        graph, generator = torch.cuda.CUDAGraph(), self._generator()
        unrecorded = generator.clone_state()
        try:
            with (
                torch.cuda.stream(
                    torch.cuda.current_stream(self.device)
                ),  # a recording that fails leaves its own behind
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                result = work()
        except BaseException:
            generator.graphsafe_set_state(unrecorded)  # the other one may refuse to draw: it takes part in a recording
            self._end_allocation()
            raise
        return graph.replay, result

    def _end_allocation(self) -> None:
        """End the use of the pool where the recording that failed has left it open.

        ``CUDAGraph.capture_end`` of torch 2.13 does not where CUDA has broken the recording off, and then torch's
        allocator frees no cached memory in this process any more, not even where it runs out.
        """
        with suppress(RuntimeError, AttributeError):  # it has ended; torch before 2.8 has another name for it
            torch._C._cuda_endAllocateToPool(self._index(), self.pool)
            torch._C._cuda_releasePool(self._index(), self.pool)

    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[self._index()]

    def _index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index


def obstacle(error: BaseException, longest: int = 300) -> str:
    """Return why work could not be recorded, in one line: the last line of this package that ran, and the message.

    CUDA ends a recording that was broken off with an error of its own, which says no more than that there was another
    one before; that one is told.
    """
    first = error.__context__
    if first is not None and "previous error during capture" in str(error):
        error = first
    message = " ".join(str(error).split()) or type(error).__name__
    package = Path(__file__).parent
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(package)]
    place = f"{Path(own[-1].filename).relative_to(package.parent)}:{own[-1].lineno}: " if own else ""
    return f"{place}{message}"[:longest]


def sizes_up_to(largest: int, smallest: int = 1) -> list[int]:
    """Return the powers of two from ``smallest`` below ``largest``, and that.

    Examples
    --------
    >>> sizes_up_to(50, 8), sizes_up_to(1)
    ([8, 16, 32, 50], [1])
    """
    sizes = [1 << power for power in range(largest.bit_length()) if smallest <= 1 << power < largest]
    return [*sizes, largest]


def fitting(n: int, sizes: Sequence[int]) -> int:
    """Return the first of ``sizes``, ascending, that is at least ``n``."""
    return next(size for size in sizes if size >= n)
