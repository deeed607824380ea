"""Training batches: every position of a session at once, or one prefix per example; bucketed by length.

Sessions average seven items, so padding all of them to fifty would make 85 % of a batch padding. Batches are cut from
a shuffled pool that is sorted by length: a few per cent of padding, and the order still changes with every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.sessions import Sessions, gather

Ints = npt.NDArray[np.int64]

_POOL_BATCHES = 32
"""Batches that are cut from one sorted pool."""


class TrainingBatch(NamedTuple):
    """One optimiser step's sessions."""

    item_ids: Tensor
    """[batch, seq], int64, 0-padded on the right."""
    targets: Tensor
    """[batch, seq, target] for all positions, [batch, target] for prefixes; 0 where there is no target."""
    event_features: Mapping[str, Tensor] = MappingProxyType({})
    """Side features by column, [batch, seq] or [batch, seq, width], aligned with ``item_ids``; never of a target."""

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Return the batch on a device."""
        return TrainingBatch(
            self.item_ids.to(device), self.targets.to(device), _each(self.event_features, lambda x: x.to(device))
        )

    def part(self, number: int, parts: int) -> TrainingBatch:
        """Return every ``parts``-th session from ``number`` on; a line of padding where there are not so many."""
        if number >= len(self.item_ids):
            return TrainingBatch(_blank(self.item_ids), _blank(self.targets), _each(self.event_features, _blank))
        return TrainingBatch(
            self.item_ids[number::parts],
            self.targets[number::parts],
            _each(self.event_features, lambda x: x[number::parts]),
        )


def _each(event_features: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(values) for name, values in event_features.items()}


def _blank(values: Tensor) -> Tensor:
    return torch.zeros_like(values[:1])


class Examples(NamedTuple):
    """Where each example lies in the sessions' values: inputs ``[begin, end)``, targets from ``end`` or within."""

    begin: Ints
    end: Ints
    start: Ints
    """Where the example's session begins."""
    limit: Ints
    """Where it ends: no target lies at or after it."""

    @property
    def lengths(self) -> Ints:
        """Input items per example."""
        return self.end - self.begin


def window_examples(sessions: Sessions, max_length: int, per_session: int, rng: np.random.Generator) -> Examples:
    """Cut sessions into windows whose positions are all trained, each against the item after it.

    Parameters
    ----------
    sessions : Sessions
    max_length : int
        Input items of a window.
    per_session : int
        Random windows per session; 0 covers every position once, from the end of the session backwards.
    rng : numpy Generator
        Draws the windows.
    """
    begins, ends = sessions.offsets[:-1], sessions.offsets[1:]
    usable = ends - begins >= 2
    begins, ends = begins[usable], ends[usable]
    if per_session:
        begins, ends = np.repeat(begins, per_session), np.repeat(ends, per_session)
        latest = np.maximum(ends - 1 - max_length, begins)
        start = begins + (rng.random(len(begins)) * (latest - begins + 1)).astype(np.int64)
        return Examples(start, np.minimum(start + max_length, ends - 1), begins, ends)
    pieces = -(-(ends - 1 - begins) // max_length)
    owner = np.repeat(np.arange(len(begins)), pieces)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    stop = ends[owner] - 1 - index * max_length
    return Examples(np.maximum(stop - max_length, begins[owner]), stop, begins[owner], ends[owner])


def prefix_examples(sessions: Sessions, max_length: int, per_session: int, rng: np.random.Generator) -> Examples:
    """Return one example per prefix; a session of n items gives n - 1 (specification 5), or a sample of them."""
    offsets = sessions.offsets
    owner = np.repeat(np.arange(len(sessions)), np.maximum(sessions.lengths - 1, 0))
    within = np.arange(len(owner)) - np.repeat(
        np.cumsum(np.maximum(sessions.lengths - 1, 0)), np.maximum(sessions.lengths - 1, 0)
    )
    end = offsets[owner + 1] + within  # within is negative: counts from the session's end
    if per_session and len(owner):
        rank = np.lexsort((rng.random(len(owner)), owner))
        first = np.searchsorted(owner, owner)
        keep = np.sort(rank[np.arange(len(owner)) - first < per_session])
        owner, end = owner[keep], end[keep]
    return Examples(np.maximum(end - max_length, offsets[owner]), end, offsets[owner], offsets[owner + 1])


def training_batches(
    sessions: Sessions, model: MISSRecConfig, train: TrainConfig, rng: np.random.Generator
) -> list[tuple[Examples, bool]]:
    """Plan one epoch: batches of about ``train.batch_size`` trained positions each, in random order.

    With ``train.group_by_length`` a batch's sessions are of similar length, otherwise they are drawn at random.

    Returns
    -------
    list of (Examples, bool)
        The batch's examples, and whether they are read backwards.
    """
    all_positions = model.attention == "causal"
    choose = window_examples if all_positions else prefix_examples
    examples = choose(sessions, model.max_sequence_length, train.windows_per_session, rng)
    cost = examples.lengths if all_positions else np.ones_like(examples.begin)
    batches = _grouped(examples.lengths, cost, train, rng)
    backwards = rng.random(len(batches)) < train.reverse_probability
    return [
        (Examples(*(part[chosen] for part in examples)), bool(b)) for chosen, b in zip(batches, backwards, strict=True)
    ]


def collate(
    sessions: Sessions, examples: Examples, n_targets: int, *, all_positions: bool, backwards: bool
) -> TrainingBatch:
    """Gather a batch's items and targets; ``backwards`` takes them from the session read in reverse."""
    if backwards and not all_positions:
        examples = _mirrored(examples)
    width = int(examples.lengths.max())
    steps = np.arange(width)
    real = steps < examples.lengths[:, None]
    first, last = examples.begin[:, None], examples.end[:, None]
    earliest = first if all_positions else examples.start[:, None]
    at = np.where(real, last - steps if backwards else first + steps, 0)
    item_ids = np.where(real, sessions.values[at], 0)
    event_features = {name: torch.from_numpy(gather(values, at, real)) for name, values in sessions.features.items()}
    if not all_positions:
        at, real = (examples.begin + 1 if backwards else examples.end - 1)[:, None], real[:, :1]
    ahead = np.arange(1, n_targets + 1) * (-1 if backwards else 1)
    there = at[..., None] + ahead
    inside = real[..., None] & (there >= earliest[..., None]) & (there < examples.limit[:, None, None])
    targets = np.where(inside, sessions.values[np.where(inside, there, 0)], 0)
    if not all_positions:
        targets = targets[:, 0]
    return TrainingBatch(torch.from_numpy(item_ids), torch.from_numpy(targets), event_features)


def _mirrored(examples: Examples) -> Examples:
    """Return where the reversed sessions' prefixes lie: items ``(begin, end]`` from the right, target ``begin``."""
    target = examples.start + examples.limit - 1 - examples.end
    return Examples(target, target + examples.lengths, examples.start, examples.limit)


def iterate(
    sessions: Sessions, plan: list[tuple[Examples, bool]], model: MISSRecConfig, train: TrainConfig
) -> Iterator[TrainingBatch]:
    """Yield the planned batches as tensors."""
    all_positions = model.attention == "causal"
    for examples, backwards in plan:
        yield collate(sessions, examples, train.next_items, all_positions=all_positions, backwards=backwards)


def _grouped(lengths: Ints, cost: Ints, train: TrainConfig, rng: np.random.Generator) -> list[Ints]:
    """Group the examples so that a group's cost stays near the batch size."""
    order = rng.permutation(len(lengths))
    if train.group_by_length:
        pool = (np.cumsum(cost[order]) - 1) // (train.batch_size * _POOL_BATCHES)
        order = order[np.lexsort((lengths[order], pool))]
    group = (np.cumsum(cost[order]) - 1) // train.batch_size
    cuts = np.flatnonzero(np.diff(group)) + 1
    batches = np.split(order, cuts) if len(order) else []
    return [batches[index] for index in rng.permutation(len(batches))]
