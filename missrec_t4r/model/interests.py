"""Multi-modal interest discovery and the session's set of interest tokens (specification 2 and 3).

All modality tokens of the catalogue are clustered; a session's interests are the centroids of the clusters its items
fall into, each once. Centroids are data: no gradient reaches them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config import InterestAlgorithm
from missrec_t4r.model.clustering import density_peaks, kmeans
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.schema import PADDING_ROW


class InterestTokens(NamedTuple):
    """The interests of a batch of sessions."""

    tokens: Tensor
    """[batch, interest, dim]: centroids, in the order in which the session showed them."""
    mask: Tensor
    """[batch, interest], bool."""
    position: Tensor
    """[batch, interest], int64: index of the item that showed the interest first."""
    rows: Tensor | None = None
    """[batch, interest], int64: whose centroids the tokens are, 0 for none."""
    centroids: Tensor | None = None
    """[interest + 1, dim]: where the tokens come from, ``tokens = centroids[rows]``."""
    projections: Tensor | None = None
    """[interest + 1, 3 * dim]: the encoder's first projections of all centroids, where a catalogue version has them."""


class InterestVocabulary(nn.Module):
    """Cluster of every modality token, and centroid of every cluster.

    Parameters
    ----------
    n_interests : int
        Number of clusters K; interest 0 means none.
    n_modalities, n_rows, d_model : int
        Shape of the catalogue's tokens.
    algorithm : {"kmeans", "dpc_knn"}
        How the catalogue is clustered.
    padded_length : int, optional
        Count, as the authors' release does, the empty interest of sessions that it pads to this length: it asks for
        one more place, which the faithful regulariser sums (docs/equations.md, E14). It is never attended to.
    """

    centroids: Tensor
    assignment: Tensor

    def __init__(
        self,
        n_interests: int,
        n_modalities: int,
        n_rows: int,
        d_model: int,
        algorithm: InterestAlgorithm = "kmeans",
        padded_length: int | None = None,
    ) -> None:
        super().__init__()
        self.algorithm, self.padded_length = algorithm, padded_length
        self.register_buffer("centroids", torch.zeros(n_interests + 1, d_model))
        self.register_buffer("assignment", torch.zeros(n_modalities, n_rows, dtype=torch.int64))

    @staticmethod
    def size(ratio: float, mask: Tensor) -> int:
        """Return K = ceil(ratio * number of modality tokens); ``mask`` [modality, row] marks the tokens."""
        return max(math.ceil(ratio * int(mask.sum())), 1)

    @property
    def discovered(self) -> bool:
        """Whether `discover` has run (or a discovered vocabulary was loaded)."""
        return bool(self.assignment.any())

    @torch.no_grad()
    def discover(self, catalogue: ItemEmbeddings, seed: int) -> None:
        """Cluster the catalogue's tokens; k-means starts from the current centroids when there are some.

        Parameters
        ----------
        catalogue : ItemEmbeddings of shape [row]
            Tokens of all rows in evaluation mode; only those under the mask are clustered.
        seed : int
            Same seed and tokens, same interests.
        """
        points = catalogue.modality[catalogue.mask].float()
        n_interests = len(self.centroids) - 1
        if self.algorithm == "kmeans":
            start = self.centroids[1:].float() if self.discovered else None
            centroids, labels = kmeans(points, n_interests, seed=seed, start=start)
        else:
            centroids, labels = density_peaks(points, n_interests)
        self.centroids[1:] = centroids.to(self.centroids.dtype)
        self.assignment.zero_()
        self.assignment[catalogue.mask] = labels + 1

    def forward(self, rows: Tensor, empty: int = 0) -> InterestTokens:
        """Return each session's distinct interests.

        Parameters
        ----------
        rows : Tensor [batch, seq], int64
            Session items; rows without interests (padding among them) contribute none.
        empty : int
            Places by which every set is made longer than the largest needs.
        """
        interest = self.assignment[:, rows].permute(1, 2, 0).flatten(1)  # [batch, seq * modality], oldest item first
        if empty or self.padded_length is not None:
            interest = F.pad(interest, (0, max(empty, 1)))
        n_modalities, n_tokens = len(self.assignment), interest.shape[1]
        ordered, order = interest.sort(dim=1, stable=True)
        first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered > 0)
        place = torch.where(first, order, n_tokens)  # a stable sort puts the earliest mention of an interest first
        place, back = place.sort(dim=1)
        mask = place < n_tokens
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            count = mask.sum(1)
            if self.padded_length is not None and not empty:
                count = count + ((rows > PADDING_ROW).sum(1) < self.padded_length)
            width = max(int(count.max()) if len(mask) else 0, 1) + empty
            place, back, mask = place[:, :width], back[:, :width], mask[:, :width]
        chosen = ordered.gather(1, back) * mask
        position = torch.div(place, n_modalities, rounding_mode="floor").masked_fill(~mask, 0)
        return InterestTokens(self.centroids[chosen], mask, position, chosen, self.centroids)
