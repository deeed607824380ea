"""How ID embeddings start: at random, as published, or as the items' own tokens, so that they say nothing at first.

A third of a transductive score is the ID's cosine. Random vectors of unit length drown what the modalities know until
every item was trained often enough; started as tokens, the first scores are those of the modalities.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from missrec_t4r.model.missrec import MISSRec

_ROWS = 1 << 16
"""Rows of the catalogue at a time: the tokens of millions of items do not fit at once."""


@torch.no_grad()
def ids_from_content(model: MISSRec) -> None:
    """Point every ID embedding along the sum of its item's unit tokens, as long as a random one would be.

    Items without any modality, and models without IDs, are left alone.
    """
    table = model.item_encoder.id_embedding
    if table is None:
        return
    length = table.weight.norm(dim=-1, keepdim=True).mean()
    for rows in torch.arange(model.item_encoder.n_rows, device=table.weight.device).split(_ROWS):
        tokens = model.item_encoder(rows)
        total = (F.normalize(tokens.modality, dim=-1) * tokens.mask.unsqueeze(-1)).sum(0)
        here = tokens.mask.any(0)
        table.weight[rows[here]] = F.normalize(total[here], dim=-1) * length
