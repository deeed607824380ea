"""Raw item ids to catalogue rows, as the fitted NVTabular workflow does it, in numpy alone.

The request workflow is ``Categorify(vocabs=) >> slice to the last max_sequence_length``: every id is looked up first
(unknown ids become row 2) and the session is cut afterwards, so unknown ids take part in the cut. A missing id inside
a list is row 2 as well: that is what Categorify does with list columns (row 1 it gives to missing ids of single
events only, and it refuses missing ids in integer lists altogether). The ranker drops both kinds and counts them.
Its settings are a small JSON file, its vocabulary is the catalogue's order; nothing is unpickled. One session of
twenty ids takes microseconds where NVTabular's executor takes tens of milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from missrec_t4r.errors import BundleError, DataError
from missrec_t4r.schema import FIRST_ITEM_ROW, NULL_ROW, PADDING_ROW, SESSION_TRANSFORM_FILE, UNKNOWN_ROW

FORMAT_VERSION = 1

NULL_STRING = b""
"""Stands for a missing id in a string tensor, which has no null of its own; no item may be called so."""
NULL_INTEGER = int(np.iinfo(np.int64).min)
"""Stands for a missing id in an integer tensor; no item may be called so."""

Rows = npt.NDArray[np.int64]
RawId = str | int | None


@dataclass(frozen=True)
class TransformSettings:
    """Content of ``session_transform.json``, checked."""

    id_type: Literal["string", "int64"]
    """Type of raw ids."""
    max_sequence_length: int
    """Rows that the model sees, the most recent ones."""

    @classmethod
    def from_dict(cls, content: Any) -> TransformSettings:
        """Check what the file says; the reserved rows are fixed by the schema and must agree with it.

        Raises
        ------
        BundleError
            Another format version, other reserved rows, or a missing entry.
        """
        try:
            item, length = content["item_id"], content["max_sequence_length"]
            found = (content["format"], item["null_row"], item["unknown_row"], item["first_row"])
            id_type = item["type"]
        except (KeyError, TypeError) as error:
            raise BundleError(f"{SESSION_TRANSFORM_FILE} lacks the entry {error}", "", "re-run missrec etl") from error
        expected = (FORMAT_VERSION, NULL_ROW, UNKNOWN_ROW, FIRST_ITEM_ROW)
        if found != expected or id_type not in ("string", "int64") or type(length) is not int or length < 1:
            raise BundleError(
                f"{SESSION_TRANSFORM_FILE} says (format, null, unknown, first row) = {found}, type {id_type!r}, "
                f"max_sequence_length {length!r}",
                f"{expected}, type 'string' or 'int64', a length of at least 1",
                "export with the version that wrote the data folder",
            )
        return cls(id_type, length)


class SessionTransform:
    """The compiled request transform.

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
        ids = vocabulary if isinstance(vocabulary, pa.Array) else pa.array(vocabulary)
        if settings.id_type == "string":
            self.wire_ids: npt.NDArray[Any] = np.array(ids.cast(pa.binary()).to_pylist(), object)
            self._row_of = {raw: row for row, raw in enumerate(self.wire_ids, start=FIRST_ITEM_ROW)}
        else:
            self.wire_ids = np.asarray(ids.cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)
            self._order = np.argsort(self.wire_ids, kind="stable")
            self._sorted = self.wire_ids[self._order]
        self._check_vocabulary()

    @classmethod
    def load(cls, file: Path, vocabulary: pa.Array) -> SessionTransform:
        """Read ``session_transform.json``.

        Raises
        ------
        BundleError
            The file is missing, is no JSON, or is of another format.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{file} cannot be read ({error})", "the JSON file of missrec etl") from error
        return cls(TransformSettings.from_dict(content), vocabulary)

    @property
    def max_sequence_length(self) -> int:
        """Rows that the model sees, the most recent ones."""
        return self.settings.max_sequence_length

    def __call__(self, *sessions: Sequence[RawId]) -> list[Rows]:
        """Return the rows of ragged sessions of raw ids, each cut to its last ``max_sequence_length``."""
        return [self.look_up(self.to_wire(session))[-self.max_sequence_length :] for session in sessions]

    def to_wire(self, ids: Sequence[RawId]) -> npt.NDArray[Any]:
        """Return ids as a request tensor carries them: bytes or int64, with the agreed stand-in for a missing id.

        Raises
        ------
        DataError
            An id is not of the catalogue's type.
        """
        return encode_ids(ids, self.settings.id_type)

    def look_up(self, wire_ids: npt.NDArray[Any]) -> Rows:
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
        if self.settings.id_type == "string":
            row_of = self._row_of
            flat = [row_of.get(raw, UNKNOWN_ROW) for raw in wire_ids.flat]
            return np.array(flat, np.int64).reshape(wire_ids.shape)
        ids = np.asarray(wire_ids, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, ids), self.n_items - 1)
        return np.where(self._sorted[places] == ids, self._order[places] + FIRST_ITEM_ROW, UNKNOWN_ROW)

    def is_missing(self, wire_ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return where an id is the stand-in for a missing one, same shape."""
        filling: Any = NULL_STRING if self.settings.id_type == "string" else NULL_INTEGER
        return np.asarray(wire_ids == filling, bool)

    def padded(self, wire_ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> tuple[Rows, Rows]:
        """Transform a request: sessions padded to one width, and how many leading ids of each are real.

        Parameters
        ----------
        wire_ids : ndarray [batch, width]
            Bytes or int64; what stands at and after a session's length is ignored.
        lengths : ndarray [batch]
            Real ids per session.

        Returns
        -------
        rows : ndarray [batch, seq], int64
            Last ``max_sequence_length`` rows of every session, 0-padded on the right; seq is at least 1.
        seen : ndarray [batch, width], int64
            Rows of the whole sessions, 0-padded on the right: what "already seen" refers to.
        """
        batch, width = wire_ids.shape
        lengths = np.asarray(lengths, np.int64).reshape(batch)
        if batch and (lengths.min() < 0 or lengths.max() > width):
            raise DataError(f"a session length of {int(lengths.min())} to {int(lengths.max())}", f"0 to {width}")
        real = np.arange(width) < lengths[:, None]
        seen = np.full((batch, width), PADDING_ROW, np.int64)
        seen[real] = self.look_up(wire_ids[real])
        kept = np.minimum(lengths, self.max_sequence_length)
        steps = np.arange(max(int(kept.max(initial=0)), 1))
        if width == 0:
            return np.full((batch, 1), PADDING_ROW, np.int64), seen
        positions = np.minimum((lengths - kept)[:, None] + steps, width - 1)
        rows = np.where(steps < kept[:, None], np.take_along_axis(seen, positions, axis=1), PADDING_ROW)
        return rows, seen

    def wire_ids_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the raw ids of item rows (>= 3), same shape, as an answer carries them; others become filling."""
        filling: Any = NULL_STRING if self.settings.id_type == "string" else NULL_INTEGER
        items = np.clip(rows - FIRST_ITEM_ROW, 0, max(self.n_items - 1, 0))
        chosen = np.where(rows >= FIRST_ITEM_ROW, self.wire_ids[items], filling)
        return chosen if self.settings.id_type == "string" else chosen.astype(np.int64)

    def _check_vocabulary(self) -> None:
        strings = self.settings.id_type == "string"
        distinct = len(self._row_of) if strings else len(np.unique(self.wire_ids))
        if not self.n_items or distinct != self.n_items:
            raise BundleError(f"{self.n_items} item ids, {distinct} of them different", "at least one, all different")
        reserved = NULL_STRING in self._row_of if strings else self._sorted[0] == NULL_INTEGER
        if reserved:
            name = "the empty string" if strings else str(NULL_INTEGER)
            raise BundleError(f"an item id is {name}", "another id: this one stands for a missing id in requests")


def encode_ids(ids: Sequence[RawId], id_type: str) -> npt.NDArray[Any]:
    """Return raw ids as a request tensor carries them.

    Parameters
    ----------
    ids : sequence of str, int or None
        One session.
    id_type : {"string", "int64"}
        Type of the catalogue's ids.

    Raises
    ------
    DataError
        An id is of another type, an integer does not fit 64 bits, or a string is no valid Unicode.

    Examples
    --------
    >>> encode_ids(["lamp", None], "string").tolist()
    [b'lamp', b'']
    """
    encoded: list[bytes | int] = []
    for raw in ids:
        if raw is None:
            encoded.append(NULL_STRING if id_type == "string" else NULL_INTEGER)
        elif id_type == "string" and isinstance(raw, str):
            encoded.append(_utf8(raw))
        elif id_type == "int64" and isinstance(raw, (int, np.integer)) and not isinstance(raw, bool):
            encoded.append(_fitting(int(raw)))
        else:
            wanted = "strings" if id_type == "string" else "integers"
            raise DataError(
                f"item id {raw!r} is of type {type(raw).__name__}",
                f"{wanted}, the type of this catalogue's ids",
                "send the ids exactly as the item table has them",
            )
    return np.array(encoded, object if id_type == "string" else np.int64)


def _utf8(raw: str) -> bytes:
    try:
        return raw.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"item id {raw!r} is no valid Unicode", "text that UTF-8 can carry") from error


def _fitting(raw: int) -> int:
    if not NULL_INTEGER < raw <= np.iinfo(np.int64).max:
        raise DataError(f"item id {raw} does not fit", "a signed 64-bit integer above its minimum")
    return raw
