"""Ranking of a batch on a GPU: query, filters, exclusions, score terms and search of all sessions at once.

Everything that is known of a batch goes to the device in one copy, and one result comes back. What decides the course
of the work (empty sessions, filters, caps, the terms in use) is read on the host, so that nothing waits for the device
in between (a content-kNN term with very long lists does, once). A CPU runs the same code.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.device_search import Batch, DeviceItems, exact_products, search_together, upload
from missrec_t4r.retrieval.filters import ItemColumns, Rules, Where, capped
from missrec_t4r.retrieval.topk import Found, Query
from missrec_t4r.schema import PADDING_ROW

EncodeBatch = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Sessions [batch, seq] and their event features -> vectors [batch, dim]; zero for a session without items."""

_DEEPER = 4
"""Lists from which caps take items are searched so many times as deep, and again when too few are left."""
_MASK_BYTES = 1 << 26
"""Bytes of filters' masks that are kept on the device."""


class DeviceRanker:
    """Best items of a batch of sessions.

    Parameters
    ----------
    items : DeviceItems
    model : MISSRec
        In evaluation mode, on the device of the items; its score terms must not change any more.
    popularity : Tensor [row]
        Scores of sessions without any known item.
    columns : ItemColumns
        Of the catalogue, for filters and caps.
    encode : callable
        The session encoder.
    """

    def __init__(
        self, items: DeviceItems, model: MISSRec, popularity: Tensor, columns: ItemColumns, encode: EncodeBatch
    ) -> None:
        self.items, self.popularity, self.columns, self.encode = items, popularity, columns, encode
        self.recommendable = model.recommendable
        self.terms = list(model.terms.in_use(training=False))
        self._masks: OrderedDict[Where, Tensor] = OrderedDict()
        self._alone = threading.Lock()

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
        known : ndarray [batch, seq], int64
            Compacted sessions.
        event_features : mapping of str to ndarray [batch, seq] or [batch, seq, size]
        banned : ndarray [batch, any], int64
            Rows that must not be returned, 0 for none.
        allow : ndarray [batch, any], int64, optional
            The only rows that may be returned; a line of zeros allows everything.
        wanted : ndarray [batch], int64
        rules : sequence of Rules
        """
        width = max(int((known > PADDING_ROW).sum(1).max(initial=0)), 1)
        known, event_features = known[:, :width], {name: values[:, :width] for name, values in event_features.items()}
        filters = list(dict.fromkeys(own.where for own in rules))
        which = np.array([filters.index(own.where) for own in rules], np.int64)
        device, lists = self.popularity.device, [known, banned, which, *(() if allow is None else (allow,))]
        uploaded = upload([*lists, *event_features.values()], device)
        session, ban, filter_of = uploaded[:3]
        only = None if allow is None or not (allow > PADDING_ROW).any() else uploaded[3]
        features = dict(zip(event_features, uploaded[len(lists) :], strict=True))
        added = self._added(session, ~(known > PADDING_ROW).any(1))
        allowed = self._allowed(ban, only, filters, filter_of)
        query = Query(self.encode(session, features), added, allowed)
        k = int(wanted.max()) * (_DEEPER if any(own.at_most for own in rules) else 1)
        best = search_together(self.items, query, k)
        for line, own in enumerate(rules):
            if own.at_most:
                one = Query(*(part[line : line + 1] for part in query))
                best.found[line] = self._capped(one, best.found[line], k, int(wanted[line]), own)
        return best

    def _added(self, session: Tensor, empty: AnyArray) -> Tensor:
        """Return what is added to the network's scores, [batch, row]; one zero, expanded, where nothing is."""
        shape = len(session), self.items.table.n_rows
        if not self.terms and not empty.any():
            return torch.zeros(1, 1, device=session.device).expand(shape)
        added = torch.zeros(shape, device=session.device)
        earlier: dict[str, Tensor] = {}
        for term in self.terms:
            added = term.add_to(added, session, earlier)
        if empty.any():
            added = torch.where((session > PADDING_ROW).any(1, keepdim=True), added, self.popularity)
        return added

    def _allowed(self, banned: Tensor, only: Tensor | None, filters: Sequence[Where], filter_of: Tensor) -> Tensor:
        """Return the rows that may be returned, [batch, row], bool."""
        allowed = self.recommendable.repeat(len(banned), 1).scatter_(1, banned, False)
        if only is not None:
            listed = torch.zeros_like(allowed).scatter_(1, only, True)
            allowed &= listed | ~(only > PADDING_ROW).any(1, keepdim=True)
        if any(filters):
            allowed &= torch.stack([self._mask(where) for where in filters])[filter_of]
        return allowed

    def _mask(self, where: Where) -> Tensor:
        """Return the rows that pass a filter, [row], on the device; those of repeated filters stay there."""
        with self._alone:
            if where in self._masks:
                self._masks.move_to_end(where)
                return self._masks[where]
            (mask,) = upload([self.columns.passing(where)], self.popularity.device)
            if not where:
                mask = torch.ones_like(mask)
            self._masks[where] = mask
            while len(self._masks) * len(mask) > _MASK_BYTES and len(self._masks) > 1:
                self._masks.popitem(last=False)
            return mask

    def _capped(self, query: Query, found: Found, searched: int, k: int, rules: Rules) -> Found:
        """Return the k best items within the diversity caps, searching as deep as needed."""
        caps = [(self.columns.groups(column), cap) for column, cap in rules.at_most]
        while True:
            places = capped(found.rows.tolist(), caps, k)
            if len(places) == k or len(found.rows) < searched:
                return Found(found.scores[places], found.rows[places], found.scored)
            searched *= _DEEPER
            (found,) = search_together(self.items, query, searched).found
