"""Base of the terms that score items with few events by their content."""

from __future__ import annotations

import torch
from torch import Tensor

from missrec_t4r.model.item_encoder import ItemEncoder
from missrec_t4r.model.score_terms import ScoreTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm


class ItemContentTerm(ScoreTerm):
    """Has two parts of others, and saves no weight of theirs.

    Parameters
    ----------
    item_encoder : ItemEncoder
        Of the network: has the modality vectors.
    item_knn : ItemKNNTerm
        Has the event counts.
    """

    def __init__(self, item_encoder: ItemEncoder, item_knn: ItemKNNTerm) -> None:
        super().__init__()
        self._sources = (item_encoder, item_knn)  # in a tuple, since torch would register them as parts of this term

    @property
    def item_encoder(self) -> ItemEncoder:
        """The network's item encoder."""
        return self._sources[0]

    @property
    def item_knn(self) -> ItemKNNTerm:
        """The term that has counted the events."""
        return self._sources[1]

    def scales_around(self, index: int, centre: Tensor) -> Tensor:
        """Return [row]: one over the length of a modality's vectors around ``centre`` [width]; 0 where missing."""
        item_encoder = self.item_encoder
        table, present = item_encoder.vectors.get_buffer(item_encoder.names[index]), item_encoder.presence[index]
        lengths = torch.cat([(part - centre).norm(dim=1) for part in table.split(1 << 16)])
        return torch.where(present & (lengths > 0), 1 / lengths.clamp_min(1e-12), 0.0)
