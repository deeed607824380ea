"""A model on a catalogue that has grown since its training: known rows keep what they learned.

New items are scored by their modalities alone, whatever the configuration says of untrained IDs; retired items cannot
be recommended but stay what they were inside a session.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.schema import FIRST_ITEM_ROW, RETIRED

_PER_ROW = ("towers.id_embedding.", "fusion.phi", "prior.", "lookalikes.")
"""Weights with a line per catalogue row: they end where training ended."""


def load_weights(model: MISSRec, weights: Mapping[str, Tensor], interests: Mapping[str, Tensor]) -> None:
    """Load weights that were made for the first rows of the model's catalogue.

    Parameters
    ----------
    model : MISSRec
        Built for the whole catalogue.
    weights : mapping of str to Tensor
        Of the training; what is learned per row is continued with zeros.
    interests : mapping of str to Tensor
        Centroids and assignment of this catalogue version: the centroids' number is the training's.
    """
    known = model.state_dict()
    continued = {name: _continued(name, tensor, known) for name, tensor in weights.items()}
    centroids, assignment = interests["interests.centroids"], interests["interests.assignment"]
    vocabulary = model.interests
    if centroids.shape != vocabulary.centroids.shape:
        vocabulary.centroids = torch.zeros_like(centroids)
    if assignment.shape != vocabulary.assignment.shape or centroids.shape[1] != model.config.d_model:
        raise DataError(f"interests of {tuple(assignment.shape)} tokens", f"{tuple(vocabulary.assignment.shape)}")
    model.load_state_dict(continued | dict(interests))


def mark_rows(model: MISSRec, catalogue: Catalogue, n_trained: int) -> None:
    """Tell the model which rows came after its training and which are retired.

    Parameters
    ----------
    model : MISSRec
    catalogue : Catalogue
        Its items may have a column ``retired``.
    n_trained : int
        Rows of the catalogue that it was trained on.
    """
    usable = model.recommendable
    if model.towers.id_embedding is not None:
        model.towers.trained_ids[n_trained:] = False
    mask = model.towers.masks(dropout=False).mask
    usable[n_trained:] &= mask.any(0)[n_trained:]
    if RETIRED in catalogue.items.column_names:
        retired = catalogue.items[RETIRED].fill_null(False).to_numpy()
        usable[FIRST_ITEM_ROW:] &= torch.from_numpy(~retired.astype(bool))
    model.excluded = torch.nonzero(~usable).flatten()


@torch.inference_mode()
def nearest_interests(vocabulary: InterestVocabulary, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the interest of every token, [modality, item]: the nearest of the frozen centroids, 0 for no token."""
    assigned = torch.zeros(mask.shape, dtype=torch.int64)
    for places in torch.nonzero(mask).split(4096):
        own = tokens[places[:, 0], places[:, 1]]
        distances = torch.cdist(own, vocabulary.centroids[1:])
        assigned[places[:, 0], places[:, 1]] = distances.argmin(1) + 1
    return assigned


def _continued(name: str, tensor: Tensor, known: Mapping[str, Tensor]) -> Tensor:
    if name not in known or tensor.shape == known[name].shape or not name.startswith(_PER_ROW):
        return tensor
    target = known[name]
    if tensor.dim() != target.dim() or any(old > new for old, new in zip(tensor.shape, target.shape, strict=True)):
        return tensor  # load_state_dict says what is wrong
    longer = target.new_zeros(target.shape, dtype=tensor.dtype)
    longer[tuple(slice(size) for size in tensor.shape)] = tensor
    return longer
