"""Typed requests and answers and the tensors that carry them; the same for every client, whichever way it asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.serving.session_transform import RawId, encode_ids
from missrec_t4r.serving.side import SideOfSession, write_side

OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "fallback")

Session = Sequence[RawId]


@dataclass(frozen=True)
class Recommendation:
    """The answer to one session."""

    item_ids: list[str] | list[int]
    """Raw ids, best first; fewer than asked for when fewer can be recommended."""
    scores: list[float]
    """One per item: the model's score before the temperature, or popularity in [0, 1] for a fallback."""
    unknown_items: int
    """Ids of the session's last ``max_sequence_length`` that were missing or unknown, and so were ignored."""
    fallback: bool
    """True when no id was known: these are the most popular items."""


@dataclass(frozen=True)
class Description:
    """What a client has to know of the served model."""

    id_type: str
    """``"string"`` or ``"int64"``: the type of the catalogue's ids."""
    max_batch_size: int
    """Sessions that one request may hold; larger calls are split."""
    inputs: frozenset[str]
    """Names of the tensors that a request may carry."""

    @classmethod
    def of(cls, types: Mapping[str, str], batch_size: int, where: str) -> Description:
        """Read the model's metadata.

        Raises
        ------
        ServingError
            It is no model of ours.
        """
        known = {"BYTES": "string", "INT64": "int64"}
        if types.get("item_ids") not in known:
            raise ServingError(
                f"{where} has inputs {dict(types)}",
                "an input item_ids of strings or 64-bit integers",
                "serve a repository of `missrec export --triton`",
            )
        return cls(known[types["item_ids"]], max(batch_size, 1), frozenset(types))


def check_call(sessions: Sequence[Session], top_k: int) -> None:
    """Refuse what no server could answer, before one is asked.

    Raises
    ------
    DataError
        A session is a string, not a list of ids.
    ServingError
        ``top_k`` is below one or no 32-bit number.
    """
    if isinstance(sessions, str) or any(isinstance(session, str) for session in sessions):
        raise DataError("a session given as one string", "a list of item ids per session", "wrap the ids in a list")
    if not 1 <= top_k <= np.iinfo(np.int32).max:
        raise ServingError(f"top_k is {top_k}", "at least 1", "ask for one item or more")


def requests_of(
    sessions: Sequence[Session],
    top_k: int,
    described: Description,
    *,
    exclude_seen: bool = False,
    side: Sequence[SideOfSession | None] | None = None,
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield the requests that a call makes: ids encoded, sessions padded, split by the largest batch.

    Raises
    ------
    DataError
        An id is of the wrong type; the session is named. Or side features for another number of sessions.
    """
    told = None if side is None else [write_side(own) for own in side]
    if told is not None and len(told) != len(sessions):
        raise DataError(f"side features of {len(told)} sessions for {len(sessions)}", "one mapping or None per session")
    encoded = [_encoded(index, session, described.id_type) for index, session in enumerate(sessions)]
    for start in range(0, len(encoded), described.max_batch_size):
        item_ids, length = pad_sessions(encoded[start : start + described.max_batch_size], described.id_type)
        request: dict[str, npt.NDArray[Any]] = {
            "item_ids": item_ids,
            "length": length,
            "top_k": np.full_like(length, top_k),
            "exclude_seen": np.full(length.shape, exclude_seen),
        }
        if told is not None and any(told):
            request["side"] = np.array(told[start : start + described.max_batch_size], object)[:, None]
        yield request


def pad_sessions(sessions: Sequence[npt.NDArray[Any]], id_type: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """Return the request tensors ``item_ids`` [batch, width] and ``length`` [batch, 1]; width is at least 1.

    Examples
    --------
    >>> pad_sessions([np.array([7, 8]), np.array([], np.int64)], "int64")[1].tolist()
    [[2], [0]]
    """
    length = np.array([[len(session)] for session in sessions], np.int32)
    shape = (len(sessions), max(int(length.max(initial=0)), 1))
    item_ids: npt.NDArray[Any] = np.full(shape, b"", object) if id_type == "string" else np.zeros(shape, np.int64)
    for line, session in zip(item_ids, sessions, strict=True):
        line[: len(session)] = session
    return item_ids, length


def recommendations_of(outputs: Mapping[str, npt.NDArray[Any]]) -> list[Recommendation]:
    """Return one answer per session of a request."""
    return [_recommendation(outputs, index) for index in range(len(outputs["n_items"]))]


def typed_id(item: str | int, id_type: str) -> str | int:
    """Return an id that came as text, from a command line or a page, as the catalogue's type.

    Raises
    ------
    DataError
        The catalogue's ids are integers and this is none.
    """
    if id_type == "string":
        return str(item)
    try:
        return int(item)
    except ValueError as error:
        raise DataError(f"item id {item!r}", "an integer, the type of this catalogue's ids", "check --items") from error


def _encoded(index: int, session: Session, id_type: str) -> npt.NDArray[Any]:
    try:
        return encode_ids(session, id_type)
    except DataError as error:
        raise DataError(f"session {index}: {error.found}", error.expected, error.cure) from error


def _recommendation(outputs: Mapping[str, npt.NDArray[Any]], index: int) -> Recommendation:
    n_items = int(outputs["n_items"][index, 0])
    item_ids = outputs["item_id"][index, :n_items].tolist()
    return Recommendation(
        [item_id.decode("utf-8") if isinstance(item_id, bytes) else item_id for item_id in item_ids],
        outputs["score"][index, :n_items].tolist(),
        int(outputs["n_unknown"][index, 0]),
        bool(outputs["fallback"][index, 0]),
    )
