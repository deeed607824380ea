"""Session encoder at a few fixed shapes, each recorded once as a CUDA graph: one launch in place of a hundred.

Batch and length are padded to powers of two, up to the largest batch and the longest session; padding changes no
vector. Elsewhere than on a GPU, and where a graph cannot be recorded, the same padded sessions are encoded plainly.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.cuda_graph import GraphRecorder, fitting, obstacle, sizes_up_to
from missrec_t4r.retrieval.device_search import exact_products
from missrec_t4r.retrieval.traced_encoder import Encode

log = logging.getLogger(__name__)

_SHORTEST = 8
"""Length to which shorter sessions are padded: in so short ones, kernels cost their launch alone."""
_WARM_UP = 3
"""Runs before a graph is recorded: libraries allocate their workspaces in them."""


class _Graph(NamedTuple):
    replay: Callable[[], None]
    sessions: Tensor
    """[batch, seq]: read by the graph."""
    vectors: Tensor
    """[batch, dim]: written by it."""


class GraphedEncoder:
    """Rows [batch, seq] on the device to session vectors [batch, dim].

    Parameters
    ----------
    encode : callable
        A session encoder whose work depends on the shape of the sessions alone (`SessionEncoder` with ``all_slots``).
    device : torch.device
    max_length : int
        Of the sessions.
    batch_size : int
        Larger batches are encoded as they are.

    Attributes
    ----------
    obstacle : str
        Why no graph was recorded on a GPU; empty otherwise.
    """

    def __init__(self, encode: Encode, device: torch.device, max_length: int, batch_size: int) -> None:
        self.encode = encode
        self.batches, self.lengths = sizes_up_to(batch_size), sizes_up_to(max_length, _SHORTEST)
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.obstacle = ""
        self._alone = threading.Lock()
        if device.type == "cuda":
            self._record(device)

    @torch.inference_mode()
    def __call__(self, session: Tensor) -> Tensor:
        """Return the vectors of sessions padded with 0 on the right."""
        batch, length = session.shape
        if batch > self.batches[-1] or length > self.lengths[-1]:
            return self.encode(session)
        shape = fitting(batch, self.batches), fitting(length, self.lengths)
        padded = F.pad(session, (0, shape[1] - length, 0, shape[0] - batch))
        graph = self.graphs.get(shape)
        if graph is None:
            return self.encode(padded)[:batch]
        with self._alone:  # one memory for all callers: in between, another thread would write its own sessions there
            graph.sessions.copy_(padded)
            graph.replay()
            return graph.vectors[:batch].clone()  # the next replay overwrites them

    @torch.inference_mode()
    def _record(self, device: torch.device) -> None:
        """Record a graph per shape, the largest first, since all share its memory."""
        try:
            recorder = GraphRecorder(device)
            for batch in reversed(self.batches):
                for length in reversed(self.lengths):
                    self.graphs[batch, length] = self._recorded(batch, length, recorder)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            self.graphs.clear()
            self.obstacle = obstacle(error)
            log.warning(f"the session encoder runs without CUDA graphs, which takes longer: {self.obstacle}")

    def _recorded(self, batch: int, length: int, recorder: GraphRecorder) -> _Graph:
        """Return the graph of one shape."""
        sessions = torch.zeros(batch, length, dtype=torch.int64, device=recorder.device)
        with exact_products():
            with recorder.on_its_stream():
                for _ in range(_WARM_UP):
                    self.encode(sessions)
            replay, vectors = recorder.record(lambda: self.encode(sessions))
        return _Graph(replay, sessions, vectors)
