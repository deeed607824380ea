"""Vectors of items without content: which items are in the same training sessions (ours).

The singular vectors of the positive pointwise mutual information of items within a session (Levy and Goldberg,
NeurIPS 2014), so that a catalogue of ids alone has one modality, and with it interests and an ID initialisation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ModalityError
from missrec_t4r.etl.features.sklearn_encoders import Encoded
from missrec_t4r.ranking.cooccurrence import sessions_with_both
from missrec_t4r.schema import FIRST_ITEM_ROW

COOCCURRENCE = "cooccurrence"
_OVERSAMPLED = 16
"""Columns of the randomised decomposition beyond those that are kept."""


def cooccurrence_vectors(data: Path, catalogue: Catalogue, width: int) -> Encoded:
    """Return the vectors [item, width] of a data folder's items; zero for items without a neighbour in training.

    Raises
    ------
    ModalityError
        No session of the training split has two items.
    """
    train, n_rows = Sessions.load(data / "train", ()).known(), catalogue.n_rows
    together = sessions_with_both(train, n_rows)
    left, right = together.indices()
    if (left == right).all():
        raise ModalityError(
            "no training session with two different items", "co-occurrences", "give text columns, images or vectors"
        )
    occurs = torch.zeros(n_rows)
    occurs[left[left == right]] = together.values()[left == right]
    information = torch.log(together.values() * len(train) / (occurs[left] * occurs[right])).clamp_min(0)
    information[left == right] = 0.0
    matrix = torch.sparse_coo_tensor(together.indices(), information, together.shape, check_invariants=True)
    rank = max(1, min(width, catalogue.n_items - 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors, strength, _ = torch.svd_lowrank(matrix, q=min(rank + _OVERSAMPLED, n_rows), niter=4)
    of_items = (vectors * strength.sqrt())[FIRST_ITEM_ROW:, :rank].numpy().astype(np.float32)
    present = np.abs(of_items).sum(1) > 1e-6
    encoder = {"name": COOCCURRENCE, "model": COOCCURRENCE, "width": rank}
    return Encoded(np.where(present[:, None], of_items, np.float32(0)), present, encoder)
