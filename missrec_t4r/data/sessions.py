"""Session data sets in memory as flat arrays: values of all sessions and offsets, no Python object per session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.arrays import AnyArray, Bools, Ints
from missrec_t4r.data.session_files import read_rows, row_files
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.schema import ITEM_LIST, LIST_SUFFIX, NULL_ROW, PADDING_ROW, TIMESTAMP, UNKNOWN_ROW, USER_ID


@dataclass(frozen=True)
class Sessions:
    """Ragged sessions of catalogue rows, in the order of time.

    Parameters
    ----------
    values : ndarray [event], int64
        Catalogue rows of all sessions, one after the other.
    offsets : ndarray [session + 1], int64
        Session i is ``values[offsets[i]:offsets[i + 1]]``.
    features : mapping of str to ndarray [event], or [event, width] for vectors
        Event features: other list columns by their name without the ``-list`` suffix, aligned with ``values``.
    users : pyarrow.Array or None
        Raw user id of every session, [session].
    """

    values: Ints
    offsets: Ints
    features: Mapping[str, AnyArray] = field(default_factory=dict)
    users: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Ints:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Ints]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Ints:
        """Events per session, [session]."""
        return np.diff(self.offsets)

    @property
    def session_of_event(self) -> Ints:
        """Index of every event's session, [event].

        Examples
        --------
        >>> Sessions.from_lists([[3, 4], [5]]).session_of_event.tolist()
        [0, 0, 1]
        """
        return np.repeat(np.arange(len(self)), self.lengths)

    @classmethod
    def from_lists(cls, sessions: Sequence[npt.ArrayLike]) -> Sessions:
        """Return sessions from a list of lists of catalogue rows.

        Examples
        --------
        >>> Sessions.from_lists([[3, 4], [5]]).lengths.tolist()
        [2, 1]
        """
        arrays = [np.asarray(session, np.int64) for session in sessions]
        return cls(np.concatenate([*arrays, np.empty(0, np.int64)]), _offsets([len(array) for array in arrays]))

    @classmethod
    def concatenate(cls, parts: Sequence[Sessions]) -> Sessions:
        """Return the sessions of all parts, one part after the other, without users; only common features are kept."""
        common = set.intersection(*(set(part.features) for part in parts))
        return cls(
            np.concatenate([part.values for part in parts]),
            _offsets(np.concatenate([part.lengths for part in parts])),
            {name: np.concatenate([part.features[name] for part in parts]) for name in common},
        )

    @classmethod
    def load(cls, folder: str | Path, features: Sequence[str] | None = None) -> Sessions:
        """Read one split, its delta files merged on read (`missrec_t4r.data.session_files`).

        Parameters
        ----------
        folder : path
        features : sequence of str, optional
            The list columns to read beside the items, without the ``-list`` suffix; all by default.

        Raises
        ------
        DataError
            No parquet file in the folder.
        SchemaError
            The files lack the item list or a feature, or a feature's lists are not as long as the items'.
        """
        files = row_files(folder)
        if not files:
            raise DataError(f"no parquet file in {folder}", "a split written by missrec etl", "run `missrec etl` first")
        available = pq.read_schema(files[0]).names
        if ITEM_LIST not in available:
            raise SchemaError(f"{folder} has columns {available}", f"a list column {ITEM_LIST!r}")
        if features is None:
            features = [n.removesuffix(LIST_SUFFIX) for n in available if n.endswith(LIST_SUFFIX) and n != ITEM_LIST]
        columns = {name: name if name in available else name + LIST_SUFFIX for name in features}
        if missing := [name for name, column in columns.items() if column not in available]:
            raise SchemaError(
                f"{folder} has no column {', '.join(missing)}",
                "every event feature that the model was trained with",
                "use data of the same ETL settings, or train with --set model.event_features=none",
            )
        names = [ITEM_LIST, *columns.values(), *([USER_ID] if USER_ID in available else [])]
        table = read_rows(folder, names)
        values, offsets = flat_lists(table[ITEM_LIST], NULL_ROW)
        arrays = {name: _aligned(table[column], offsets, name) for name, column in columns.items()}
        users = one_array(table[USER_ID]) if USER_ID in available else None
        return cls(np.asarray(values, np.int64), offsets, arrays, users)

    def split_last(self) -> tuple[Sessions, Ints]:
        """Return histories and targets: every session without its last item, and the last items, [session]."""
        if (self.lengths < 1).any():
            raise DataError("an evaluation session is empty", "a history and a target", "re-run missrec etl")
        keep = np.ones(len(self.values), bool)
        keep[self.offsets[1:] - 1] = False
        offsets = self.offsets - np.arange(len(self.offsets))  # one event fewer per session before
        return self._of_events(keep, offsets, self.users), self.values[self.offsets[1:] - 1]

    def known(self) -> Sessions:
        """Return the sessions without events of null and unknown items."""
        keep = self.values > UNKNOWN_ROW
        n_kept = np.concatenate([[0], np.cumsum(keep)])  # [event + 1], kept events before each event
        return self._of_events(keep, n_kept[self.offsets], self.users)

    def with_known_target(self) -> Sessions:
        """Return the evaluation sessions whose target, the last item, is known, without other unknown events.

        Examples
        --------
        >>> [session.tolist() for session in Sessions.from_lists([[3, 4, 2], [2, 3, 4]]).with_known_target()]
        [[3, 4]]
        """
        ends = self.offsets[1:][self.lengths > 0]
        has_target = np.zeros(len(self), bool)
        has_target[self.lengths > 0] = self.values[ends - 1] > UNKNOWN_ROW
        return self.take(np.flatnonzero(has_target)).known()

    def take(self, indices: npt.ArrayLike) -> Sessions:
        """Return the sessions at ``indices``, in that order."""
        sessions = np.asarray(indices, np.int64)
        lengths = self.lengths[sessions]
        offsets = _offsets(lengths)
        event = np.arange(offsets[-1]) + np.repeat(self.offsets[sessions] - offsets[:-1], lengths)  # [new event]
        users = self.users.take(pa.array(sessions)) if self.users is not None else None
        return self._of_events(event, offsets, users)

    def slice(self, start: int, stop: int) -> Sessions:
        """Return sessions ``start`` to ``stop`` as views, without users."""
        offsets = self.offsets[start : min(stop, len(self)) + 1]
        return self._of_events(slice(offsets[0], offsets[-1]), offsets - offsets[0])

    def _of_events(self, events: Any, offsets: Ints, users: pa.Array | None = None) -> Sessions:
        """Return sessions of some events, chosen by mask, positions or range."""
        features = {name: feature[events] for name, feature in self.features.items()}
        return Sessions(self.values[events], offsets, features, users)

    def padded(self, indices: npt.ArrayLike, max_length: int) -> Ints:
        """Return the last ``max_length`` items of the sessions at ``indices``, [batch, seq], 0-padded on the right."""
        event, mask = self._window(indices, max_length)
        return np.where(mask, self.values[event], PADDING_ROW) if len(self.values) else np.zeros(event.shape, np.int64)

    def padded_features(self, indices: npt.ArrayLike, max_length: int) -> dict[str, AnyArray]:
        """Return the event features of `padded`'s items, [batch, seq] or [batch, seq, width] each; 0 at padding."""
        if not self.features:
            return {}
        event, mask = self._window(indices, max_length)
        return {name: gather(feature, event, mask) for name, feature in self.features.items()}

    def _window(self, indices: npt.ArrayLike, max_length: int) -> tuple[Ints, Bools]:
        """Return the indices of the sessions' last events and the mask of real ones, both [batch, seq]."""
        sessions = np.asarray(indices, np.int64)
        ends = self.offsets[sessions + 1]
        lengths = np.minimum(ends - self.offsets[sessions], max_length)
        steps = np.arange(max(int(lengths.max(initial=0)), 1))
        mask = steps < lengths[:, None]  # [batch, seq]
        return np.where(mask, (ends - lengths)[:, None] + steps, 0), mask


def target_counts(sessions: Sessions, n_rows: int) -> Ints:
    """Return how often each row is a training target, [row]: every event but the first of a session."""
    targets = np.delete(sessions.values, sessions.offsets[:-1][sessions.lengths > 0])
    return np.bincount(targets, minlength=n_rows)


def gather(values: AnyArray, index: Ints, mask: Bools) -> AnyArray:
    """Return ``values[index]`` where the mask is True and zeros elsewhere.

    Parameters
    ----------
    values : ndarray [event] or [event, width]
        May be empty.
    index, mask : ndarray [batch, seq]
    """
    if not len(values):
        return np.zeros((*index.shape, *values.shape[1:]), values.dtype)
    return np.where(mask if values.ndim == 1 else mask[..., None], values[index], values.dtype.type(0))


def flat_lists(column: pa.ChunkedArray, null: int = PADDING_ROW) -> tuple[AnyArray, Ints]:
    """Return a list column's elements, [event] or [event, width], and its offsets [row + 1].

    A missing list becomes an empty one, a missing integer ``null``, a missing float NaN, a missing vector zeros;
    booleans become integers.

    Raises
    ------
    SchemaError
        The column holds no lists, or vectors of different widths.
    """
    array = one_array(column)
    if not hasattr(array.type, "value_type"):
        cure = "group the events into sessions with `missrec etl`"
        raise SchemaError(f"a column of type {array.type}", "lists, one row per session", cure)
    offsets = _offsets(pc.fill_null(pc.list_value_length(array), 0))
    elements = array.flatten()
    if not hasattr(elements.type, "value_type"):
        if pa.types.is_boolean(elements.type):
            elements = elements.cast(pa.int8())
        if pa.types.is_integer(elements.type):
            elements = pc.fill_null(elements, null)
        return elements.to_numpy(zero_copy_only=False), offsets
    widths = pc.unique(pc.drop_null(pc.list_value_length(elements)))
    if len(widths) > 1:
        raise SchemaError(f"vectors of widths {widths.to_pylist()[:5]} in one column", "one width per column")
    width = widths[0].as_py() if len(widths) else 0
    vectors = np.zeros((len(elements), width), np.float32)
    vectors[np.asarray(elements.is_valid())] = np.asarray(elements.drop_null().flatten(), np.float32).reshape(-1, width)
    return vectors, offsets


def _offsets(lengths: npt.ArrayLike) -> Ints:
    """Return where each of so many elements begins, and the end, [length + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


def _aligned(column: pa.ChunkedArray, offsets: Ints, name: str) -> AnyArray:
    """Return a feature's values, 64-bit numbers as 32-bit where that keeps what they are used for.

    Raises
    ------
    SchemaError
        Its lists differ in length from the items'.
    """
    values, feature_offsets = flat_lists(column)
    if not np.array_equal(feature_offsets, offsets):
        raise SchemaError(f"column {name!r} has lists of other lengths than the items", "one value per event")
    if values.dtype.kind == "f":  # of today's seconds a float32 holds each 128th
        return values if name == TIMESTAMP else values.astype(np.float32)
    fits = values.dtype.kind in "iu" and (not len(values) or (values.min() >= -(2**31) and values.max() < 2**31))
    return values.astype(np.int32) if fits else values
