"""Slices by hand."""

from __future__ import annotations

import numpy as np

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.slices import slices


def test_slices_by_hand(catalogue: Catalogue) -> None:
    histories = Sessions.from_lists([[3], [3, 4, 5, 2], [3, 4, 5, 6], [3] * 9, [3] * 10, []])
    targets = np.array([8, 5, 3, 7, 2, 8])  # 8 is cold and lacks text, 5 lacks the image, 2 is not an item
    found = {name: flags.tolist() for name, flags in slices(histories, targets, catalogue).items()}
    yes, no = True, False
    assert found == {
        "all": [yes] * 6,
        "cold": [yes, no, no, no, no, yes],
        "rare": [yes, yes, yes, yes, no, yes],
        "without_text": [yes, no, no, no, no, yes],
        "without_image": [no, yes, no, no, no, no],
        "short": [yes, yes, no, no, no, yes],  # the unknown event of the second session does not count
        "medium": [no, no, yes, yes, no, no],
        "long": [no, no, no, no, yes, no],
    }


def test_rare_ends_below_five(catalogue: Catalogue) -> None:
    counts = [0, 1, 4, 5, 6, 7]
    items = catalogue.items.set_column(1, "train_count", [counts])
    found = slices(Sessions.from_lists([[3]] * 6), np.arange(3, 9), Catalogue(items, {}))
    assert found["rare"].tolist() == [True, True, True, False, False, False]
    assert found["cold"].tolist() == [True, False, False, False, False, False]
    assert not any(name.startswith("without") for name in found)
