"""Typed requests and answers and the tensors that carry them; the same for every client, whichever way it asks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from missrec_t4r.bundle.id_encoder import NULL_INTEGER, NULL_STRING, RawId, encode_ids
from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.serving.event_features import SessionEventFeatures, write_event_features

OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "fallback", "n_passed", "catalogue_version")
RULES_EXAMPLE = '{"where": {"in_stock": true, "price": {"max": 20}}, "at_most": {"brand": 2}}'
REASON_OUTPUTS = ("reason_item", "reason_modality")

Session = Sequence[RawId]


class Reason(NamedTuple):
    """Why an item is recommended."""

    item_id: str | int | None
    """The session's item without which it would score lowest; None for a fallback."""
    modality: str
    """The modality that weighs most in its score; ``id`` where only its ID embedding speaks."""


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
    n_passed: int = 0
    """Items that the rules let through before the caps: how many could have been recommended."""
    catalogue_version: str = ""
    """Which catalogue answered; the same for the same items and vectors."""
    reasons: list[Reason] = field(default_factory=list)
    """One per item, if they were asked for."""


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request asks for beside the number of items; the rules are those of ``triton_models/README.md``.

    Examples
    --------
    >>> RequestOptions(exclude=["lamp"], rules={"where": {"in_stock": True}, "at_most": {"brand": 2}}).given
    ['exclude', 'rules']
    """

    exclude_seen: bool = False
    """Leave out the items of the session itself."""
    exclude: Session | Sequence[Session] | None = None
    """Ids that must not be recommended: one list for all sessions, or a list per session."""
    allow: Session | Sequence[Session] | None = None
    """The only ids that may be recommended, in the same form; an empty list allows everything."""
    rules: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    """Filters over the catalogue's columns and caps: one mapping for all sessions, or one per session."""
    reasons: bool = False
    """Also say why; costs the server one pass of the model per different item of the session."""
    side: Sequence[SessionEventFeatures | None] | None = None
    """Side features of every session: raw values by column, one per item id, None where it is not known."""

    @property
    def given(self) -> list[str]:
        """Names of the rules that are set."""
        return [name for name in ("exclude", "allow", "rules", "side") if getattr(self, name) is not None]


NO_OPTIONS = RequestOptions()


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
    sessions: Sequence[Session], top_k: int, described: Description, wishes: RequestOptions = NO_OPTIONS
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield the requests that a call makes: ids encoded, sessions padded, split by the largest batch.

    Raises
    ------
    DataError
        An id is of the wrong type; the session is named. Or as many lists are needed as there are sessions.
    """
    encoded = [_encoded(f"session {index}", session, described.id_type) for index, session in enumerate(sessions)]
    listed = {
        name: _per_session(name, getattr(wishes, name), len(sessions), described.id_type)
        for name in ("exclude", "allow")
        if getattr(wishes, name) is not None
    }
    rules = None if wishes.rules is None else _rules(wishes.rules, len(sessions))
    told = None if wishes.side is None else [write_event_features(own) for own in wishes.side]
    if told is not None and len(told) != len(sessions):
        raise DataError(f"side features of {len(told)} sessions for {len(sessions)}", "one mapping or None per session")
    for start in range(0, len(encoded), described.max_batch_size):
        mine = slice(start, start + described.max_batch_size)
        item_ids, length = pad_sessions(encoded[mine], described.id_type)
        request: dict[str, npt.NDArray[Any]] = {
            "item_ids": item_ids,
            "length": length,
            "top_k": np.full_like(length, top_k),
            "exclude_seen": np.full(length.shape, wishes.exclude_seen),
        }
        request |= {name: _filled_up(lists[mine], described.id_type) for name, lists in listed.items()}
        if rules is not None:
            request["rules"] = np.array(rules[mine], object)[:, None]
        if told is not None and any(told):
            request["side"] = np.array(told[mine], object)[:, None]
        if wishes.reasons:
            request["reasons"] = np.full(length.shape, True)
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


def outputs_for(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors that answer a request."""
    return OUTPUTS + REASON_OUTPUTS if "reasons" in request else OUTPUTS


def recommendations_of(outputs: Mapping[str, npt.NDArray[Any]], asked: int) -> list[Recommendation]:
    """Return one answer per session of a request.

    Raises
    ------
    ServingError
        The server answered another number of sessions than ``asked``: the answer is somebody else's.
    """
    if len(outputs["n_items"]) != asked:
        found = f"answers to {len(outputs['n_items'])} sessions"
        raise ServingError(found, f"{asked}, as asked", "the server is about to fail: ask again")
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


def json_option(text: str | None, option: str) -> dict[str, Any] | None:
    """Return an object that came as JSON, from a command line; the server checks what it says.

    Raises
    ------
    DataError
        It is no JSON object.
    """
    if text is None:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{option} is no JSON ({error})", "an object, such as " + RULES_EXAMPLE) from error
    if not isinstance(content, dict):
        raise DataError(f"{option} {text!r}", "an object, such as " + RULES_EXAMPLE)
    return content


def _encoded(what: str, session: Session, id_type: str) -> npt.NDArray[Any]:
    try:
        return encode_ids(session, id_type)
    except DataError as error:
        raise DataError(f"{what}: {error.found}", error.expected, error.cure) from error


def _per_session(name: str, given: Any, n_sessions: int, id_type: str) -> list[npt.NDArray[Any]]:
    if isinstance(given, str) or any(not isinstance(entry, (str, int, list, tuple, type(None))) for entry in given):
        raise DataError(f"{name} is no list of item ids", "ids for all sessions, or a list of ids per session")
    if not any(isinstance(entry, (list, tuple)) for entry in given):
        return [_encoded(name, given, id_type)] * n_sessions
    if len(given) != n_sessions:
        raise DataError(f"{name} holds {len(given)} lists for {n_sessions} sessions", "one per session, or one of ids")
    return [_encoded(f"{name} {index}", ids, id_type) for index, ids in enumerate(given)]


def _filled_up(lists: Sequence[npt.NDArray[Any]], id_type: str) -> npt.NDArray[Any]:
    """Return lists of ids as one tensor [batch, width], filled up with the missing id, which matches nothing."""
    shape = (len(lists), max(1, *(len(ids) for ids in lists)))
    missing = encode_ids([None], id_type)[0]
    filled: npt.NDArray[Any] = np.full(shape, missing, object if id_type == "string" else np.int64)
    for line, ids in zip(filled, lists, strict=True):
        line[: len(ids)] = ids
    return filled


def _rules(rules: Any, n_sessions: int) -> list[bytes]:
    each = [rules] * n_sessions if isinstance(rules, Mapping) else list(rules)
    if len(each) != n_sessions:
        raise DataError(f"{len(each)} rules for {n_sessions} sessions", "one mapping per session, or one for all")
    try:
        return [json.dumps(one, allow_nan=False).encode() if one else b"" for one in each]
    except (TypeError, ValueError) as error:
        raise DataError(f"rules cannot be sent ({error})", "an object, such as " + RULES_EXAMPLE) from error


def _recommendation(outputs: Mapping[str, npt.NDArray[Any]], index: int) -> Recommendation:
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
