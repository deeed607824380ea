"""Typed client: sessions of raw item ids in, recommendations out, over gRPC or HTTP, or without a server.

It requests the type of the ids and the largest batch once, then pads sessions, splits them into requests and joins the
responses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import pyarrow.parquet as pq

from missrec_t4r.config.checks import require_at_least, require_positive
from missrec_t4r.data.titles import title_column_of
from missrec_t4r.errors import DataError
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.client.protocol import (
    Description,
    Recommendation,
    RequestOptions,
    Session,
    check_call,
    outputs_for,
    recommendations_of,
    requests_of,
    typed_id,
)
from missrec_t4r.serving.client.retry import Retries
from missrec_t4r.serving.client.transports import Transport, TritonTransport, translate_errors
from missrec_t4r.serving.event_features import SessionEventFeatures

log = logging.getLogger(__name__)
T = TypeVar("T")


class MISSRecClient:
    """Connection to a Triton server with our model repository.

    Parameters
    ----------
    url : str
        ``host:port``; Triton's defaults are 8001 for gRPC and 8000 for HTTP.
    protocol : {"grpc", "http"}
        Threads may share a gRPC client; make one HTTP client per thread.
    timeout : float
        Seconds per request.
    model : str
        Name of the served ensemble.
    retries : Retries, optional
        Attempts while the server is unavailable; ``Retries(attempts=1)`` never retries.
    transport : Transport, optional
        Used in place of a new connection to ``url``.

    Examples
    --------
    >>> with MISSRecClient("localhost:8001") as client:                                          # doctest: +SKIP
    ...     client.recommend([["P00042", "P00007"]], top_k=3)[0].item_ids
    """

    def __init__(
        self,
        url: str,
        protocol: str = "grpc",
        *,
        timeout: float = 10.0,
        model: str = "missrec",
        retries: Retries | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.url, self.model, self.timeout = url, model, timeout
        self.retries = Retries() if retries is None else retries
        self._transport = TritonTransport(url, protocol, timeout) if transport is None else transport

    @classmethod
    def of_bundle(cls, bundle: str | Path, *, threads: int | None = None) -> MISSRecClient:
        """Return a client without a server: the served models run in this process, on a verified bundle.

        Parameters
        ----------
        bundle : path
            Written by `missrec export`.
        threads : int, optional
            Threads of torch while a request runs; as many as this process has set, by default.
        """
        from missrec_t4r.serving.client.in_process import InProcessTransport  # here: clients of a server need no torch

        transport = InProcessTransport(Path(bundle), threads=threads)
        return cls(str(bundle), transport=transport, retries=Retries(attempts=1))

    def __enter__(self) -> MISSRecClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    @cached_property
    def description(self) -> Description:
        """Id type, batch size and inputs of the served model; requested once."""
        facts = self._call(lambda: self._transport.describe(self.model))
        return Description.of(*facts, f"model {self.model!r} at {self.url}")

    @property
    def id_type(self) -> str:
        """Type of the served catalogue's ids: ``"string"`` or ``"int64"``."""
        return self.description.id_type

    @property
    def max_batch_size(self) -> int:
        """Most sessions of one request; larger calls are split."""
        return self.description.max_batch_size

    def recommend(
        self,
        sessions: Sequence[Session],
        top_k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Session | Sequence[Session] | None = None,
        allow: Session | Sequence[Session] | None = None,
        rules: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        reasons: bool = False,
        side: Sequence[SessionEventFeatures | None] | None = None,
    ) -> list[Recommendation]:
        """Recommend items for every session.

        Parameters
        ----------
        sessions : sequence of sequences of str, int or None
            Raw ids in time order, of the catalogue's type; None is an event without id.
        top_k : int
            Items per session.
        exclude_seen : bool
            Exclude the items of the session itself.
        exclude : sequence of ids, or one such sequence or None per session, optional
            Items that must not be recommended.
        allow : sequence of ids, or one such sequence or None per session, optional
            The only items that may be recommended; None allows all, and a list without an id is refused.
        rules : mapping, or one mapping per session, optional
            Filters over the catalogue's columns, and diversity caps: how many recommended items may share a value,
            ``{"where": {"in_stock": True, "price": {"max": 20}}, "at_most": {"brand": 2}}``.
        reasons : bool
            Explain every recommendation: the session's item and the modality that contributed most.
        side : sequence of mappings or None, optional
            Event features of every session: raw values by column, one per item id, None where it is unknown.

        Returns
        -------
        list of Recommendation
            In the order of the sessions.

        Raises
        ------
        DataError
            An id is of the wrong type; the session is named.
        UnavailableError
            The server could not be reached, or was not ready, in any attempt.
        ServingError
            The server is too slow, has no such model, or refuses the request.
        """
        check_call(sessions, top_k)
        options = RequestOptions(
            exclude_seen=exclude_seen, exclude=exclude, allow=allow, rules=rules, reasons=reasons, side=side
        )
        recommendations: list[Recommendation] = []
        for request in requests_of(sessions, top_k, self.description, options):
            recommendations += recommendations_of(self.infer(request), len(request["length"]))
        return recommendations

    def infer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request, tensors by name, and return the response's tensors."""
        return self._call(lambda: self._transport.infer(self.model, request, outputs_for(request)))

    def _call(self, send: Callable[[], T]) -> T:
        def translated() -> T:
            with translate_errors(self.url, self.model, self.timeout):
                return send()

        return self.retries.call(translated, self.timeout)


def recommend(
    items: Sequence[str | int],
    *,
    url: str = "localhost:8001",
    protocol: Literal["grpc", "http"] = "grpc",
    top_k: int = 10,
    exclude_seen: bool = False,
    exclude: Sequence[str | int] | None = None,
    allow: Sequence[str | int] | None = None,
    rules: Mapping[str, Any] | None = None,
    reasons: bool = False,
    side: SessionEventFeatures | None = None,
    catalogue: str | Path | None = None,
    timeout: float = 10.0,
) -> dict[str, Any]:
    """Request recommendations for one session from a running server.

    Parameters
    ----------
    items : sequence of str or int
        Item ids of the session, oldest first; comma-separated.
    url : str
        Address of the server, host:port.
    protocol : {"grpc", "http"}
        Protocol of the request.
    top_k : int
        Number of recommendations.
    exclude_seen : bool
        Exclude the session's own items.
    exclude : sequence of str or int, optional
        Item ids never to recommend; comma-separated.
    allow : sequence of str or int, optional
        The only item ids that may be recommended; comma-separated.
    rules : mapping, optional
        Filters and diversity caps: {"where": {"in_stock": true}, "at_most": {"brand": 2}}.
    reasons : bool
        Explain every recommendation: the session's item and the modality that contributed most.
    side : mapping, optional
        Event features of the session, one value per item: {"event_type": ["view", "cart"]}.
    catalogue : path, optional
        Bundle, catalogue or deployment folder with item titles, which are added to the response.
    timeout : float
        Seconds to wait for the response.

    Returns
    -------
    dict
        ``recommendations`` (``item_id``, ``score``, ``title``, with reasons ``because_of`` and ``modality``),
        ``unknown_items``, ``fallback``, ``n_passed``, ``catalogue_version``.
    """
    require_at_least(1, top_k=top_k)
    require_positive(timeout=timeout)
    titles = {} if catalogue is None else read_titles(Path(catalogue))
    with MISSRecClient(url, protocol, timeout=timeout) as client:

        def typed(ids: Sequence[str | int] | None) -> list[str | int] | None:
            return None if ids is None else [typed_id(item, client.id_type) for item in ids]

        answer = client.recommend(
            [typed(items) or []],
            top_k,
            exclude_seen=exclude_seen,
            exclude=typed(exclude),
            allow=typed(allow),
            rules=rules,
            reasons=reasons,
            side=None if side is None else [side],
        )[0]
    recommendations = [
        {"item_id": item_id, "score": score} | ({"title": titles[item_id]} if item_id in titles else {})
        for item_id, score in zip(answer.item_ids, answer.scores, strict=True)
    ]
    for recommendation, reason in zip(recommendations, answer.reasons, strict=False):  # none unless asked for
        recommendation |= {"because_of": reason.item_id, "modality": reason.modality}
    if answer.unknown_items or answer.fallback:
        note = "; these are the most popular items" if answer.fallback else ""
        unknown = f"{answer.unknown_items} of {len(items)} ids unknown to the catalogue"
        log.warning("%s%s", unknown if answer.unknown_items else "the session has no item", note)
    if (n_found := len(recommendations)) < top_k:
        passed = f"{answer.n_passed} items of the catalogue pass --exclude, --allow and the filters"
        log.warning(f"{n_found} recommendations in place of --top-k {top_k}: {passed}")
    return {
        "recommendations": recommendations,
        "unknown_items": answer.unknown_items,
        "fallback": answer.fallback,
        "n_passed": answer.n_passed,
        "catalogue_version": answer.catalogue_version,
    }


def read_titles(source: Path) -> dict[str | int, str]:
    """Return the titles by item id; empty if no column holds titles (`missrec_t4r.data.titles`).

    Parameters
    ----------
    source : Path
        A bundle, a catalogue folder, a parquet file, or a deployment folder: the titles of its current version.

    Raises
    ------
    DataError
        There is no item table.
    """
    from missrec_t4r.serving.triton.deployment import served_bundle  # here: needs gRPC

    source = served_bundle(source)
    file = source / "items.parquet" if source.is_dir() else source
    if not file.is_file():
        raise DataError(
            f"{file} does not exist", "an item table", "pass a bundle, a catalogue folder or a parquet file"
        )
    names = pq.read_schema(file).names
    column = title_column_of(file.parent, names)
    if column is None or ITEM_ID not in names:
        return {}
    table = pq.read_table(file, columns=[ITEM_ID, column])
    pairs = zip(table[ITEM_ID].to_pylist(), table[column].to_pylist(), strict=True)
    return {item_id: str(title) for item_id, title in pairs if title is not None}
