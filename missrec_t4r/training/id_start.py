"""How ID embeddings start: at random, as published, or as the items' own tokens, so that they say nothing at first.

A third of a transductive score is the ID's cosine. Random vectors of unit length drown what the modalities know until
every item was trained often enough; started as tokens, the first scores are those of the modalities.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from missrec_t4r.model.missrec import MISSRec


@torch.no_grad()
def ids_from_tokens(model: MISSRec) -> None:
    """Point every ID embedding along the sum of its item's unit tokens, as long as a random one would be.

    Items without any modality, and models without IDs, are left alone.
    """
    table = model.towers.id_embedding
    if table is None:
        return
    was_training = model.training
    tokens = model.eval().towers.catalogue()
    model.train(was_training)
    total = (F.normalize(tokens.modality, dim=-1) * tokens.mask.unsqueeze(-1)).sum(0)
    has_tokens = tokens.mask.any(0)
    length = table.weight.norm(dim=-1, keepdim=True).mean()
    table.weight[has_tokens] = F.normalize(total, dim=-1)[has_tokens] * length
