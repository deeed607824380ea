"""Dynamic candidate fusion: how the scores of a candidate's modalities become one (E11; arXiv:2308.11175)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from missrec_t4r.config.model import CandidateFusionName
from missrec_t4r.model.item_encoder import CandidateEmbeddings


class CandidateFusion(nn.Module):
    """Score candidates with a mix of modalities that depends on the session.

    The weight of a modality is the softmax of its own score, so that a session about looks is scored by looks::

        v[m]  = s . x[j,m]                                   cosine of session s and modality m of candidate j
        fused = sum_m w_m v[m],  w = softmax of phi v[m]     over the modalities that j has
        score = (s . e_j + 2 fused) / 3                      where candidate j has a trained ID embedding e_j

    Parameters
    ----------
    name : {"static", "dynamic_shared", "dynamic_instance"}
        ``static``: phi is 0, the mean. ``dynamic_shared``: one learned phi. ``dynamic_instance``: one per item.
    n_rows : int
        Rows of the catalogue, for ``dynamic_instance``.
    """

    def __init__(self, name: CandidateFusionName, n_rows: int) -> None:
        super().__init__()
        self.name = name
        self.phi: nn.Parameter | None = None
        if name != "static":
            self.phi = nn.Parameter(torch.zeros(1 if name == "dynamic_shared" else n_rows))

    def forward(self, session: Tensor, candidates: CandidateEmbeddings) -> Tensor:
        """Return one score per session and candidate, before the temperature.

        Parameters
        ----------
        session : Tensor [batch, dim]
            Unit-length session vectors.
        candidates : CandidateEmbeddings
            Unit-length embeddings of the catalogue.

        Returns
        -------
        Tensor [batch, catalogue]
            Cosine scores in [-1, 1]; 0 for a row with neither modality nor trained ID.
        """
        present = candidates.mask.unsqueeze(1)  # [modality, 1, catalogue]
        votes = session @ candidates.modality.transpose(1, 2)  # [modality, batch, catalogue]
        sharpened = votes * (0.0 if self.phi is None else self.phi)
        weights = sharpened.masked_fill(~present, torch.finfo(votes.dtype).min).softmax(0) * present
        fused = (weights * votes).sum(0)  # [batch, catalogue]
        if candidates.ids is None or candidates.id_mask is None:
            return fused
        of_id, has_modality = session @ candidates.ids.T, candidates.mask.any(0)  # [batch, catalogue], [catalogue]
        both = torch.where(has_modality, (of_id + 2 * fused) / 3, of_id)
        return torch.where(candidates.id_mask, both, fused)
