"""Augmented views of a batch for the sequence-sequence contrast: item drop or word drop (`docs/equations.md`, E17).

A view is made of item indices, so dropping an item shifts all later positions of all modalities together; the
published code did not shift the image embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from missrec_t4r.config import PretrainConfig
from missrec_t4r.schema import UNKNOWN_ROW


class View(NamedTuple):
    """An augmented batch of sessions."""

    item_ids: Tensor
    """[batch, seq], int64, 0-padded on the right."""
    word_dropped: Tensor | None
    """[batch, seq], bool: positions that use the text vector with words left out; None if no text is changed."""


def augmented_view(item_ids: Tensor, settings: PretrainConfig, *, has_word_drop: bool) -> View:
    """Draw one view of a batch: item drop, or word drop if the catalogue has vectors of texts with words left out.

    Parameters
    ----------
    item_ids : Tensor [batch, seq], int64
        0-padded on the right.
    settings : PretrainConfig
        Probabilities of item drop and word drop.
    has_word_drop : bool
        Whether word drop is available; False always drops items.
    """
    if has_word_drop and float(torch.rand(())) >= settings.item_drop_share:
        return View(item_ids, random_positions(item_ids, settings.word_drop_probability))
    return View(drop_items(item_ids, settings.item_drop_probability), None)


def drop_items(item_ids: Tensor, probability: float) -> Tensor:
    """Return sessions without a random share of their items, left-aligned; the first item is never dropped.

    Examples
    --------
    >>> drop_items(torch.tensor([[5, 7, 9, 0]]), 1.0).tolist()
    [[5, 0, 0, 0]]
    """
    keep = torch.rand(item_ids.shape, device=item_ids.device) >= probability  # [batch, seq]
    keep[:, 0] = True
    keep &= item_ids > UNKNOWN_ROW
    order = (~keep).long().argsort(dim=1, stable=True)  # kept positions first, in their order
    return (item_ids * keep).gather(1, order)


def random_positions(item_ids: Tensor, probability: float) -> Tensor:
    """Return a mask [batch, seq], True at a random share of the real items."""
    return (torch.rand(item_ids.shape, device=item_ids.device) < probability) & (item_ids > UNKNOWN_ROW)
