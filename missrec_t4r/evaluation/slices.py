"""Parts of the sessions that an average hides: cold targets, targets that lack a modality, short sessions."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Ints, Sessions
from missrec_t4r.schema import FIRST_ITEM_ROW

SHORT_UP_TO: Final = 3
"""Known items in the history of a short session, at most."""
LONG_FROM: Final = 10
"""Known items in the history of a long session, at least."""
RARE_BELOW: Final = 5
"""Training interactions of a rare target, fewer than this; cold ones are among them."""

Flags = npt.NDArray[np.bool_]


def slices(histories: Sessions, targets: Ints, catalogue: Catalogue) -> dict[str, Flags]:
    """Return which sessions belong to which slice.

    Parameters
    ----------
    histories : Sessions
        Lengths count known items only.
    targets : ndarray [session], int64
        Catalogue rows. Rows that are no item are in ``all`` and in the length slices alone.

    Returns
    -------
    dict of str to ndarray [session], bool
        ``all``; ``cold`` (target never trained on), ``rare``, ``without_<modality>`` for each modality (of the
        target); ``short``, ``medium`` and ``long`` sessions. Slices overlap, the three lengths partition.
    """
    item = targets >= FIRST_ITEM_ROW
    trained = catalogue.train_count[targets]
    length = histories.known().lengths
    short, long = length <= SHORT_UP_TO, length >= LONG_FROM
    return {
        "all": np.ones(len(targets), bool),
        "cold": item & (trained == 0),
        "rare": item & (trained < RARE_BELOW),
        **{f"without_{name}": item & ~modality.present[targets] for name, modality in catalogue.modalities.items()},
        "short": short,
        "medium": ~short & ~long,
        "long": long,
    }
