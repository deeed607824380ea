"""Multi-modal interest discovery and the interests of a session (E3, E4; arXiv:2308.11175, interest discovery).

    z[i,m] = cluster of the modality embedding x[i,m], 1 to K; 0 where item i lacks modality m      before every epoch
    interests of a session = the set {z[i,m]} over its items and modalities, each once, as centroids c_z

Centroids are data, not parameters: no gradient reaches them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config.model import InterestAlgorithm
from missrec_t4r.model.clustering import density_peaks, kmeans
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.release import PaddedInterests
from missrec_t4r.tracing import sizes


class InterestTokens(NamedTuple):
    """The distinct interests of a batch of sessions."""

    tokens: Tensor
    """[batch, interest, dim]: centroids, in the order in which the session showed them."""
    mask: Tensor
    """[batch, interest], bool."""
    position: Tensor
    """[batch, interest], int64: index of the item that showed the interest first."""
    ids: Tensor | None = None
    """[batch, interest], int64: the interests z, 0 for none."""
    centroids: Tensor | None = None
    """[interest + 1, dim]: of all interests, ``tokens = centroids[ids]``."""


class InterestVocabulary(nn.Module):
    """Cluster of every modality embedding of the catalogue, and centroid of every cluster.

    Parameters
    ----------
    n_interests : int
        Number of clusters K; interest 0 means none. With K = 0 no session has interests.
    n_modalities, n_rows, d_model : int
        Shape of the catalogue's modality embeddings.
    algorithm : {"kmeans", "dpc_knn"}
        How the catalogue is clustered.
    slots : PaddedInterests, optional
        How many slots a session takes; by default as many as it has interests. The largest set of a batch decides.
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
        slots: PaddedInterests | None = None,
    ) -> None:
        super().__init__()
        self.algorithm, self.slots = algorithm, slots
        self.spare = 0 if slots is None else slots.spare
        self.register_buffer("centroids", torch.zeros(n_interests + 1, d_model))
        self.register_buffer("assignment", torch.zeros(n_modalities, n_rows, dtype=torch.int64))

    @staticmethod
    def size(ratio: float, mask: Tensor) -> int:
        """Return K = ceil(ratio * number of modality embeddings); ``mask`` [modality, row] marks them."""
        return max(math.ceil(ratio * int(mask.sum())), 1) if ratio else 0

    @property
    def n_interests(self) -> int:
        """Number of clusters K."""
        return sizes(self.centroids)[0] - 1

    @property
    def discovered(self) -> bool:
        """Whether `discover` has run (or a discovered vocabulary was loaded)."""
        return bool(self.assignment.any())

    @torch.no_grad()
    def discover(self, catalogue: ItemEmbeddings, seed: int) -> None:
        """Cluster the catalogue's modality embeddings; k-means starts from the current centroids when there are some.

        Parameters
        ----------
        catalogue : ItemEmbeddings of shape [row]
            Embeddings of all rows in evaluation mode; only those under the mask are clustered.
        seed : int
            Same seed and embeddings, same interests.
        """
        if not self.n_interests:
            return
        points = catalogue.modality[catalogue.mask].float()  # [embedding, dim]
        if self.algorithm == "kmeans":
            start = self.centroids[1:].float() if self.discovered else None
            centroids, labels = kmeans(points, self.n_interests, seed=seed, start=start)
        else:
            centroids, labels = density_peaks(points, self.n_interests)
        self.centroids[1:] = centroids.to(self.centroids.dtype)
        self.assignment.zero_()
        self.assignment[catalogue.mask] = labels + 1

    def forward(self, item_ids: Tensor, empty_slots: int = 0, n_slots: int | None = None) -> InterestTokens:
        """Return each session's distinct interests, in the order in which the session showed them.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int64
            Session items; rows without interests (padding among them) contribute none.
        empty_slots : int
            Empty slots of every set beyond those that the largest set needs.
        n_slots : int, optional
            Slots of the batch, at least its `width`; counted here by default.
        """
        if not self.n_interests:
            none = item_ids.new_zeros(item_ids.shape[0], 1 + empty_slots if n_slots is None else n_slots)
            return InterestTokens(self.centroids[none], none > 0, none, none, self.centroids)
        n_modalities = sizes(self.assignment)[0]
        interest = self.assignment[:, item_ids].permute(1, 2, 0).flatten(1)  # [batch, seq * modality], oldest first
        if spare := max(self.spare, empty_slots):
            interest = F.pad(interest, (0, spare))
        n_tokens = interest.shape[1]
        ordered, order = interest.sort(dim=1, stable=True)  # equal interests stand together, the earliest mention first
        first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered > 0)
        mention, back = torch.where(first, order, n_tokens).sort(dim=1)  # distinct ones in the order of mention
        width = self.n_slots(mention < n_tokens, item_ids, empty_slots) if n_slots is None else n_slots
        mention, back = mention[:, :width], back[:, :width]  # [batch, interest]
        mask = mention < n_tokens
        ids = ordered.gather(1, back) * mask
        position = torch.div(mention, n_modalities, rounding_mode="floor").masked_fill(~mask, 0)
        return InterestTokens(self.centroids[ids], mask, position, ids, self.centroids)

    def width(self, item_ids: Tensor, empty_slots: int, assignment: Tensor) -> int:
        """Return the number of slots of `forward`, from a copy of ``assignment`` [modality, row] on the host."""
        if not self.n_interests:
            return 1 + empty_slots
        interest = assignment.numpy()[:, item_ids.numpy()].transpose(1, 2, 0).reshape(len(item_ids), -1)
        distinct = np.diff(np.sort(interest, axis=1), axis=1, prepend=0) > 0  # NumPy sorts many short rows faster
        return InterestVocabulary.n_slots(self, torch.from_numpy(distinct), item_ids, empty_slots)

    def most_slots(self, item_ids: Tensor) -> int:
        """Return one slot per item and modality of ``item_ids`` [batch, seq]: enough for any sessions."""
        return item_ids.shape[1] * len(self.assignment) + self.spare if self.n_interests else 1

    def n_slots(self, mask: Tensor, item_ids: Tensor, empty_slots: int) -> int:
        """Return the number of slots of a batch; ``mask`` [batch, seq * modality] marks the distinct interests."""
        count = mask.sum(1)
        if self.slots is not None and not empty_slots:
            count = self.slots(count, item_ids)
        return max(int(count.max()) if len(mask) else 0, 1) + empty_slots
