"""Augmented views of a batch for sequence-sequence contrast: items left out, or words of their texts (specification 7).

Dropping an item moves everything that follows, all modalities together, since a view is made of catalogue rows; the
published code left the image tokens where they were.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from missrec_t4r.config import PretrainConfig
from missrec_t4r.schema import UNKNOWN_ROW


class View(NamedTuple):
    """Another look at a batch of sessions."""

    item_ids: Tensor
    """[batch, seq], int64, 0-padded on the right."""
    word_dropped: Tensor | None
    """[batch, seq], bool: positions whose text is read with words left out; None where no text is changed."""


def augmented_view(item_ids: Tensor, settings: PretrainConfig, *, has_word_drop: bool) -> View:
    """Draw one view of a batch: item drop, or word drop where the catalogue has texts with words left out.

    Parameters
    ----------
    item_ids : Tensor [batch, seq], int64
        0-padded on the right.
    settings : PretrainConfig
        Probabilities.
    has_word_drop : bool
        False: always item drop.
    """
    if has_word_drop and float(torch.rand(())) >= settings.item_drop_share:
        return View(item_ids, drawn_positions(item_ids, settings.word_drop_probability))
    return View(drop_items(item_ids, settings.item_drop_probability), None)


def drop_items(item_ids: Tensor, probability: float) -> Tensor:
    """Return sessions without some of their items, the rest moved to the left; the first item always stays.

    Examples
    --------
    >>> drop_items(torch.tensor([[5, 7, 9, 0]]), 1.0).tolist()
    [[5, 0, 0, 0]]
    """
    kept = torch.rand(item_ids.shape, device=item_ids.device) >= probability
    kept[:, 0] = True
    kept &= item_ids > UNKNOWN_ROW
    order = (~kept).long().argsort(dim=1, stable=True)
    return (item_ids * kept).gather(1, order)


def drawn_positions(item_ids: Tensor, probability: float) -> Tensor:
    """Return [batch, seq], True at a random share of the real items."""
    return (torch.rand(item_ids.shape, device=item_ids.device) < probability) & (item_ids > UNKNOWN_ROW)
