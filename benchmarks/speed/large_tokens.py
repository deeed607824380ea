"""Item embeddings of any number with the geometry of real ones: real items plus differences of others.

A new item is a real item plus a fraction of the difference of two more, the same three in every modality, plus a little
noise: it lies in the directions in which real items differ, and no two are equal. Isotropic embeddings are the hardest
case for the search: no direction matters more than another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model.item_encoder import CandidateEmbeddings

MOVED = 0.5
"""Share of another items' difference that is added."""
NOISE = 0.02
"""Standard deviation of what is added to every number, in units of a random unit vector's numbers."""
_CHUNK = 1 << 16


def enlarged(real: CandidateEmbeddings, n_rows: int, seed: int = 0) -> CandidateEmbeddings:
    """Return a catalogue of ``n_rows`` made from the real one's items that have every modality.

    Parameters
    ----------
    real : CandidateEmbeddings
        Unit-length tokens of a trained model.
    n_rows : int
    seed : int
    """
    draw = torch.Generator().manual_seed(seed)
    whole = torch.nonzero(real.mask.all(0)).flatten()
    dim = real.modality.shape[-1]
    tokens = torch.empty(len(real.modality), n_rows, dim)
    for start in range(0, n_rows, _CHUNK):
        size = min(_CHUNK, n_rows - start)
        one, plus, minus = whole[torch.randint(len(whole), (3, size), generator=draw)]
        for modality, source in enumerate(real.modality):
            noise = torch.randn(size, dim, generator=draw) * (NOISE / dim**0.5)
            moved = source[one] + MOVED * (source[plus] - source[minus]) + noise
            tokens[modality, start : start + size] = F.normalize(moved, dim=-1)
    return CandidateEmbeddings(tokens, torch.ones(len(tokens), n_rows, dtype=torch.bool), None, None)


def isotropic(n_modalities: int, n_rows: int, dim: int, seed: int = 0) -> CandidateEmbeddings:
    """Return embeddings in random directions."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.empty(n_modalities, n_rows, dim)
    for part in tokens:
        for start in range(0, n_rows, _CHUNK):
            part[start : start + _CHUNK] = F.normalize(
                torch.randn(len(part[start : start + _CHUNK]), dim, generator=draw)
            )
    return CandidateEmbeddings(tokens, torch.ones(n_modalities, n_rows, dtype=torch.bool), None, None)


def sessions_near(candidates: CandidateEmbeddings, n: int, seed: int = 1) -> Tensor:
    """Return session vectors [n, dim]: means of a few similar items' embeddings, as real sessions are."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(candidates.mask.shape[1], (n,), generator=draw)
    own = candidates.modality[:, rows].mean(0)
    return F.normalize(own + 0.5 * torch.randn(own.shape, generator=draw) / own.shape[-1] ** 0.5, dim=-1)
