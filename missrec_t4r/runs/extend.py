"""Load trained weights into a model, also of an extended catalogue: rows of the training keep their trained values.

New items are scored by their modalities alone, whatever ``mask_untrained_ids`` is. Retired items are
not recommended, but still count inside a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import CheckpointError
from missrec_t4r.io.tensor_file import advise_random_access
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.missrec import MISSRec

_LARGE = 1 << 24
"""Elements (64 MiB of float32) from which a tensor stays memory-mapped instead of being copied."""
_CHUNK = 4096
_LONGEST_LIST = 600
"""Most characters of an error's list of tensors that differ."""
ADDED_LATER = ("terms.cold_start.", "terms.rare_items.", "terms.history_bias.offset")
"""Prefixes of tensors that runs of earlier versions lack."""
PER_ROW = (
    *("item_encoder.id_embedding.", "item_encoder.candidate_id_embedding."),
    *("fusion.phi", "terms.item_knn.", "terms.content_knn."),
)
"""Prefixes of weights with one entry per catalogue row; they end at the last row of the training."""


class Uninitialised(TorchFunctionMode):
    """Context in which a model is built without random initialisation, because weights are loaded next."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor unchanged from every initialiser of `torch.nn.init`."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def load_weights(model: MISSRec, weights: Mapping[str, Tensor]) -> None:
    """Load weights of a training on the first rows of the model's catalogue; their shapes were checked.

    Parameters
    ----------
    model : MISSRec
        Built for the whole catalogue.
    weights : mapping of str to Tensor
        Trained weights, and the interests of this catalogue version. Large tensors are assigned as they are, so they
        stay memory-mapped; small ones are copied.
    """
    state = _for_all_rows(model, weights)
    state = {name: tensor if tensor.numel() >= _LARGE else tensor.clone() for name, tensor in state.items()}
    advise_random_access(tensor for tensor in state.values() if tensor.numel() >= _LARGE)
    model.load_state_dict(state, assign=True)


def load_strictly(model: torch.nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model; any difference in names or shapes is an error that lists the first ones.

    Raises
    ------
    CheckpointError
        Missing, unexpected or differently shaped tensors.
    """
    try:
        model.load_state_dict(added_later(model.state_dict(), weights) | dict(weights))
    except RuntimeError as error:
        raise CheckpointError(
            f"{source}: {shorten(str(error), _LONGEST_LIST)}",
            "the weights of this model and catalogue",
            "use the data folder and recipe of this run, or train again",
        ) from error


def added_later(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's tensors that weights of an earlier version lack; their initial values change no score."""
    return {name: own[name] for name in own if name.startswith(ADDED_LATER) and name not in weights}


@torch.no_grad()
def load_extended(
    model: MISSRec, weights: Mapping[str, Tensor], catalogue: Catalogue, n_trained: int, source: str
) -> None:
    """Load a run's weights into a model over its catalogue with new items at the end.

    A new item gets the nearest of the trained interests and is scored by its modalities alone.

    Parameters
    ----------
    model : MISSRec
        Built for the whole catalogue.
    weights : mapping of str to Tensor
        Of the run.
    catalogue : Catalogue
    n_trained : int
        Rows of the catalogue of the training.
    source : str
        The weights' file, for messages.

    Raises
    ------
    CheckpointError
        The weights are of another model.
    """
    before, assigned = weights["interests.assignment"], torch.zeros_like(model.interests.assignment)
    if len(before) == len(assigned):  # [modality, catalogue]
        assigned[:, :n_trained] = before
    load_strictly(model, _for_all_rows(model, weights) | {"interests.assignment": assigned}, source)
    items = model.eval().item_encoder.catalogue()
    modality, mask = items.modality[:, n_trained:], items.mask[:, n_trained:]
    model.interests.assignment[:, n_trained:] = nearest_interests(model.interests, modality, mask)
    mark_rows(model, catalogue, n_trained)


def mark_rows(model: MISSRec, catalogue: Catalogue, n_trained: int) -> None:
    """Mark the rows that were added after the training, and the retired ones, in the model's buffers.

    Parameters
    ----------
    model : MISSRec
    catalogue : Catalogue
        Its item table may have a column ``retired``.
    n_trained : int
        Rows of the catalogue of the training.
    """
    recommendable = model.recommendable  # [catalogue], changed in place
    if model.item_encoder.id_embedding is not None:
        model.item_encoder.trained_ids[n_trained:] = False
    mask = model.item_encoder.masks(dropout=False).mask
    recommendable[n_trained:] &= mask.any(0)[n_trained:]  # a new item without any modality cannot be scored
    recommendable &= torch.from_numpy(~catalogue.retired)
    model.excluded = torch.nonzero(~recommendable).flatten()


@torch.inference_mode()
def nearest_interests(vocabulary: InterestVocabulary, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Assign modality embeddings to the nearest of the trained centroids.

    Parameters
    ----------
    vocabulary : InterestVocabulary
    embeddings : Tensor [modality, item, dim]
    mask : Tensor [modality, item], bool
        True where the item has the modality.

    Returns
    -------
    Tensor [modality, item], int64
        Number of the interest; 0, the padding interest, where the item lacks the modality or there is no centroid.
    """
    assigned = torch.zeros(mask.shape, dtype=torch.int64)
    if not vocabulary.n_interests:
        return assigned
    for chunk in torch.nonzero(mask).split(_CHUNK):  # bounds the matrix of distances
        modality, item = chunk.unbind(1)
        distances = torch.cdist(embeddings[modality, item], vocabulary.centroids[1:])  # [chunk, interest]
        assigned[modality, item] = distances.argmin(1) + 1
    return assigned


def _for_all_rows(model: MISSRec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a training's weights for a model of more rows, in which this makes room for as many interests."""
    model.interests.centroids = torch.zeros_like(weights["interests.centroids"])
    own = model.state_dict()
    return added_later(own, weights) | {name: _extend(name, tensor, own) for name, tensor in weights.items()}


def _extend(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Return a per-row weight padded with zeros to the model's shape; any other tensor as it is."""
    if name not in own or tensor.shape == own[name].shape or not name.startswith(PER_ROW):
        return tensor
    target = own[name]
    if tensor.dim() != target.dim() or any(old > new for old, new in zip(tensor.shape, target.shape, strict=True)):
        return tensor  # load_state_dict raises the error
    extended = target.new_zeros(target.shape, dtype=tensor.dtype)
    extended[tuple(slice(size) for size in tensor.shape)] = tensor
    return extended
