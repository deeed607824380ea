"""Training steps as CUDA graphs: one launch in place of several hundred, for which small batches would wait.

Batches are padded to a few shapes; no loss and no gradient depends on the padding (`TrainingBatch.padded`). The first
five batches of a shape are trained plainly, which also makes what libraries need. At the sixth a step is recorded,
which does not run it: gradients, clipping and AdamW, with the learning rate and the batch as tensors on the device.
Then the batch is trained twice from the same weights, moments and random state, plainly and by the graph. Only if loss,
moments and weights agree is the graph used from then on. Otherwise, or where none can be recorded, the state before it
is restored, the log says so, and training goes on plainly, with batches as they are. Until then those of plain steps
are padded as well, so that a resumed training, which records anew, draws the same random numbers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from missrec_t4r.cuda_graph import GraphRecorder, fitting, obstacle, sizes_up_to
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.training.optim import Optimiser
from missrec_t4r.training.state import random_state, set_random_state

log = logging.getLogger(__name__)

_SHORTEST = 8
"""Length and number of interests to which smaller ones are padded."""
_MANY_SESSIONS = 256
"""From here on the padding of sessions is at most a quarter of them instead of all: their kernels take longer than
their launch."""
_PLAIN_STEPS = 5
"""Batches of a shape before one is recorded, since that costs about so many steps. How often a shape will come is not
known (ski rental, Karlin et al., 1988): to record once the plain steps have cost as much as a recording is at most
twice as dear as to have known; at the second batch, a shape that comes twice would cost three times its plain steps."""
_MOST_GRAPHS = 48
"""Batches of further shapes are trained plainly."""
_DIFFERENCE = 0.05
"""By how much a graph's change of the state may differ from a plain step's, relative to the change: the same kernels
run, so that sums in another order are all that may differ. A gradient of nearly zero moves its weight by as much as any
other in AdamW's first steps, in a direction that rounding decides; such weights are few (biases of keys: with 300
dimensions up to 4 % of the change). A batch, a rate or a dropout that is not the plain step's differs by far more."""


Loss = Callable[[TrainingBatch], Tensor]


class _Graph(NamedTuple):
    replay: Callable[[], None]
    loss: Tensor
    """Written by the graph, and overwritten by a replay of any other one."""
    batch: TrainingBatch
    """On the device: read by the graph."""


class Shapes:
    """The sizes to which batches are padded.

    Parameters
    ----------
    max_length : int
        Of a session.
    batch_size : int
        Trained positions of a batch; whole sessions may exceed it by less than one session.
    """

    def __init__(self, max_length: int, batch_size: int) -> None:
        self.lengths, self.batch_size = sizes_up_to(max_length, min(_SHORTEST, max_length)), batch_size
        self.positions = batch_size + max_length

    def padded(self, batch: TrainingBatch) -> TrainingBatch:
        """Return a batch of the host, with interests counted, in one of the shapes."""
        n_sessions, length = batch.item_ids.shape
        sessions, positions = max(self.batch_size, n_sessions), 0
        if batch.positions is not None:
            steps = 1 if n_sessions < _MANY_SESSIONS else 4
            sessions, positions = _rounded(n_sessions + 1, steps), max(self.positions, batch.positions.shape[1])
        grown = batch.padded(sessions, fitting(length, self.lengths), positions)
        assert batch.n_interests is not None
        return grown._replace(n_interests=_rounded(batch.n_interests, 4, _SHORTEST))


class GraphedSteps:
    """Training steps on a GPU, by CUDA graphs where it can be.

    Parameters
    ----------
    optimizer : Optimiser
        With its learning rate on the device.
    shapes : Shapes
    device : torch.device

    Attributes
    ----------
    plain_steps : int
        Batches of a shape that are trained plainly before one is recorded; at least 1.
    obstacle : str
        Why no graphs are used any more; empty otherwise.
    """

    def __init__(self, optimizer: Optimiser, shapes: Shapes, device: torch.device) -> None:
        self.optimizer, self.shapes, self.device = optimizer, shapes, device
        self.graphs: dict[tuple[object, ...], _Graph] = {}
        self.seen: Counter[tuple[object, ...]] = Counter()
        self.plain_steps = _PLAIN_STEPS
        self.obstacle = ""
        self.recorder: GraphRecorder | None = None
        try:
            self.recorder = GraphRecorder(device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            self._give_up(obstacle(error))

    def __call__(self, batch: TrainingBatch, rate: float, loss: Loss) -> Tensor:
        """Take a step on a batch of the host and return its loss.

        Parameters
        ----------
        batch : TrainingBatch
            With its interests counted.
        rate : float
            Learning rate.
        loss : callable
            The loss of a batch on the device, always the same; its work depends on nothing but the batch's shapes.
        """
        self.optimizer.set_rate(rate)
        if self.obstacle:
            return self._plainly(batch, loss)
        padded = self.shapes.padded(batch)
        shape = (*(tensor.shape for tensor in _tensors(padded)), padded.n_interests)
        self.seen[shape] += 1
        graph = self.graphs.get(shape)
        if graph is not None:
            there = padded.to(self.device)
            for own, given in zip(_tensors(graph.batch), _tensors(there), strict=True):
                own.copy_(given)
            graph.replay()
            return graph.loss.clone()
        if self.seen[shape] <= self.plain_steps or len(self.graphs) >= _MOST_GRAPHS:
            return self._plainly(padded, loss)
        there = padded.to(self.device)
        value = self._record(shape, there, loss)
        return self._plainly(there, loss) if value is None else value

    def _plainly(self, batch: TrainingBatch, loss: Loss) -> Tensor:
        """Take a step without a graph; where the graphs leave it too little memory, give them up and take it then."""
        try:
            return self._on_the_stream(batch, loss)
        except torch.cuda.OutOfMemoryError as error:  # raised before the update, which needs no more memory
            if not self.graphs:
                raise
            full = obstacle(error)
        self._give_up(full)  # here, where nothing of the failed step is in memory any more
        return self._on_the_stream(batch, loss)

    def _on_the_stream(self, batch: TrainingBatch, loss: Loss) -> Tensor:
        stream: AbstractContextManager[None] = nullcontext() if self.recorder is None else self.recorder.on_its_stream()
        with stream:
            return self._work(batch.to(self.device), loss)

    def _work(self, batch: TrainingBatch, loss: Loss) -> Tensor:
        """Do the work of a step on the device; this is what is recorded."""
        self.optimizer.zero_grad()
        value = loss(batch)
        self.optimizer.backward(value)
        self.optimizer.update()
        return value.detach()

    def _record(self, shape: tuple[object, ...], batch: TrainingBatch, loss: Loss) -> Tensor | None:
        """Record a step, take it plainly and, from the same state, by the graph.

        Returns the loss; or None, with the state and the memory as before, where any of it fails.
        """
        assert self.recorder is not None
        state, random = self.optimizer.tensors(), random_state(self.device)
        before: dict[str, list[Tensor]] = {}
        try:
            before = _copied(state)
            with self.optimizer.recorded():
                graph = _Graph(*self.recorder.record(lambda: self._work(batch, loss)), batch)
            expected = _copied(state | {"loss": [self._on_the_stream(batch, loss)]})
            self._restore(before, random)
            graph.replay()
            value = graph.loss.clone()
            apart = differences({"loss": [torch.zeros_like(value)], **before}, expected, {**state, "loss": [value]})
        except Exception as error:  # whatever it is: a plain step does without it, or raises it again
            problem = obstacle(error)
        else:
            wrong = [f"{name} by {share:.2g}" for name, share in apart.items() if not share <= _DIFFERENCE]
            problem = f"a recorded step differs from a plain one in {', '.join(wrong)}" if wrong else ""
        if problem:
            if before:
                self._restore(before, random)
            self._give_up(problem)
            return None
        self.graphs[shape] = graph
        if len(self.graphs) == _MOST_GRAPHS:
            log.info(f"steps on batches of {_MOST_GRAPHS} shapes are recorded as CUDA graphs; those of others are not")
        return value

    def _restore(self, before: Mapping[str, list[Tensor]], random: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensors in self.optimizer.tensors().items():
                torch._foreach_copy_(tensors, before[name])
        set_random_state(random, self.device)

    def _give_up(self, problem: str) -> None:
        self.obstacle = problem
        self.graphs.clear()
        log.warning(f"training steps run without CUDA graphs, which takes longer: {self.obstacle}")


def differences(
    before: Mapping[str, Sequence[Tensor]],
    expected: Mapping[str, Sequence[Tensor]],
    found: Mapping[str, Sequence[Tensor]],
) -> dict[str, float]:
    """Return, by name, how far ``found`` is from ``expected``, as a share of the change since ``before``.

    Examples
    --------
    >>> states = [{"x": [torch.tensor([value, 0.0])]} for value in (1.0, 2.0, 2.5)]
    >>> differences(*states)
    {'x': 0.5}
    """

    def apart(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(torch._foreach_sub(list(ones), list(others)))).norm()

    with torch.no_grad():
        shares = [(apart(found[name], expected[name]), apart(expected[name], before[name])) for name in before]
        pairs = torch.stack([torch.stack(pair) for pair in shares]).tolist()
    return {
        name: 0.0 if error == 0 else error / change if change else float("inf")
        for name, (error, change) in zip(before, pairs, strict=True)
    }


def _copied(state: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in state.items()}


def _tensors(batch: TrainingBatch) -> list[Tensor]:
    found = [batch.item_ids, batch.targets, *batch.event_features.values(), batch.positions, batch.slots]
    return [tensor for tensor in found if tensor is not None]


def _rounded(n: int, steps: int, least: int = 1) -> int:
    """Return ``n`` rounded up to one of ``steps`` sizes, ``least`` apart or more, between a power of two and the next.

    Examples
    --------
    >>> _rounded(33, 1), _rounded(64, 1), _rounded(33, 4), _rounded(3, 4, 8), _rounded(17, 4, 8)
    (64, 64, 40, 8, 24)
    """
    step = max((1 << (n - 1).bit_length()) // 2 // steps, least)
    return -(-n // step) * step
