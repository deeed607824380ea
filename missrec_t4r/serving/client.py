"""The typed client: sessions of raw item ids in, recommendations out, over gRPC or HTTP.

It asks the server once for the type of the ids and the largest batch, then pads, splits and reassembles requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.doors import in_words, open_door
from missrec_t4r.serving.session_transform import RawId, encode_ids

OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "fallback")


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


class MISSRecClient:
    """Connection to a Triton server with our model repository.

    Parameters
    ----------
    url : str
        ``host:port``; Triton's defaults are 8001 for gRPC and 8000 for HTTP.
    protocol : {"grpc", "http"}
        A gRPC client may be shared by threads; make one HTTP client per thread.
    timeout : float
        Seconds per request.
    model : str
        Name of the ensemble.

    Examples
    --------
    >>> with MISSRecClient("localhost:8001") as client:                                          # doctest: +SKIP
    ...     client.recommend([["B00TNNWMXI", "B00IBZE2EQ"]], top_k=3)[0].item_ids
    """

    def __init__(self, url: str, protocol: str = "grpc", *, timeout: float = 10.0, model: str = "missrec") -> None:
        self.url, self.model, self.timeout = url, model, timeout
        self._door = open_door(url, protocol, timeout)

    def __enter__(self) -> MISSRecClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._door.close()

    @cached_property
    def _description(self) -> tuple[str, int]:
        with in_words(self.url, self.model, self.timeout):
            types, batch_size = self._door.describe(self.model)
        known = {"BYTES": "string", "INT64": "int64"}
        if types.get("item_ids") not in known:
            raise ServingError(
                f"model {self.model!r} at {self.url} has inputs {types}",
                "an input item_ids of strings or 64-bit integers",
                "serve a repository of `missrec export --triton`",
            )
        return known[types["item_ids"]], max(batch_size, 1)

    @property
    def id_type(self) -> str:
        """``"string"`` or ``"int64"``: the type of the served catalogue's ids."""
        return self._description[0]

    @property
    def max_batch_size(self) -> int:
        """Sessions that one request may hold; larger calls are split."""
        return self._description[1]

    def recommend(
        self, sessions: Sequence[Sequence[RawId]], top_k: int = 10, *, exclude_seen: bool = False
    ) -> list[Recommendation]:
        """Recommend items for every session.

        Parameters
        ----------
        sessions : sequence of sequences of str, int or None
            Raw ids in the order of time, of the catalogue's type; None is an event without id.
        top_k : int
            Items wanted per session.
        exclude_seen : bool
            Leave out the items of the session itself.

        Returns
        -------
        list of Recommendation
            In the order of the sessions.

        Raises
        ------
        DataError
            An id is of the wrong type; the session is named.
        ServingError
            The server cannot be reached, is not ready, is too slow, or refuses the request.
        """
        if isinstance(sessions, str) or any(isinstance(session, str) for session in sessions):
            raise DataError("a session given as one string", "a list of item ids per session", "wrap the ids in a list")
        if not 1 <= top_k <= np.iinfo(np.int32).max:
            raise ServingError(f"top_k is {top_k}", "at least 1", "ask for one item or more")
        encoded = [_encoded(index, session, self.id_type) for index, session in enumerate(sessions)]
        answers: list[Recommendation] = []
        for start in range(0, len(encoded), self.max_batch_size):
            part = encoded[start : start + self.max_batch_size]
            answers += self._ask(part, top_k, exclude_seen)
        return answers

    def _ask(self, sessions: list[npt.NDArray[Any]], top_k: int, exclude_seen: bool) -> list[Recommendation]:
        item_ids, length = pad_sessions(sessions, self.id_type)
        inputs = {
            "item_ids": item_ids,
            "length": length,
            "top_k": np.full_like(length, top_k),
            "exclude_seen": np.full(length.shape, exclude_seen),
        }
        with in_words(self.url, self.model, self.timeout):
            outputs = self._door.infer(self.model, inputs, OUTPUTS)
        return [_recommendation(outputs, index) for index in range(len(sessions))]


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


def recommend(
    url: str,
    items: Sequence[str | int],
    top_k: int = 10,
    *,
    protocol: str = "grpc",
    exclude_seen: bool = False,
    catalogue: str | Path | None = None,
    timeout: float = 10.0,
) -> dict[str, Any]:
    """Answer one session, as the command line asks.

    Parameters
    ----------
    url : str
    items : sequence of str or int
        Raw ids; text is turned into integers where the catalogue's ids are integers.
    top_k : int
    protocol : {"grpc", "http"}
    exclude_seen : bool
    catalogue : path, optional
        A bundle, catalogue folder or parquet file with ``item_id`` and ``title``: titles are added.
    timeout : float

    Returns
    -------
    dict
        ``recommendations`` (``item_id``, ``score`` and ``title``), ``unknown_items``, ``fallback``.
    """
    titles = {} if catalogue is None else read_titles(Path(catalogue))
    with MISSRecClient(url, protocol, timeout=timeout) as client:
        session: list[RawId] = [_typed(item, client.id_type) for item in items]
        answer = client.recommend([session], top_k, exclude_seen=exclude_seen)[0]
    found = [
        {"item_id": item_id, "score": score} | ({"title": titles[item_id]} if item_id in titles else {})
        for item_id, score in zip(answer.item_ids, answer.scores, strict=True)
    ]
    return {"recommendations": found, "unknown_items": answer.unknown_items, "fallback": answer.fallback}


def read_titles(place: Path) -> dict[str | int, str]:
    """Return the titles of a bundle, a catalogue folder or a parquet file; none if it has no column ``title``."""
    file = place / "items.parquet" if place.is_dir() else place
    if not file.is_file():
        raise DataError(
            f"{file} does not exist", "an item table", "pass a bundle, a catalogue folder or a parquet file"
        )
    names = pq.read_schema(file).names
    if not {ITEM_ID, "title"} <= set(names):
        return {}
    table = pq.read_table(file, columns=[ITEM_ID, "title"])
    pairs = zip(table[ITEM_ID].to_pylist(), table["title"].to_pylist(), strict=True)
    return {item_id: str(title) for item_id, title in pairs if title is not None}


def _encoded(index: int, session: Sequence[RawId], id_type: str) -> npt.NDArray[Any]:
    try:
        return encode_ids(session, id_type)
    except DataError as error:
        raise DataError(f"session {index}: {error.found}", error.expected, error.cure) from error


def _typed(item: str | int, id_type: str) -> str | int:
    if id_type == "string":
        return str(item)
    try:
        return int(item)
    except ValueError as error:
        raise DataError(f"item id {item!r}", "an integer, the type of this catalogue's ids", "check --items") from error


def _recommendation(outputs: dict[str, npt.NDArray[Any]], index: int) -> Recommendation:
    n_items = int(outputs["n_items"][index, 0])
    item_ids = outputs["item_id"][index, :n_items].tolist()
    return Recommendation(
        [item_id.decode("utf-8") if isinstance(item_id, bytes) else item_id for item_id in item_ids],
        outputs["score"][index, :n_items].tolist(),
        int(outputs["n_unknown"][index, 0]),
        bool(outputs["fallback"][index, 0]),
    )
