"""A door without a server: the two models of the repository in this process: offline answers are online ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from missrec_t4r.errors import MISSRecError
from missrec_t4r.serving.client.transports import Arrays
from missrec_t4r.serving.triton.backend import Backend, RankerBackend, SessionsBackend

_BATCH = 64
"""Sessions per pass; Triton's default too."""


class InProcessTransport:
    """What Triton does with the ensemble's steps: each gets the tensors that it names and adds its answer.

    Parameters
    ----------
    bundle : Path
        Verified whole.
    device : str
    threads : int
        Threads of torch.
    """

    def __init__(self, bundle: Path, *, device: str = "cpu", threads: int = 1) -> None:
        self.sessions = SessionsBackend(bundle)
        self.ranker = RankerBackend(bundle, device, threads)
        self._steps: tuple[Backend, ...] = (self.sessions, self.ranker)

    def describe(self, model: str) -> tuple[dict[str, str], int]:  # noqa: ARG002 - a bundle is one model
        """Return the data type of the inputs, and the sessions that one pass takes."""
        ids = "BYTES" if self.sessions.transform.settings.id_type == "string" else "INT64"
        names = {name for step in self._steps for name in step.inputs}
        return dict.fromkeys(sorted(names), "") | {"item_ids": ids}, _BATCH

    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:  # noqa: ARG002
        """Ask both steps.

        Raises
        ------
        MISSRecError
            The request is refused, in the words that a server would use.
        """
        tensors = dict(inputs)
        for step in self._steps:
            (answer,) = step.answer([{name: tensors[name] for name in step.inputs if name in tensors}])
            if isinstance(answer, MISSRecError):
                raise answer
            tensors.update(answer)
        return {name: tensors[name] for name in outputs if name in tensors}

    def close(self) -> None:
        """Nothing is open."""
