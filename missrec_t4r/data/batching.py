"""Training batches: windows with a target at every position, or one prefix per example; grouped by length.

With causal attention every position of a window is trained at once; with bidirectional attention one example is one
prefix. Sessions average seven items, so padding all of them to fifty would make 85 % of a batch padding. Batches are
therefore cut from shuffled pools of examples that are sorted by length: a few per cent of padding, and the order still
changes with every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.arrays import Ints
from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.sessions import Sessions, gather

_POOL_BATCHES = 32
"""Batches per pool: examples are sorted by length within a pool only, so that epochs differ."""


class TrainingBatch(NamedTuple):
    """The sessions of one optimiser step."""

    item_ids: Tensor
    """[batch, seq], int64, 0-padded on the right."""
    targets: Tensor
    """[batch, seq, target] for all positions, [batch, target] for prefixes; 0 where there is no target."""
    event_features: Mapping[str, Tensor] = MappingProxyType({})
    """Event features by column, [batch, seq] or [batch, seq, width], aligned with ``item_ids``; never of a target."""
    positions: Tensor | None = None
    """[2, position], int64: session and position of the first targets, for all positions; a GPU would have to be waited
    for to find them."""
    n_interests: int | None = None
    """Slots of the batch's interests where they were counted before (`InterestVocabulary.width`)."""
    slots: Tensor | None = None
    """0-dim, int64: slots that the ``faithful`` regulariser counts, where another number of them is encoded."""

    def to(self, device: torch.device | str) -> TrainingBatch:
        """Return the batch on a device; a GPU copies it while the host goes on."""
        target = torch.device(device)

        def move(values: Tensor) -> Tensor:
            if target.type != "cuda" or values.device.type != "cpu":
                return values.to(target)
            return values.pin_memory().to(target, non_blocking=True)

        return self._replace(
            item_ids=move(self.item_ids),
            targets=move(self.targets),
            event_features=_map(self.event_features, move),
            positions=None if self.positions is None else move(self.positions),
            slots=None if self.slots is None else move(self.slots),
        )

    def padded(self, sessions: int, length: int, positions: int) -> TrainingBatch:
        """Return the batch with empty sessions, events and positions behind its own; no loss depends on them.

        Parameters
        ----------
        sessions, length : int
            Sizes of the result; one session more than there are where positions are added, which lie in the last one,
            in turn at each of its events: a GPU adds the gradients of equal positions one after the other.
        positions : int
            Trained positions of the result, where the batch is one of all positions.
        """
        rows, events = sessions - len(self.item_ids), length - self.item_ids.shape[1]
        trained = self.positions
        if trained is not None:
            added = torch.arange(positions - trained.shape[1])
            trained = torch.cat([trained, torch.stack([torch.full_like(added, sessions - 1), added % length])], 1)
        return self._replace(
            item_ids=_grown(self.item_ids, rows, events),
            targets=_grown(self.targets, rows, events if self.targets.ndim == 3 else 0),
            event_features=_map(self.event_features, lambda values: _grown(values, rows, events)),
            positions=trained,
        )

    def part(self, index: int, parts: int) -> TrainingBatch:
        """Return every ``parts``-th session from ``index`` on; one row of padding if there are fewer sessions."""
        if index >= len(self.item_ids):
            features = _map(self.event_features, _padding_row)
            return TrainingBatch(_padding_row(self.item_ids), _padding_row(self.targets), features)
        targets, features = self.targets[index::parts], _map(self.event_features, lambda values: values[index::parts])
        positions = None if self.positions is None else trained_positions(targets)
        return TrainingBatch(self.item_ids[index::parts], targets, features, positions)


def trained_positions(targets: Tensor) -> Tensor:
    """Return where the first targets of ``targets`` [batch, seq, target] are, [2, position]: session and position."""
    return torch.stack(torch.nonzero(targets[..., 0], as_tuple=True))


def _map(event_features: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: function(values) for name, values in event_features.items()}


def _grown(values: Tensor, rows: int, columns: int) -> Tensor:
    """Return ``values`` [batch, column, ...] with zeros behind its rows and columns."""
    return F.pad(values, (0, 0) * (values.ndim - 2) + (0, columns, 0, rows))


def _padding_row(values: Tensor) -> Tensor:
    return torch.zeros_like(values[:1])


class Examples(NamedTuple):
    """Examples as index ranges into `Sessions.values`; each field is [example], int64.

    The inputs are ``[begin, end)``. A prefix has its first target at ``end``, a position of a window at the next event.
    """

    begin: Ints
    end: Ints
    start: Ints
    """First event of the example's session."""
    limit: Ints
    """End of the session, exclusive: no target lies at or after it."""

    @property
    def lengths(self) -> Ints:
        """Input items per example."""
        return self.end - self.begin


def window_examples(
    sessions: Sessions, max_length: int, per_session: int, rng: np.random.Generator, last: float = 0.0
) -> Examples:
    """Cut sessions into windows; every position of a window is trained against the item after it.

    Parameters
    ----------
    sessions : Sessions
    max_length : int
        Input items of a window, at most.
    per_session : int
        Random windows per session; 0 covers every position once, from the end of the session backwards.
    rng : numpy Generator
        Draws the windows.
    last : float
        Probability that a random window is the last one of its session.
    """
    starts, limits = sessions.offsets[:-1], sessions.offsets[1:]
    has_target = limits - starts >= 2  # one item has no next item
    starts, limits = starts[has_target], limits[has_target]
    if per_session:
        starts, limits = np.repeat(starts, per_session), np.repeat(limits, per_session)
        latest = np.maximum(limits - 1 - max_length, starts)  # the last item is a target only, hence - 1
        begin = starts + (rng.random(len(starts)) * (latest - starts + 1)).astype(np.int64)
        if last:
            begin = np.where(rng.random(len(starts)) < last, latest, begin)
        return Examples(begin, np.minimum(begin + max_length, limits - 1), starts, limits)
    n_windows = -(-(limits - 1 - starts) // max_length)  # rounded up
    session = np.repeat(np.arange(len(starts)), n_windows)  # [example]
    index = np.arange(len(session)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)  # 0, 1, … per session
    end = limits[session] - 1 - index * max_length
    return Examples(np.maximum(end - max_length, starts[session]), end, starts[session], limits[session])


def prefix_examples(
    sessions: Sessions, max_length: int, per_session: int, rng: np.random.Generator, last: float = 0.0
) -> Examples:
    """Return one example per prefix: n - 1 of a session of n items, as the paper trains, or ``per_session`` of them.

    With the probability ``last`` the longest prefix is among those of a session that are drawn.
    """
    offsets, n_prefixes = sessions.offsets, np.maximum(sessions.lengths - 1, 0)
    session = np.repeat(np.arange(len(sessions)), n_prefixes)  # [example]
    from_end = np.arange(len(session)) - np.repeat(np.cumsum(n_prefixes), n_prefixes)  # -(n - 1), …, -1 per session
    end = offsets[session + 1] + from_end
    if per_session and len(session):
        place = rng.random(len(session))
        if last:
            place[(from_end == -1) & (rng.random(len(session)) < last)] = -1
        shuffled = np.lexsort((place, session))  # examples by session, at random within each
        first = np.searchsorted(session, session)
        keep = np.sort(shuffled[np.arange(len(session)) - first < per_session])
        session, end = session[keep], end[keep]
    return Examples(np.maximum(end - max_length, offsets[session]), end, offsets[session], offsets[session + 1])


def training_batches(
    sessions: Sessions, model: MISSRecConfig, train: TrainConfig, rng: np.random.Generator
) -> list[tuple[Examples, bool]]:
    """Plan one epoch: batches of about ``train.batch_size`` trained positions each, in random order.

    With ``train.group_by_length`` a batch's sessions are of similar length, otherwise they are drawn at random.

    Returns
    -------
    list of (Examples, bool)
        The examples of each batch, and whether its sessions are reversed (``train.reverse_probability``).
    """
    all_positions = model.attention == "causal"
    make_examples = window_examples if all_positions else prefix_examples
    examples = make_examples(
        sessions, model.max_sequence_length, train.windows_per_session, rng, train.last_window_probability
    )
    positions = examples.lengths if all_positions else np.ones_like(examples.begin)  # trained positions per example
    batches = _grouped(examples.lengths, positions, train, rng)
    backwards = rng.random(len(batches)) < train.reverse_probability
    return [
        (Examples(*(field[indices] for field in examples)), bool(reverse))
        for indices, reverse in zip(batches, backwards, strict=True)
    ]


def collate(
    sessions: Sessions, examples: Examples, n_targets: int, *, all_positions: bool, backwards: bool
) -> TrainingBatch:
    """Gather a batch's items, event features and targets from the sessions' flat arrays.

    Parameters
    ----------
    sessions : Sessions
    examples : Examples
        Of one batch.
    n_targets : int
        Next items per position or prefix, ``train.next_items``.
    all_positions : bool
        Windows (`window_examples`) instead of prefixes.
    backwards : bool
        Read the sessions in reverse, so that the target is the item before.
    """
    if backwards and not all_positions:
        examples = _mirrored(examples)
    steps = np.arange(int(examples.lengths.max()))  # [seq]
    mask = steps < examples.lengths[:, None]  # [batch, seq], True at real items
    begin, end = examples.begin[:, None], examples.end[:, None]
    # Reversed inputs are (begin, end] from the right: the item at ``begin`` is the last target
    index = np.where(mask, end - steps if backwards else begin + steps, 0)  # [batch, seq], into sessions.values
    item_ids = np.where(mask, sessions.values[index], 0)  # [batch, seq]
    event_features = {name: torch.from_numpy(gather(values, index, mask)) for name, values in sessions.features.items()}
    earliest = begin if all_positions else examples.start[:, None]
    if not all_positions:  # a prefix has targets after its last item only
        index, mask = (examples.begin + 1 if backwards else examples.end - 1)[:, None], mask[:, :1]  # [batch, 1]
    ahead = np.arange(1, n_targets + 1) * (-1 if backwards else 1)
    target_index = index[..., None] + ahead  # [batch, seq or 1, target]
    inside = mask[..., None] & (target_index >= earliest[..., None]) & (target_index < examples.limit[:, None, None])
    targets = np.where(inside, sessions.values[np.where(inside, target_index, 0)], 0)
    if not all_positions:
        targets = targets[:, 0]  # [batch, target]
    batch = TrainingBatch(torch.from_numpy(item_ids), torch.from_numpy(targets), event_features)
    return batch._replace(positions=trained_positions(batch.targets)) if all_positions else batch


def _mirrored(examples: Examples) -> Examples:
    """Return the prefixes of the reversed sessions: inputs ``(begin, end]`` read from the right, target ``begin``."""
    target = examples.start + examples.limit - 1 - examples.end
    return Examples(target, target + examples.lengths, examples.start, examples.limit)


def iterate(
    sessions: Sessions, plan: list[tuple[Examples, bool]], model: MISSRecConfig, train: TrainConfig
) -> Iterator[TrainingBatch]:
    """Yield the planned batches as tensors."""
    all_positions = model.attention == "causal"
    for examples, backwards in plan:
        yield collate(sessions, examples, train.next_items, all_positions=all_positions, backwards=backwards)


def _grouped(lengths: Ints, positions: Ints, train: TrainConfig, rng: np.random.Generator) -> list[Ints]:
    """Return the examples' indices in batches of about ``train.batch_size`` trained positions, in random order."""
    order = rng.permutation(len(lengths))
    if train.group_by_length:
        pool = (np.cumsum(positions[order]) - 1) // (train.batch_size * _POOL_BATCHES)
        order = order[np.lexsort((lengths[order], pool))]  # by length within each pool
    batch = (np.cumsum(positions[order]) - 1) // train.batch_size  # batch number of every example, ascending
    boundaries = np.flatnonzero(np.diff(batch)) + 1
    batches = np.split(order, boundaries) if len(order) else []
    return [batches[index] for index in rng.permutation(len(batches))]
