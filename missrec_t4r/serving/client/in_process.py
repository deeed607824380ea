"""In-process transport: runs the two served models locally, so batch scoring equals online serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from missrec_t4r.arrays import AnyArray
from missrec_t4r.errors import MISSRecError
from missrec_t4r.serving.client.transports import Arrays, ModelFacts
from missrec_t4r.serving.triton.backend import Backend, RankerBackend, SessionsBackend

_BATCH = 64
"""Sessions per pass; Triton's default too."""


class InProcessTransport:
    """The ensemble's two steps as Triton runs them: each gets its named inputs and adds its outputs.

    Parameters
    ----------
    bundle : Path
        All its files are verified.
    device : str
        ``"cpu"`` or ``"cuda:0"``.
    threads : int, optional
        Threads of torch while a request runs; as many as this process has set, by default.
    """

    def __init__(self, bundle: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self.threads = threads
        self.sessions = SessionsBackend(bundle)
        with torch_threads(threads):
            self.ranker = RankerBackend(bundle, device)
        self._steps: tuple[Backend, ...] = (self.sessions, self.ranker)

    def describe(self, model: str) -> ModelFacts:  # a bundle is one model
        """Return the data type of the inputs, and the largest batch of one pass."""
        id_type = "BYTES" if self.sessions.transform.settings.id_type == "string" else "INT64"
        names = {name for step in self._steps for name in step.inputs}
        return dict.fromkeys(sorted(names), "") | {"item_ids": id_type}, _BATCH

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, AnyArray]:
        """Run both steps on one request.

        Raises
        ------
        MISSRecError
            The request is refused, with the message of a server.
        """
        tensors = dict(inputs)
        for step in self._steps:
            with torch_threads(self.threads):
                (response,) = step.infer([{name: tensors[name] for name in step.inputs if name in tensors}])
            if isinstance(response, MISSRecError):
                raise response
            tensors.update(response)
        return {name: tensors[name] for name in outputs if name in tensors}

    def close(self) -> None:
        """Do nothing: there is no connection."""


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Set torch's number of threads for a block, unless it is None: the caller's own training keeps its threads."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)
