"""Content-kNN term: similarity of raw content to the session's items, added to the score when ranking (E19; ours).

Every candidate has a list of its most similar items. The list belongs to the candidate: a new item comes with a list of
its own and changes no other, so that a catalogue update leaves all other scores as they were. Its effect:
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model.score_terms import ScoreTerm
from missrec_t4r.ranking.similarity import centred, mean_similarity
from missrec_t4r.ranking.terms.history import recency
from missrec_t4r.schema import FIRST_ITEM_ROW

_SHARPNESS = 5.0
"""Inverse temperature of the softmax over a candidate's list; 5 and 10 rank alike (docs/experiments.md)."""
_CHUNK_BYTES = 1 << 26
_MOST_EDGES = 1 << 24
"""Up to so many edges of a batch, if all lists had the length of the longest, a GPU does not wait for their number."""


class ContentKNNSettings(NamedTuple):
    """Settings of the content-kNN term, chosen on validation."""

    weight: float
    """Factor of the term in score units; 0 switches it off."""
    decay: float
    """Weight of an item relative to the one after it in the session."""


class ContentKNNTerm(ScoreTerm):
    """Sum of content similarities between the session's items and a candidate.

    ``term(s, j) = weight * sum over items i of s of decay**age(i) * a[j,i]``

    ``a[j,i]`` is the softmax, over the most similar items i of j, of ``5 * mean over shared modalities of
    cos(f[j,m] - mean f[m], f[i,m] - mean f[m])``.

    Centring makes modalities comparable: raw cosines of CLIP images are near 0.7 for any two products.

    Parameters
    ----------
    n_rows : int
        Rows of the catalogue.
    n_alike : int
        Length of a candidate's list.
    itself : bool
        A candidate may be in its own list, as the cosines of the authors' release have it: for the protocol
        ``kept_strict``. By default it is not, which holds back the items of the session.
    """

    alike: Tensor
    likeness: Tensor
    settings: Tensor
    pointers: Tensor
    candidates: Tensor
    strengths: Tensor

    def __init__(self, n_rows: int, n_alike: int, *, itself: bool = False) -> None:
        super().__init__()
        self.itself = itself
        self._is_on = False  # while the weight is zero
        self._longest = 0  # inverted list
        self.register_buffer("alike", torch.zeros(n_rows, n_alike, dtype=torch.int32))
        self.register_buffer("likeness", torch.zeros(n_rows, n_alike))
        self.register_buffer("settings", torch.tensor([0.0, 1.0]))
        self.register_buffer("pointers", torch.zeros(n_rows + 1, dtype=torch.int64), persistent=False)
        self.register_buffer("candidates", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("strengths", torch.zeros(0), persistent=False)

    @torch.no_grad()
    def fit(self, vectors: Mapping[str, Tensor], presence: Tensor) -> None:
        """Find the most similar items of every item; the work grows with the square of the catalogue.

        Parameters
        ----------
        vectors : mapping of str to Tensor [row, width]
            Frozen modality vectors.
        presence : Tensor [modality, row], bool
            True where the item has the modality; in the order of ``vectors``.
        """
        self.alike.zero_()
        self.likeness.zero_()
        unit = [centred(table, present) for table, present in zip(vectors.values(), presence, strict=True)]
        items = presence.any(0)
        items[:FIRST_ITEM_ROW] = False
        rows = torch.nonzero(items).flatten()
        n_alike = min(self.alike.shape[1], len(rows) - (not self.itself))
        if n_alike < 1:
            self.index()
            return
        for chunk in rows.split(max(1, _CHUNK_BYTES // (4 * len(rows)))):
            similarity = mean_similarity(unit, presence, chunk, rows)
            if not self.itself:
                similarity[chunk.unsqueeze(1) == rows] = -torch.inf
            nearest, at = similarity.topk(n_alike, dim=1)
            self.alike[chunk, :n_alike] = rows[at].int()
            weights = torch.softmax(_SHARPNESS * nearest, dim=1).nan_to_num(0.0)  # NaN: nothing is comparable
            self.likeness[chunk, :n_alike] = weights.to(self.likeness.dtype)
        self.index()

    def list_as(self, other: ContentKNNTerm) -> None:
        """Use another term's lists from now on, without a copy."""
        self.alike, self.likeness = other.alike, other.likeness
        self.pointers, self.candidates, self.strengths = other.pointers, other.candidates, other.strengths
        self._longest = other._longest

    @torch.no_grad()
    def choose(self, settings: ContentKNNSettings) -> None:
        """Use these settings from now on."""
        self.settings.copy_(torch.tensor(settings))
        self._is_on = settings.weight != 0

    @property
    def chosen(self) -> ContentKNNSettings:
        """The settings in use."""
        return ContentKNNSettings(*self.settings.tolist())

    def refresh(self) -> None:
        """Read again whether the term is on, and which items are alike."""
        self._is_on = self.chosen.weight != 0
        self.index()

    def index(self) -> None:
        """Invert the candidates' lists: for every item, the candidates that list it; after `fit` and after loading."""
        listed = self.likeness > 0
        owners = torch.nonzero(listed)[:, 0]  # [edge]: the candidate of every entry of a list
        item, order = self.alike[listed].long().sort(stable=True)
        counts = torch.bincount(item, minlength=len(self.alike))
        self.pointers = F.pad(counts.cumsum(0), (1, 0))
        self._longest = int(counts.max()) if len(counts) else 0
        self.candidates, self.strengths = owners[order], self.likeness[listed][order]

    def forward(self, item_ids: Tensor) -> Tensor:
        """Return the term [batch, catalogue] for sessions ``item_ids`` [batch, seq]."""
        return self.add_to(self.settings.new_zeros(item_ids.shape[0], self.alike.shape[0]), item_ids, {})

    def add_to(self, scores: Tensor, item_ids: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Add the term, in place where the scores are contiguous."""
        weight = (self.settings[0] * recency(item_ids, self.settings[1])).flatten()  # [event]
        start, stop = self.pointers.take(item_ids.flatten()), self.pointers.take(item_ids.flatten() + 1)  # [event]
        lengths = stop - start
        if item_ids.device.type == "cuda" and 0 < len(lengths) * self._longest <= _MOST_EDGES:
            return scores.add_(self._by_longest(item_ids, weight, start, lengths))
        # one edge per event and candidate that lists its item: much fewer than events times catalogue
        event = torch.repeat_interleave(lengths)  # [edge]; `index_select`, since indexing takes five times as long here
        first = start - lengths.cumsum(0) + lengths  # [event]: where its edges stand, less how many come before them
        edge = torch.arange(event.shape[0], device=item_ids.device) + first.index_select(0, event)
        n_sessions, n_rows = item_ids.shape[0], self.alike.shape[0]  # not `len`, which a trace makes a constant
        session = torch.arange(n_sessions, device=item_ids.device).repeat_interleave(item_ids.shape[1])  # [event]
        at = (session * n_rows).index_select(0, event) + self.candidates.index_select(0, edge)
        added = weight.index_select(0, event) * self.strengths.index_select(0, edge)
        flat = scores.contiguous().view(-1)
        return flat.scatter_add_(0, at, added.to(scores.dtype)).view(n_sessions, -1)

    def _by_longest(self, item_ids: Tensor, weight: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
        """Return the term from as many edges per event as the longest list has, those beyond its own without weight."""
        step = torch.arange(self._longest, device=item_ids.device)
        edge = (start.unsqueeze(1) + step).clamp_max(len(self.candidates) - 1)  # [event, edge]
        added = weight.unsqueeze(1) * self.strengths[edge] * (step < lengths.unsqueeze(1))
        session = torch.arange(len(item_ids), device=item_ids.device).repeat_interleave(item_ids.shape[1])
        term = weight.new_zeros(len(item_ids) * len(self.alike))  # [batch * catalogue]
        at = session.unsqueeze(1) * len(self.alike) + self.candidates[edge]
        return term.index_add_(0, at.flatten(), added.flatten()).view(len(item_ids), -1)
