"""Slices of the evaluation sessions: cold and rare targets, targets without a modality, short and long sessions."""

from __future__ import annotations

from typing import Final

import numpy as np

from missrec_t4r.arrays import Bools, Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.schema import FIRST_ITEM_ROW

SHORT_UP_TO: Final = 3
"""Maximum of known items in the history of a short session."""
LONG_FROM: Final = 10
"""Minimum of known items in the history of a long session."""
RARE_BELOW: Final = 5
"""A rare target has fewer training interactions than this; cold targets are rare too."""


def slices(histories: Sessions, targets: Ints, catalogue: Catalogue) -> dict[str, Bools]:
    """Return the mask of every slice.

    Parameters
    ----------
    histories : Sessions
        Lengths count known items only.
    targets : ndarray [session], int64
        Catalogue rows. Reserved rows belong to ``all`` and to the length slices only.

    Returns
    -------
    dict of str to ndarray [session], bool
        ``all``; ``cold`` (target never trained on), ``rare``, ``without_<modality>`` for each modality (of the
        target); ``short``, ``medium`` and ``long`` sessions. Slices overlap; the three lengths are disjoint.
    """
    is_item = targets >= FIRST_ITEM_ROW
    train_count = catalogue.train_count[targets]
    length = histories.known().lengths
    short, long = length <= SHORT_UP_TO, length >= LONG_FROM
    return {
        "all": np.ones(len(targets), bool),
        "cold": is_item & (train_count == 0),
        "rare": is_item & (train_count < RARE_BELOW),
        **{f"without_{name}": is_item & ~modality.present[targets] for name, modality in catalogue.modalities.items()},
        "short": short,
        "medium": ~short & ~long,
        "long": long,
    }
