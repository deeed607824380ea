"""The request transform: raw item ids to catalogue rows as the fitted NVTabular request workflow, in numpy alone.

The NVTabular workflow is ``Categorify(vocabs=) >> slice to the last max_sequence_length``: every id is looked up first
(unknown ids become row 2) and the session is cut afterwards, so unknown ids count towards its length. A missing id
inside a list is row 2 as well: that is what Categorify does with list columns (it gives row 1 to missing ids of single
events only, and refuses missing ids in integer lists altogether). The ranker drops and counts both kinds.

The settings are a small JSON file and the vocabulary is the catalogue's order; nothing is unpickled. A session of
twenty ids takes microseconds, where NVTabular's executor takes tens of milliseconds. `export.parity` compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from missrec_t4r.arrays import AnyArray, Bools, Ints
from missrec_t4r.errors import BundleError, DataError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import FIRST_ITEM_ROW, NULL_ROW, PADDING_ROW, SESSION_TRANSFORM_FILE, UNKNOWN_ROW

FORMAT_VERSION = 1

NULL_STRING = b""
"""Missing id in a string tensor, which has no null; no item may have this id."""
NULL_INTEGER = int(np.iinfo(np.int64).min)
"""Missing id in an integer tensor; no item may have this id."""

RawId = str | int | None


@dataclass(frozen=True)
class TransformSettings:
    """Validated content of ``session_transform.json``."""

    id_type: Literal["string", "int64"]
    """Type of raw ids."""
    max_sequence_length: int
    """Longest session of the model; older rows are cut."""

    @classmethod
    def from_dict(cls, content: Any) -> TransformSettings:
        """Validate the file's content; its reserved rows must be those of the schema.

        Raises
        ------
        BundleError
            Another format version, other reserved rows, or a missing entry.
        """
        try:
            item, length = content["item_id"], content["max_sequence_length"]
            reserved = (content["format"], item["null_row"], item["unknown_row"], item["first_row"])
            id_type = item["type"]
        except (KeyError, TypeError) as error:
            raise BundleError(f"{SESSION_TRANSFORM_FILE} lacks the entry {error}", "", "re-run missrec etl") from error
        expected = (FORMAT_VERSION, NULL_ROW, UNKNOWN_ROW, FIRST_ITEM_ROW)
        if reserved != expected or id_type not in ("string", "int64") or type(length) is not int or length < 1:
            raise BundleError(
                f"{SESSION_TRANSFORM_FILE} has (format, null, unknown, first row) = {reserved}, type {id_type!r}, "
                f"max_sequence_length {length!r}",
                f"{expected}, type 'string' or 'int64', a length of at least 1",
                "export with the version that wrote the data folder",
            )
        return cls(id_type, length)


class _Texts:
    """Ids that are texts: bytes objects in a request, found in a dictionary."""

    missing: ClassVar[Any] = NULL_STRING
    called: ClassVar = ("strings", "the empty string")
    """What the ids are, and what the missing one is, in messages."""
    dtype: ClassVar[Any] = object

    def __init__(self, ids: pa.Array) -> None:
        self.wire_ids: AnyArray = np.array(ids.cast(pa.binary()).to_pylist(), object)
        self._row_of = {raw: row for row, raw in enumerate(self.wire_ids, start=FIRST_ITEM_ROW)}
        self.n_different = len(self._row_of)

    @staticmethod
    def encode(raw: RawId) -> bytes | None:
        """Return an id as a request holds it; None where it is not text."""
        if not isinstance(raw, str):
            return None
        try:
            return raw.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"item id {raw!r} is not valid Unicode", "text that UTF-8 can carry") from error

    def look_up(self, wire_ids: AnyArray) -> Ints:
        row_of = self._row_of
        flat = [row_of.get(raw, UNKNOWN_ROW) for raw in wire_ids.flat]
        return np.array(flat, np.int64).reshape(wire_ids.shape)


class _Integers:
    """Ids that are integers of 64 bits, found by binary search."""

    missing: ClassVar[Any] = NULL_INTEGER
    called: ClassVar = ("integers", str(NULL_INTEGER))
    dtype: ClassVar[Any] = np.int64

    def __init__(self, ids: pa.Array) -> None:
        self.wire_ids: AnyArray = np.asarray(ids.cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)
        self._order = np.argsort(self.wire_ids, kind="stable")
        self._sorted = self.wire_ids[self._order]
        self.n_different = len(np.unique(self._sorted))

    @staticmethod
    def encode(raw: RawId) -> int | None:
        """Return an id as a request holds it; None where it is not an integer."""
        if not isinstance(raw, int | np.integer) or isinstance(raw, bool):
            return None
        if not NULL_INTEGER < raw <= np.iinfo(np.int64).max:
            raise DataError(f"item id {raw} does not fit", "a signed 64-bit integer above its minimum")
        return int(raw)

    def look_up(self, wire_ids: AnyArray) -> Ints:
        ids = np.asarray(wire_ids, np.int64)
        index = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)  # position in the sorted ids
        return np.where(self._sorted[index] == ids, self._order[index] + FIRST_ITEM_ROW, UNKNOWN_ROW)


_KINDS: dict[str, type[_Texts] | type[_Integers]] = {"string": _Texts, "int64": _Integers}


class SessionTransform:
    """Encode sessions of raw ids as catalogue rows.

    Parameters
    ----------
    settings : TransformSettings
        Id type and session length.
    vocabulary : pyarrow.Array or sequence
        Raw item ids in catalogue order, starting with row 3.

    Examples
    --------
    >>> transform = SessionTransform(TransformSettings("string", 3), ["lamp", "desk"])
    >>> [rows.tolist() for rows in transform(["lamp", None, "sofa", "desk"], ["desk"], [])]
    [[2, 2, 4], [4], []]
    """

    def __init__(self, settings: TransformSettings, vocabulary: pa.Array | Sequence[str | int]) -> None:
        self.settings = settings
        self.n_items = len(vocabulary)
        self._ids = _KINDS[settings.id_type](vocabulary if isinstance(vocabulary, pa.Array) else pa.array(vocabulary))
        self.wire_ids = self._ids.wire_ids  # [item]: raw ids in row order, as request tensors hold them
        if not self.n_items or self._ids.n_different != self.n_items:
            found = f"{self.n_items} item ids, {self._ids.n_different} of them different"
            raise BundleError(found, "at least one, all different")
        if self.look_up(self.to_wire([None]))[0] != UNKNOWN_ROW:
            found = f"an item id is {self._ids.called[1]}"
            raise BundleError(found, "another id: this one stands for a missing id in requests")

    @classmethod
    def load(cls, file: Path, vocabulary: pa.Array) -> SessionTransform:
        """Read ``session_transform.json``.

        Raises
        ------
        BundleError
            The file is missing, is not JSON, or is of another format.
        """
        return cls(TransformSettings.from_dict(read_transform(file)), vocabulary)

    @property
    def max_sequence_length(self) -> int:
        """Longest session of the model; older rows are cut."""
        return self.settings.max_sequence_length

    def __call__(self, *sessions: Sequence[RawId]) -> list[Ints]:
        """Return the rows of ragged sessions of raw ids, each cut to its last ``max_sequence_length``."""
        return [self.look_up(self.to_wire(session))[-self.max_sequence_length :] for session in sessions]

    def to_wire(self, ids: Sequence[RawId]) -> AnyArray:
        """Return ids as a request tensor holds them: bytes or int64, a missing id as `NULL_STRING` or `NULL_INTEGER`.

        Raises
        ------
        DataError
            An id is not of the catalogue's type.
        """
        return encode_ids(ids, self.settings.id_type)

    def look_up(self, wire_ids: AnyArray) -> Ints:
        """Return the row of every id.

        Parameters
        ----------
        wire_ids : ndarray, any shape
            Bytes objects or int64.

        Returns
        -------
        ndarray, same shape, int64
            2 for an unknown or missing id, else the item's row.
        """
        return self._ids.look_up(wire_ids)

    def is_missing(self, wire_ids: AnyArray) -> Bools:
        """Return a mask of the same shape, True where an id is missing."""
        return np.asarray(wire_ids == self._ids.missing, bool)

    def padded(self, wire_ids: AnyArray, lengths: AnyArray) -> tuple[Ints, Ints]:
        """Encode a request's sessions, which are padded to one width.

        Parameters
        ----------
        wire_ids : ndarray [batch, width]
            Bytes or int64; values at and after a session's length are ignored.
        lengths : ndarray [batch]
            Ids per session, without padding.

        Returns
        -------
        rows : ndarray [batch, seq], int64
            Last ``max_sequence_length`` rows of every session, 0-padded on the right; seq is at least 1.
        seen : ndarray [batch, width], int64
            Rows of the whole sessions, 0-padded on the right, for ``exclude_seen``.

        Raises
        ------
        DataError
            A length is negative or exceeds the width.
        """
        batch, width = wire_ids.shape
        lengths = np.asarray(lengths, np.int64).reshape(batch)
        if batch and (lengths.min() < 0 or lengths.max() > width):
            raise DataError(f"a session length of {int(lengths.min())} to {int(lengths.max())}", f"0 to {width}")
        mask = np.arange(width) < lengths[:, None]  # [batch, width], True where an id is
        seen = np.full((batch, width), PADDING_ROW, np.int64)
        seen[mask] = self.look_up(wire_ids[mask])
        if width == 0:
            return np.full((batch, 1), PADDING_ROW, np.int64), seen
        # The last max_sequence_length rows of every session, moved to the left: gather from position length - n on
        n_rows = np.minimum(lengths, self.max_sequence_length)  # [batch]
        steps = np.arange(max(int(n_rows.max(initial=0)), 1))  # [seq]
        positions = np.minimum((lengths - n_rows)[:, None] + steps, width - 1)  # [batch, seq], clipped in the padding
        rows = np.where(steps < n_rows[:, None], np.take_along_axis(seen, positions, axis=1), PADDING_ROW)
        return rows, seen  # [batch, seq], [batch, width]

    def wire_ids_of(self, rows: Ints) -> AnyArray:
        """Return the raw ids of rows as a response holds them, same shape; reserved rows become the missing id."""
        items = np.clip(rows - FIRST_ITEM_ROW, 0, self.n_items - 1)
        ids = np.where(rows >= FIRST_ITEM_ROW, self.wire_ids[items], self._ids.missing)
        return ids.astype(self._ids.dtype, copy=False)


def read_transform(file: Path) -> dict[str, Any]:
    """Return the validated content of ``session_transform.json``.

    Raises
    ------
    BundleError
        The file is missing, is not JSON, or is of another format.
    """
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        found = f"{file} cannot be read ({error.__cause__ or error})"
        raise BundleError(found, "the JSON file of missrec etl", "re-run `missrec etl`") from error
    TransformSettings.from_dict(content)
    return content


def encode_ids(ids: Sequence[RawId], id_type: str) -> AnyArray:
    """Return raw ids as a request tensor holds them.

    Parameters
    ----------
    ids : sequence of str, int or None
        One session.
    id_type : {"string", "int64"}
        Type of the catalogue's ids.

    Raises
    ------
    DataError
        An id is of another type, an integer does not fit 64 bits, or a string is not valid Unicode.

    Examples
    --------
    >>> encode_ids(["lamp", None], "string").tolist()
    [b'lamp', b'']
    """
    kind = _KINDS[id_type]
    encoded = []
    for raw in ids:
        wire_id = kind.missing if raw is None else kind.encode(raw)
        if wire_id is None:
            raise DataError(
                f"item id {raw!r} is of type {type(raw).__name__}",
                f"{kind.called[0]}, the type of this catalogue's ids",
                "send the ids exactly as the item table has them",
            )
        encoded.append(wire_id)
    return np.array(encoded, kind.dtype)
