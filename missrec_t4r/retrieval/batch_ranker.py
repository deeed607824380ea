"""Ranking of a batch: query, filters, exclusions and score terms of all sessions at once, then a search.

Everything that is known of a batch goes to the device in one copy, and one result comes back. What decides the course
of the work (empty sessions, filters, caps, the terms in use) is read on the host, so that a GPU waits for nothing in
between (with a content-kNN term with very long lists it does, once).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.device_search import exact_products, upload
from missrec_t4r.retrieval.filters import ItemColumns, MaskCache, Rules, Where, capped, fingerprint
from missrec_t4r.retrieval.topk import Batch, Found, Query
from missrec_t4r.schema import PADDING_ROW

EncodeBatch = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Sessions [batch, seq] and their event features -> vectors [batch, dim]; zero for a session without items."""
Search = Callable[[Query, int], Batch]
"""A query and k -> the k best items of every session."""

_DEEPER = 4
"""Lists from which caps take items are searched so many times as deep, and again when too few are left."""


class BatchRanker:
    """Best items of a batch of sessions.

    Parameters
    ----------
    search : callable
    model : MISSRec
        In evaluation mode, on the device of the search.
    popularity : Tensor [row]
        Scores of sessions without any known item.
    columns : ItemColumns
        Of the catalogue, for filters and caps.
    encode : callable
        The session encoder.
    """

    def __init__(
        self,
        search: Search,
        model: MISSRec,
        popularity: Tensor,
        columns: ItemColumns,
        encode: EncodeBatch,
    ) -> None:
        self.search, self.model, self.popularity, self.columns, self.encode = search, model, popularity, columns, encode
        self._masks: MaskCache[Tensor] = MaskCache()  # of the filters of earlier batches

    @torch.inference_mode()
    @exact_products()
    def __call__(
        self,
        known: Ints,
        event_features: Mapping[str, AnyArray],
        banned: Ints,
        allow: Ints | None,
        wanted: Ints,
        rules: Sequence[Rules],
    ) -> Batch:
        """Return the best items of every session, at least ``wanted`` where there are so many.

        Parameters
        ----------
        known, event_features, banned, allow, rules
            As in `query`.
        wanted : ndarray [batch], int64
        """
        query = self.query(known, event_features, banned, allow, rules)
        k, has_caps = int(wanted.max()), np.array([bool(own.at_most) for own in rules])
        deep, device = k * _DEEPER, self.popularity.device
        is_mixed = has_caps.any() and not has_caps.all()
        if is_mixed and device.type == "cpu":  # to search as deep for the other sessions would cost more
            best = self.search(query, k)
            (lines,) = upload([np.flatnonzero(has_caps)], device)
            for line, found in zip(lines.tolist(), self.search(query.take(lines), deep).found, strict=True):
                best.found[line] = found
        else:  # on a GPU a second result would be waited for
            best = self.search(query, deep if has_caps.any() else k)
        for line in np.flatnonzero(has_caps).tolist():
            session = query.take(slice(line, line + 1))
            best.found[line] = self._capped(session, best.found[line], deep, int(wanted[line]), rules[line])
        return best

    @exact_products()
    def query(
        self,
        known: Ints,
        event_features: Mapping[str, AnyArray],
        banned: Ints | None = None,
        allow: Ints | None = None,
        rules: Sequence[Rules] = (),
    ) -> Query:
        """Return what is searched for.

        Parameters
        ----------
        known : ndarray [batch, seq], int64
            Compacted sessions.
        event_features : mapping of str to ndarray [batch, seq] or [batch, seq, size]
        banned : ndarray [batch, any], int64, optional
            Rows that must not be returned, 0 for none.
        allow : ndarray [batch, any], int64, optional
            The only rows that may be returned; a line of zeros allows everything.
        rules : sequence of Rules, one per session, optional
            Their filters; caps are no part of a query.
        """
        width = max(int((known > PADDING_ROW).sum(1).max(initial=0)), 1)
        known, event_features = known[:, :width], {name: values[:, :width] for name, values in event_features.items()}
        keys = [fingerprint(own.where) for own in rules] if any(own.where for own in rules) else []
        filters = dict(zip(keys, (own.where for own in rules), strict=False))
        filter_of = np.array([list(filters).index(key) for key in keys], np.int64)
        lists = [known, known[:, :0] if banned is None else banned, filter_of, *(() if allow is None else (allow,))]
        uploaded = upload([*lists, *event_features.values()], self.popularity.device)
        session, ban, filter_of_session = uploaded[:3]
        only = None if allow is None or not (allow > PADDING_ROW).any() else uploaded[3]
        features = dict(zip(event_features, uploaded[len(lists) :], strict=True))
        added = self._added(session, ~(known > PADDING_ROW).any(1))
        return Query(self.encode(session, features), added, self._allowed(ban, only, filters, filter_of_session))

    def _added(self, session: Tensor, empty: AnyArray) -> Tensor:
        """Return what is added to the network's scores, [batch, row]; one zero, expanded, where nothing is."""
        shape, terms = (len(session), len(self.popularity)), self.model.terms
        if not empty.any() and next(terms.in_use(training=False), None) is None:
            return torch.zeros(1, 1, device=session.device).expand(shape)
        added: Tensor = terms(torch.zeros(shape, device=session.device), session)
        if empty.any():
            added = torch.where((session > PADDING_ROW).any(1, keepdim=True), added, self.popularity)
        return added

    def _allowed(
        self, banned: Tensor, only: Tensor | None, filters: Mapping[bytes, Where], filter_of: Tensor
    ) -> Tensor:
        """Return the rows that may be returned, [batch, row], bool."""
        allowed = self.model.recommendable.repeat(len(banned), 1).scatter_(1, banned, False)
        if only is not None:
            listed = torch.zeros_like(allowed).scatter_(1, only, True)
            allowed &= listed | ~(only > PADDING_ROW).any(1, keepdim=True)
        if filters:
            masks = [self._mask(key, where) for key, where in filters.items()]
            allowed &= masks[0] if len(masks) == 1 else torch.stack(masks)[filter_of]
        return allowed

    def _mask(self, key: bytes, where: Where) -> Tensor:
        """Return the rows that pass a filter, [row], on the device."""
        return self._masks.get(key, lambda: upload([self.columns.passing(where)], self.popularity.device)[0])

    def _capped(self, query: Query, found: Found, searched: int, k: int, rules: Rules) -> Found:
        """Return the k best items within the diversity caps, searching as deep as needed."""
        caps = [(self.columns.groups(column), cap) for column, cap in rules.at_most]
        while True:
            places = capped(found.rows.tolist(), caps, k)
            if len(places) == k or len(found.rows) < searched:
                return Found(found.scores[places], found.rows[places], found.scored)
            searched *= _DEEPER
            (found,) = self.search(query, searched).found
