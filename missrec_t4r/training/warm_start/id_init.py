"""ID initialisation from content: ID embeddings start in the direction of the item's modality embeddings.

A third of a transductive score is the ID's cosine. Random ID embeddings outweigh the content until every item was
trained often enough; initialised from content, the first scores are those of the modalities.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from missrec_t4r.model.missrec import MISSRec

_CHUNK_ROWS = 1 << 16
"""Catalogue rows per chunk: the modality embeddings of millions of items do not fit into memory at once."""


@torch.no_grad()
def ids_from_content(model: MISSRec) -> None:
    """Set every ID embedding to the sum of its item's unit modality embeddings, at the mean length of random ones.

    Items without any modality keep their random embedding; models without IDs are not changed.
    """
    table = model.item_encoder.id_embedding
    if table is None:
        return
    length = table.weight.norm(dim=-1, keepdim=True).mean()
    for rows in torch.arange(model.item_encoder.n_rows, device=table.weight.device).split(_CHUNK_ROWS):
        items = model.item_encoder(rows)
        total = (F.normalize(items.modality, dim=-1) * items.mask.unsqueeze(-1)).sum(0)  # [row, dim]
        has_content = items.mask.any(0)
        table.weight[rows[has_content]] = F.normalize(total[has_content], dim=-1) * length
    model.item_encoder.copy_candidate_ids()
