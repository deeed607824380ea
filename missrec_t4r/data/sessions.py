"""Session data sets in memory: one array of values and one of offsets, no Python object per session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.schema import ITEM_LIST, LIST_SUFFIX, PADDING_ROW, UNKNOWN_ROW, USER_ID

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sessions:
    """Ragged sessions of catalogue rows, in the order of time.

    Parameters
    ----------
    values : ndarray [event], int64
        Catalogue rows of all sessions, one after the other.
    offsets : ndarray [session + 1], int64
        Session i is ``values[offsets[i]:offsets[i + 1]]``.
    features : mapping of str to ndarray [event]
        Other list columns, by their name without the ``-list`` suffix, aligned with ``values``.
    users : pyarrow.Array or None
        Raw user id of every session.
    """

    values: Ints
    offsets: Ints
    features: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
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

    @classmethod
    def from_lists(cls, sessions: Sequence[npt.ArrayLike]) -> Sessions:
        """Pack a list of row lists.

        Examples
        --------
        >>> Sessions.from_lists([[3, 4], [5]]).lengths.tolist()
        [2, 1]
        """
        arrays = [np.asarray(session, np.int64) for session in sessions]
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
        return cls(np.concatenate([*arrays, np.empty(0, np.int64)]), offsets)

    @classmethod
    def load(cls, folder: str | Path) -> Sessions:
        """Read the parquet files of one split (files in name order).

        Raises
        ------
        DataError
            No parquet file in the folder.
        SchemaError
            The files lack the item list.
        """
        files = sorted(Path(folder).glob("*.parquet"))
        if not files:
            raise DataError(f"no parquet file in {folder}", "a split written by missrec etl", "run `missrec etl` first")
        table = pa.concat_tables([pq.read_table(file) for file in files])
        if ITEM_LIST not in table.column_names:
            raise SchemaError(f"{folder} has columns {table.column_names}", f"a list column {ITEM_LIST!r}")
        column = _one_array(table[ITEM_LIST])
        offsets = np.asarray(column.offsets, np.int64)
        values = np.asarray(column.flatten(), np.int64)
        names = [n for n in table.column_names if n.endswith(LIST_SUFFIX) and n != ITEM_LIST]
        features = {n.removesuffix(LIST_SUFFIX): _one_array(table[n]).flatten().to_numpy(False) for n in names}
        users = _combine(table[USER_ID]) if USER_ID in table.column_names else None
        return cls(values, offsets - offsets[0], features, users)

    def split_last(self) -> tuple[Sessions, Ints]:
        """Return the histories without their last item, and the last items (evaluation rows are history + target)."""
        if (self.lengths < 1).any():
            raise DataError("an evaluation session is empty", "a history and a target", "re-run missrec etl")
        keep = np.ones(len(self.values), bool)
        keep[self.offsets[1:] - 1] = False
        histories = Sessions(
            self.values[keep],
            self.offsets - np.arange(len(self.offsets)),
            {name: feature[keep] for name, feature in self.features.items()},
            self.users,
        )
        return histories, self.values[self.offsets[1:] - 1]

    def known(self) -> Sessions:
        """Return the sessions without null and unknown rows."""
        keep = self.values > UNKNOWN_ROW
        kept = np.concatenate([[0], np.cumsum(keep)])
        features = {name: feature[keep] for name, feature in self.features.items()}
        return Sessions(self.values[keep], kept[self.offsets], features, self.users)

    def take(self, indices: npt.ArrayLike) -> Sessions:
        """Return the chosen sessions (item lists and users only)."""
        chosen = np.asarray(indices, np.int64)
        users = self.users.take(pa.array(chosen)) if self.users is not None else None
        packed = Sessions.from_lists([self[int(index)] for index in chosen])
        return Sessions(packed.values, packed.offsets, {}, users)

    def padded(self, indices: npt.ArrayLike, max_length: int) -> Ints:
        """Return the last ``max_length`` items of the chosen sessions, [batch, seq], 0-padded on the right."""
        chosen = np.asarray(indices, np.int64)
        ends = self.offsets[chosen + 1]
        lengths = np.minimum(ends - self.offsets[chosen], max_length)
        width = max(int(lengths.max(initial=0)), 1)
        steps = np.arange(width)
        positions = (ends - lengths)[:, None] + steps
        real = steps < lengths[:, None]
        if not len(self.values):
            return np.full((len(chosen), width), PADDING_ROW, np.int64)
        return np.where(real, self.values[np.minimum(positions, len(self.values) - 1)], PADDING_ROW)


def _combine(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = _combine(column)
    return array.cast(pa.large_list(array.type.value_type)) if not pa.types.is_large_list(array.type) else array
