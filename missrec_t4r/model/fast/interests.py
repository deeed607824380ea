"""Interests of a session with a fixed number of slots where a graph is traced or compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from missrec_t4r.model.interests import InterestVocabulary


class FastInterestVocabulary(InterestVocabulary):
    """`InterestVocabulary` that can be traced and compiled: a graph keeps one slot per item and modality."""

    def n_slots(self, mask: Tensor, item_ids: Tensor, empty_slots: int) -> int:
        """Return the number of slots; all of them in a graph, since their number would be a constant there."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return mask.shape[1]
        return super().n_slots(mask, item_ids, empty_slots)
