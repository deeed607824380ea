"""Typed requests and recommendations, and their encoding as tensors; shared by all clients and transports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from missrec_t4r.arrays import AnyArray
from missrec_t4r.bundle.id_encoder import NULL_INTEGER, NULL_STRING, RawId, encode_ids
from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.serving.event_features import SessionEventFeatures, write_event_features

OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "fallback", "n_passed", "catalogue_version")
RULES_EXAMPLE = '{"where": {"in_stock": true, "price": {"max": 20}}, "at_most": {"brand": 2}}'
SIDE_EXAMPLE = '{"event_type": ["view", "cart"]}'
REASON_OUTPUTS = ("reason_item", "reason_modality")

Session = Sequence[RawId]


class Reason(NamedTuple):
    """Explanation of one recommended item."""

    item_id: str | int | None
    """Item of the session whose removal would lower the score most; None for a fallback."""
    modality: str
    """``bought together`` where co-occurrence with that item counts for more than the network, else the modality with
    the largest weight in the network's score; ``id`` for an item that has an ID embedding only."""


@dataclass(frozen=True)
class Recommendation:
    """Recommended items of one session."""

    item_ids: list[str] | list[int]
    """Raw ids, best first; fewer than ``top_k`` when fewer can be recommended."""
    scores: list[float]
    """One per item: the model's score before the temperature, or popularity in [0, 1] for a fallback."""
    unknown_items: int
    """Ids of the session's last ``max_sequence_length`` that are missing or unknown; the model ignores them."""
    fallback: bool
    """True when no id is known: these are the most popular items."""
    n_passed: int = 0
    """Items that pass the filters, before the diversity caps."""
    catalogue_version: str = ""
    """Version of the served catalogue; equal for equal items and vectors."""
    reasons: list[Reason] = field(default_factory=list)
    """One explanation per item, if the request has ``reasons``."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Options of a request beside the number of items; ``triton_models/README.md`` defines the business rules."""

    exclude_seen: bool = False
    """Exclude the items of the session itself."""
    exclude: Session | Sequence[Session] | None = None
    """Ids that must not be recommended: one list for all sessions, or a list or None per session."""
    allow: Session | Sequence[Session] | None = None
    """The only ids that may be recommended, in the same form. None allows everything; a list without an id is refused,
    since on the wire it would do so, too."""
    rules: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    """Filters over the catalogue's columns and diversity caps: one mapping for all sessions, or one per session."""
    reasons: bool = False
    """Explain every recommendation; costs the server one forward pass per distinct item of the session."""
    side: Sequence[SessionEventFeatures | None] | None = None
    """Event features of every session: raw values by column, one per item id, None where it is unknown."""


NO_OPTIONS = RequestOptions()


@dataclass(frozen=True)
class Description:
    """Properties of the served model that a client needs."""

    id_type: str
    """Type of the catalogue's ids: ``"string"`` or ``"int64"``."""
    max_batch_size: int
    """Most sessions of one request; larger calls are split."""
    inputs: frozenset[str]
    """Names of the tensors that a request may have."""

    @classmethod
    def of(cls, types: Mapping[str, str], batch_size: int, where: str) -> Description:
        """Return the description of a model with these input types.

        Parameters
        ----------
        types : mapping of str to str
            Triton's data type of every input.
        batch_size : int
            Most sessions of one request.
        where : str
            Name and address of the model, for the error.

        Raises
        ------
        ServingError
            The model is no MISSRec ensemble.
        """
        id_types = {"BYTES": "string", "INT64": "int64"}
        if types.get("item_ids") not in id_types:
            raise ServingError(
                f"{where} has inputs {dict(types)}",
                "an input item_ids of strings or 64-bit integers",
                "serve a repository of `missrec export --triton`",
            )
        return cls(id_types[types["item_ids"]], max(batch_size, 1), frozenset(types))


def check_call(sessions: Sequence[Session], top_k: int) -> None:
    """Check a call's arguments before anything is sent.

    Raises
    ------
    DataError
        A session is a string or a number, not a list of ids.
    ServingError
        ``top_k`` is no whole number, below one, or exceeds 32 bits.
    """
    expected = ("a list of item ids per session", "wrap the ids in a list")
    if not isinstance(sessions, Iterable) or isinstance(sessions, Iterator):  # which gives its sessions once
        raise DataError(f"sessions is {sessions!r}", *expected)
    if isinstance(sessions, str | bytes) or any(isinstance(session, str | bytes) for session in sessions):
        raise DataError("a session given as one string", *expected)
    for index, session in enumerate(sessions):
        if not isinstance(session, Iterable):
            raise DataError(f"session {index} is {session!r}", *expected)
    if not isinstance(top_k, int | np.integer) or not 1 <= top_k <= np.iinfo(np.int32).max:
        raise ServingError(f"top_k is {top_k!r}", "a whole number of at least 1", "request one item or more")


def requests_of(
    sessions: Sequence[Session], top_k: int, description: Description, options: RequestOptions = NO_OPTIONS
) -> Iterator[dict[str, AnyArray]]:
    """Yield the requests of a call: ids encoded, sessions padded, split by the largest batch.

    Raises
    ------
    DataError
        An id is of the wrong type; the session is named. Or a per-session option has another number of entries.
    """
    id_type = description.id_type
    encoded = [_encoded(f"session {index}", session, id_type) for index, session in enumerate(sessions)]
    id_lists = {
        name: _per_session(name, getattr(options, name), len(sessions), id_type)
        for name in ("exclude", "allow")
        if getattr(options, name) is not None
    }
    rules = None if options.rules is None else _rules(options.rules, len(sessions))
    if isinstance(options.side, Mapping):
        raise DataError("event features in one mapping", "one mapping or None per session", "put it into a list")
    side = None if options.side is None else [write_event_features(features) for features in options.side]
    if side is not None and len(side) != len(sessions):
        raise DataError(
            f"event features of {len(side)} sessions for {len(sessions)}", "one mapping or None per session"
        )
    for start in range(0, len(encoded), description.max_batch_size):
        batch = slice(start, start + description.max_batch_size)
        item_ids, length = pad_sessions(encoded[batch], id_type)
        request: dict[str, AnyArray] = {
            "item_ids": item_ids,
            "length": length,
            "top_k": np.full_like(length, top_k),
            "exclude_seen": np.full(length.shape, options.exclude_seen),
        }
        request |= {name: _padded(lists[batch], id_type) for name, lists in id_lists.items()}
        if rules is not None:
            request["rules"] = np.array(rules[batch], object)[:, None]
        if side is not None and any(side):
            request["side"] = np.array(side[batch], object)[:, None]
        if options.reasons:
            request["reasons"] = np.full(length.shape, True)
        yield request


def pad_sessions(sessions: Sequence[AnyArray], id_type: str) -> tuple[AnyArray, npt.NDArray[np.int32]]:
    """Return the request tensors ``item_ids`` [batch, width] and ``length`` [batch, 1]; width is at least 1.

    Examples
    --------
    >>> pad_sessions([np.array([7, 8]), np.array([], np.int64)], "int64")[1].tolist()
    [[2], [0]]
    """
    return _padded(sessions, id_type), np.array([[len(session)] for session in sessions], np.int32)


def outputs_for(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the response's tensors."""
    return OUTPUTS + REASON_OUTPUTS if "reasons" in request else OUTPUTS


def recommendations_of(outputs: Mapping[str, AnyArray], n_sessions: int) -> list[Recommendation]:
    """Return one recommendation per session of a request.

    Raises
    ------
    ServingError
        The response has another number of sessions than the request: it belongs to another request.
    """
    if len(outputs["n_items"]) != n_sessions:
        found = f"a response for {len(outputs['n_items'])} sessions"
        raise ServingError(
            found,
            f"{n_sessions}, as requested",
            "send the request again: Triton mixed up responses, see docs/reliability.md",
        )
    return [_recommendation(outputs, index) for index in range(len(outputs["n_items"]))]


def typed_id(item: str | int, id_type: str) -> str | int:
    """Convert an id given as text, on a command line or a page, to the catalogue's type.

    Raises
    ------
    DataError
        The catalogue's ids are integers, and this is not one as it is written: "077" is not 77.
    """
    if id_type == "string":
        return str(item)
    with suppress(ValueError):
        if str(number := int(item)) == str(item):
            return number
    raise DataError(f"item id {item!r}", "an integer, the type of this catalogue's ids, such as 77", "check --items")


def json_option(text: str | None, option: str) -> dict[str, Any] | None:
    """Parse the JSON object of a command line option; the server validates its content.

    Raises
    ------
    DataError
        It is not a JSON object.
    """
    if text is None:
        return None
    expected = "an object, such as " + (SIDE_EXAMPLE if option == "--side" else RULES_EXAMPLE)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{option} is not JSON ({error})", expected) from error
    if not isinstance(content, dict):
        raise DataError(f"{option} {text!r}", expected)
    return content


def _encoded(what: str, session: Session, id_type: str) -> AnyArray:
    try:
        return encode_ids(session, id_type)
    except DataError as error:
        raise DataError(f"{what}: {error.found}", error.expected, error.cure) from error


def _per_session(name: str, option: Any, n_sessions: int, id_type: str) -> list[AnyArray]:
    """Return the encoded ids of an option by session: one list for all of them, or a list of each or None."""
    is_list = isinstance(option, Iterable) and not isinstance(option, str | bytes)
    option = [*option] if is_list else []  # a generator gives its ids once
    lists = [isinstance(entry, (list, tuple, np.ndarray)) for entry in option]
    is_mixed = any(lists) and not all(own or entry is None for own, entry in zip(lists, option, strict=True))
    if is_mixed or not is_list:
        raise DataError(f"{name} is not a list of item ids", "ids for all sessions, or a list of ids per session")
    if not any(lists):
        return [_id_list(name, option, id_type)] * n_sessions
    if len(option) != n_sessions:
        raise DataError(f"{name} holds {len(option)} lists for {n_sessions} sessions", "one per session, or one of ids")
    return [
        _id_list(f"{name} {index}", ids, id_type) if ids is not None else encode_ids([], id_type)
        for index, ids in enumerate(option)
    ]


def _id_list(what: str, ids: Session, id_type: str) -> AnyArray:
    """Return the encoded ids of ``exclude`` or ``allow``; without any, ``allow`` would let the server allow all."""
    encoded = _encoded(what, ids, id_type)
    if what.startswith("allow") and not (encoded != encode_ids([None], id_type)[0]).any():
        raise DataError(
            f"{what} holds no item id: nothing could be recommended",
            "at least one, or None where every item may be recommended",
            "leave out sessions that may get nothing",
        )
    return encoded


def _padded(lists: Sequence[AnyArray], id_type: str) -> AnyArray:
    """Return lists of ids as one tensor [batch, width], padded with the missing id, which matches no item."""
    shape = (len(lists), max([1, *map(len, lists)]))
    missing = encode_ids([None], id_type)[0]
    padded: AnyArray = np.full(shape, missing, object if id_type == "string" else np.int64)
    for row, ids in zip(padded, lists, strict=True):
        row[: len(ids)] = ids
    return padded


def _rules(rules: Any, n_sessions: int) -> list[bytes]:
    by_session = [rules] * n_sessions if isinstance(rules, Mapping) else list(rules)
    if len(by_session) != n_sessions:
        raise DataError(f"{len(by_session)} rules for {n_sessions} sessions", "one mapping per session, or one for all")
    try:
        return [json.dumps(own, allow_nan=False).encode() if own else b"" for own in by_session]
    except (TypeError, ValueError) as error:
        raise DataError(f"rules cannot be sent ({error})", "an object, such as " + RULES_EXAMPLE) from error


def _recommendation(outputs: Mapping[str, AnyArray], index: int) -> Recommendation:
    n_items = int(outputs["n_items"][index, 0])
    reasons = []
    if "reason_item" in outputs and outputs["reason_modality"][index, :n_items].any():
        pairs = zip(outputs["reason_item"][index, :n_items], outputs["reason_modality"][index, :n_items], strict=True)
        reasons = [Reason(_raw(item), modality.decode()) for item, modality in pairs]
    return Recommendation(
        [_raw(item_id) for item_id in outputs["item_id"][index, :n_items]],  # type: ignore[arg-type]  # of one type
        outputs["score"][index, :n_items].tolist(),
        int(outputs["n_unknown"][index, 0]),
        bool(outputs["fallback"][index, 0]),
        int(outputs["n_passed"][index, 0]),
        outputs["catalogue_version"][index, 0].decode(),
        reasons,
    )


def _raw(wire_id: Any) -> str | int | None:
    if isinstance(wire_id, bytes):
        return wire_id.decode("utf-8") if wire_id != NULL_STRING else None
    return int(wire_id) if wire_id != NULL_INTEGER else None
