"""Six items, two modalities, five training sessions: small enough to compute by hand."""

from __future__ import annotations

import numpy as np
import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from tests import shop

TRAIN = [[3, 4, 5], [3, 4], [4, 5, 5], [6, 3], [7]]
"""Item 8 is cold. Counts: item 3: 3, 4: 3, 5: 3 (one session repeats it), 6: 1, 7: 1."""


@pytest.fixture(scope="session")
def train() -> Sessions:
    return Sessions.from_lists(TRAIN)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """Items "a" to "f" in rows 3 to 8; item "c" (row 5) lacks the image, item "f" (row 8) the text."""
    text, image = np.zeros((9, 2)), np.zeros((9, 2))
    text[3:8] = [[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0]]
    image[[3, 4, 6, 7, 8]] = [[1, 1], [1, 0.9], [-1, 1], [-1, -1], [1, 1]]
    modalities = {"text": shop.modality(text, without=[8]), "image": shop.modality(image, without=[5])}
    return shop.make_catalogue(list("abcdef"), modalities, shop.counts_of(TRAIN, 6))
