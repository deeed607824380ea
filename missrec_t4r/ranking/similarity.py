"""Content similarity from raw modality vectors, for the content-kNN term, the cold-start term and the baseline.

    x[j,m] = unit(f[j,m] - centre of f[.,m])                      zero where item j lacks modality m
    sim(j, i) = mean of x[j,m] . x[i,m]                           over the modalities m that both have
    sim(s, j) = mean of unit(sum over i in s of decay^age(i) x[i,m]) . x[j,m]

Centring makes modalities comparable: raw cosines of CLIP images are around 0.7 for any two products, so that items with
an image would win over items without one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def centred(table: Tensor, present: Tensor) -> Tensor:
    """Return unit vectors [row, width] around the mean of the items that have the modality; zero where it is missing.

    Parameters
    ----------
    table : Tensor [row, width]
        Frozen vectors.
    present : Tensor [row], bool
    """
    here = present.unsqueeze(1).to(table.dtype)
    centre = (table * here).sum(0) / here.sum().clamp_min(1)  # [width]
    return F.normalize((table - centre) * here, dim=-1)


def mean_similarity(centred: Sequence[Tensor], presence: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Return [row, other]: mean cosine over the modalities that both items have, -inf where there is none.

    Parameters
    ----------
    centred : sequence of Tensor [row, width]
        Unit vectors of every modality, zero where it is missing.
    presence : Tensor [modality, row], bool
    rows, others : Tensor [row] and [other], int64
        The items to compare.
    """
    total = centred[0].new_zeros(len(rows), len(others))
    shared = torch.zeros_like(total)
    for vectors, present in zip(centred, presence, strict=True):
        total.addmm_(vectors[rows], vectors[others].T)
        shared += present[rows].unsqueeze(1) & present[others]
    return torch.where(shared > 0, total / shared.clamp_min(1), -torch.inf)
