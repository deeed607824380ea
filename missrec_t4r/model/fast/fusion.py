"""Candidate fusion as one matrix product and a correction for the items that have several modalities.

    static score  = s . (e_j + 2 mean_m x[j,m]) / 3                              linear: one product with the mean
    two votes     softmax mean of a and b = mean + (a - b) / 2 tanh(phi (a - b) / 2)    one product with x[j,0] - x[j,1]

With one modality its weight is 1 and nothing is to be added, so that shops with few pictures pay for few items. The
same scores and gradients as `missrec_t4r.model.fusion`, up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from missrec_t4r.tracing import sizes

_FEW = 0.75
"""Share of the catalogue with two modalities below which only those items are corrected."""


class FastCandidateFusion(CandidateFusion):
    """`CandidateFusion` by the products of the module."""

    def forward(self, session: Tensor, candidates: CandidateEmbeddings) -> Tensor:
        """Return the scores [batch, catalogue] of `CandidateFusion.forward`."""
        scores = (session @ mean_embeddings(candidates).T).to(session.dtype)  # autocast gives half precision
        n_modalities = sizes(candidates.modality)[0]
        if self.phi is None or n_modalities == 1:
            return scores
        if n_modalities > 2 and session.device.type == "cuda":  # which items have several, it cannot ask
            return super().forward(session, candidates).to(session.dtype)
        counts = candidates.mask.sum(0)  # [catalogue]
        if n_modalities == 2:
            return self._add_pairs(scores, session, candidates, counts == 2)
        several = torch.nonzero(counts > 1).flatten()
        if not sizes(several)[0]:
            return scores
        return scores.index_add_(1, several, self._correction(session, candidates, several))

    def _add_pairs(self, scores: Tensor, session: Tensor, candidates: CandidateEmbeddings, both: Tensor) -> Tensor:
        """Add what the dynamic weights add to the mean of two votes a and b: ``(a - b) / 2 * tanh(phi (a - b) / 2)``.

        With two modalities the softmax is a logistic function of the difference of the votes, which is one product.
        """
        assert self.phi is not None
        first, second = candidates.modality.unbind()
        share = both.to(scores.dtype)
        if candidates.id_mask is not None:
            share = torch.where(candidates.id_mask, share * 2 / 3, share)
        if session.device.type == "cuda":  # the host would wait for the number of rows; a product more costs less
            apart = (session @ ((first - second) * both.unsqueeze(-1)).T).to(session.dtype)
            return scores.add_(apart * torch.tanh(apart * (self.phi / 2)) * (share / 2))
        rows = torch.nonzero(both).flatten()
        few = sizes(rows)[0] < _FEW * sizes(both)[0]  # then gathering costs less than the columns that it saves
        gap = first[rows] - second[rows] if few else (first - second) * both.unsqueeze(-1)
        phi = self.phi[rows] if few and self.name == "dynamic_instance" else self.phi
        apart = (session @ gap.T).to(session.dtype)
        correction = apart * torch.tanh(apart * (phi / 2)) * ((share[rows] if few else share) / 2)
        return scores.index_add_(1, rows, correction) if few else scores.add_(correction)

    def _correction(self, session: Tensor, candidates: CandidateEmbeddings, several: Tensor) -> Tensor:
        """Return what the dynamic weights add to the mean, [batch, item], for the items with several modalities.

        With one modality its weight is 1 and nothing is to be added, so shops with sparse pictures pay for few items.
        """
        assert self.phi is not None
        phi = self.phi if self.name == "dynamic_shared" else self.phi[several]
        total = numerator = denominator = torch.zeros((), device=session.device, dtype=session.dtype)
        for tokens, present in zip(candidates.modality.unbind(), candidates.mask.unbind(), strict=True):
            vote = (session @ tokens[several].T).to(session.dtype)
            # votes are in [-1, 1]: exp needs no running maximum while phi is below 80
            weight, counts = torch.exp(phi * vote), present[several].to(vote.dtype)
            if torch.jit.is_tracing() or not bool(present[several].all()):
                weight = weight * counts
            numerator, denominator = numerator + weight * vote, denominator + weight
            total = total + vote * counts
        correction = numerator / denominator - total / candidates.mask[:, several].sum(0)
        if candidates.id_mask is None:
            return correction
        return correction * (1 - candidates.id_mask[several].to(correction.dtype) / 3)


def mean_embeddings(candidates: CandidateEmbeddings) -> Tensor:
    """Return one row per candidate [catalogue, dim] whose inner product with the session is the static score."""
    dtype, counts = candidates.modality.dtype, candidates.mask.sum(0)
    share = torch.ones_like(counts, dtype=dtype)
    table = torch.zeros_like(candidates.modality[0])
    if candidates.ids is not None and candidates.id_mask is not None:
        both = candidates.id_mask & (counts > 0)
        table = candidates.ids * torch.where(both, share / 3, candidates.id_mask.to(dtype)).unsqueeze(-1)
        share = torch.where(both, share * 2 / 3, share)
    share = share / counts.clamp_min(1)
    for tokens, present in zip(candidates.modality.unbind(), candidates.mask.unbind(), strict=True):
        table = torch.addcmul(table, tokens, (share * present).unsqueeze(-1))
    return table
