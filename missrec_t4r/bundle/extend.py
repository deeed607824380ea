"""A model on a catalogue that has grown since its training: known rows keep what they learned.

New items are scored by their modalities alone, whatever the configuration says of untrained IDs; retired items cannot
be recommended but stay what they were inside a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.io.tensor_file import advise_random_access
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.runs.run_folder import added_later
from missrec_t4r.schema import FIRST_ITEM_ROW, RETIRED

_LARGE = 1 << 24
"""Numbers in a tensor (64 MiB) from which it is not copied."""
_PER_ROW = ("item_encoder.id_embedding.", "fusion.phi", "item_knn.", "content_knn.")
"""Weights with a line per catalogue row: they end where training ended."""


class Uninitialised(TorchFunctionMode):
    """A model that is built within gets no random numbers: weights are about to be loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Let initialisers of `torch.nn.init` return the tensor as it is."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def load_weights(model: MISSRec, weights: Mapping[str, Tensor], interests: Mapping[str, Tensor]) -> None:
    """Load weights that were made for the first rows of the model's catalogue.

    Parameters
    ----------
    model : MISSRec
        Built for the whole catalogue.
    weights : mapping of str to Tensor
        Of the training; what is learned per row is continued with zeros. Large tensors become the model's own, mapped
        from their file as they may be; small ones are copied.
    interests : mapping of str to Tensor
        Centroids and assignment of this catalogue version: the centroids' number is the training's.
    """
    known = model.state_dict()
    weights = added_later(known, weights) | dict(weights)
    continued = {name: _continued(name, tensor, known) for name, tensor in weights.items()}
    centroids, assignment = interests["interests.centroids"], interests["interests.assignment"]
    vocabulary = model.interests
    if centroids.shape != vocabulary.centroids.shape:
        vocabulary.centroids = torch.zeros_like(centroids)
    if assignment.shape != vocabulary.assignment.shape or centroids.shape[1] != model.config.d_model:
        raise DataError(f"interests of {tuple(assignment.shape)} tokens", f"{tuple(vocabulary.assignment.shape)}")
    given = {name: own if own.numel() >= _LARGE else own.clone() for name, own in (continued | dict(interests)).items()}
    advise_random_access(own for own in given.values() if own.numel() >= _LARGE)
    model.load_state_dict(given, assign=True)


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
    if model.item_encoder.id_embedding is not None:
        model.item_encoder.trained_ids[n_trained:] = False
    mask = model.item_encoder.masks(dropout=False).mask
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
