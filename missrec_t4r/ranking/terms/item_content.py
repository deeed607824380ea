"""Base of the terms that score items with few events by their content (ours).

    x[j,m]     = f[j,m] - centre[m], of unit length                       f: raw vector of item j in modality m
    cos(s, j)  = mean of cos(q[m], x[j,m]), q[m] = sum over i of s of .7**age(i) x[i,m]

over the chosen modalities m that session and item have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model.item_encoder import ItemEncoder
from missrec_t4r.model.score_terms import ScoreTerm
from missrec_t4r.ranking.terms.history import recency
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm

_DECAY = 0.7
"""Weight of an item relative to the one after it in the session's mean content."""


class ItemContentTerm(ScoreTerm):
    """A score term from the content of items; reads the item encoder and the item-kNN term without owning them.

    Parameters
    ----------
    item_encoder : ItemEncoder
        Of the network: has the modality vectors.
    item_knn : ItemKNNTerm
        Has the event counts.
    save_centres : bool
        Whether the centres are weights; else they are computed again after loading.
    """

    rows: Tensor
    here: Tensor
    scales: Tensor

    def __init__(self, item_encoder: ItemEncoder, item_knn: ItemKNNTerm, *, save_centres: bool) -> None:
        super().__init__()
        self._sources = (item_encoder, item_knn)  # in a tuple, since torch would register them as parts of this term
        self.names = item_encoder.names
        self._used = list(range(len(self.names)))  # in a list, since tensors on a GPU are slow to read
        self._is_on = False  # not the length of the rows: a trace would warn of it
        device = item_encoder.presence.device
        self.register_buffer("rows", torch.zeros(0, dtype=torch.int64, device=device), persistent=False)
        for name in ("here", "scales"):  # one tensor each, since a trace takes no shared ones
            self.register_buffer(name, torch.zeros(0, device=device), persistent=False)
        for index, name in enumerate(self.names):  # by name: in what order modalities are declared does not matter
            width = self.table(index).shape[1]
            self.register_buffer(f"centre_{name}", torch.zeros(width, device=device), persistent=save_centres)
            self.register_buffer(f"content_{name}", torch.zeros(0, width, device=device), persistent=False)

    @property
    def item_encoder(self) -> ItemEncoder:
        """The network's item encoder."""
        return self._sources[0]

    @property
    def item_knn(self) -> ItemKNNTerm:
        """The term that has counted the events."""
        return self._sources[1]

    def table(self, index: int) -> Tensor:
        """Return the raw vectors [row, width] of a modality."""
        return self.item_encoder.vectors.get_buffer(self.names[index])

    def score_rows(self, rows: Tensor, modalities: Sequence[int]) -> None:
        """Compute what the cosines with ``rows`` [item], ascending, in these modalities need; off without a row."""
        presence = self.item_encoder.presence
        self.rows, self._is_on = rows, len(rows) > 0
        self.here = presence[:, rows].to(self.scales.dtype)
        self.scales = self.scales.new_zeros(presence.shape)
        for index, name in enumerate(self.names):
            own = rows if index in modalities else rows[:0]
            if len(own):
                centre = self.get_buffer(f"centre_{name}")
                lengths = torch.cat([(part - centre).norm(dim=1) for part in self.table(index).split(1 << 16)])
                is_there = presence[index] & (lengths > 0)
                self.scales[index] = torch.where(is_there, 1 / lengths.clamp_min(1e-12), 0.0)
            setattr(self, f"content_{name}", self.unit(index, own))

    def unit(self, index: int, rows: Tensor) -> Tensor:
        """Return vectors [item, width] of a modality around its centre, of unit length; zero where missing."""
        around = self.table(index)[rows] - self.get_buffer(f"centre_{self.names[index]}")
        return around * self.scales[index, rows].unsqueeze(1)

    def likeness_to(self, item_ids: Tensor) -> Tensor:
        """Return the cosines [batch, item] of ``rows`` with the mean content of sessions ``item_ids`` [batch, seq]."""
        recent = recency(item_ids, _DECAY)  # [batch, seq]
        total, known = torch.zeros(()), list[Tensor]()
        for index in self._used:
            content, centre = (self.get_buffer(f"{part}_{self.names[index]}") for part in ("content", "centre"))
            weights = (recent * self.scales[index].take(item_ids)).to(content.dtype)
            mean = F.embedding_bag(item_ids, self.table(index), per_sample_weights=weights, mode="sum")
            query = F.normalize(mean - weights.sum(1, keepdim=True) * centre, dim=-1)
            total = total.addmm_(query, content.T) if known else query @ content.T  # [batch, item]
            known.append(weights.any(1))
        if len(known) == 1:
            return total
        shared = torch.stack(known, 1).to(total.dtype) @ torch.stack([self.here[index] for index in self._used])
        return total.div_(shared.clamp_min_(1))
