"""What the files of a bundle must hold, compared before any of their data is read: rows, columns, shapes, numbers.

A file may be well-formed and still not belong here: forty million items in a catalogue of thirty, an index of item
rows beyond the catalogue, NaN in one weight. ``model.json`` states the model, the vectors in ``catalogue.safetensors``
the number of rows (they take real bytes on disk), and everything else follows from these two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from missrec_t4r.bundle.manifest import CATALOGUE_FILE, MODEL_FILE, WEIGHTS_FILE
from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.io.key_names import with_current_keys
from missrec_t4r.io.tensor_checks import NO_LIMIT, NOT_NEGATIVE, check_ranges, compare, header_of, refused
from missrec_t4r.io.weight_names import current_name
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs.extend import ADDED_LATER, PER_ROW, Uninitialised
from missrec_t4r.schema import FIRST_ITEM_ROW

_TYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
_COUNTED = ("terms.item_knn.counts", "terms.item_knn.frequency", "terms.content_knn.likeness")
_ROWS = ("terms.item_knn.neighbours", "terms.content_knn.alike")
"""Tables of catalogue rows among the weights."""


class Stated(NamedTuple):
    """What a bundle states about itself."""

    n_rows: int
    """Rows of the catalogue, the reserved ones included: the length of every vector table."""
    n_trained: int
    """Rows of the catalogue of the training, the first ones of this catalogue."""
    widths: dict[str, int]
    """Modality -> width of its vectors."""
    d_model: int
    model: dict[str, Any]
    """Content of ``model.json``, under today's keys."""


def stated(folder: Path) -> Stated:
    """Read ``model.json`` and compare the shapes in ``catalogue.safetensors`` with it; no number of it is read.

    Raises
    ------
    BundleError
        They contradict each other.
    """
    file = folder / CATALOGUE_FILE
    try:
        content = json.loads((folder / MODEL_FILE).read_bytes())
        widths, n_trained = content["modalities"], content["rows"]
        d_model = content["config"]["d_model"]
        sizes = [n_trained, d_model, *widths.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refused(
            folder / MODEL_FILE, f"does not describe a model ({error})", "rows, modalities, config"
        ) from error
    if not widths or not all(type(size) is int and size > 0 for size in sizes):
        raise refused(folder / MODEL_FILE, f"states rows, widths and d_model as {sizes}", "whole numbers above 0")
    header = header_of(file)
    vectors = header.get(f"modality.{next(iter(widths))}.vectors")
    n_rows = vectors.shape[0] if vectors is not None and vectors.shape else 0
    if not FIRST_ITEM_ROW < n_trained <= n_rows:
        raise refused(file, f"holds {n_rows} rows", f"at least the {n_trained} of {MODEL_FILE}")
    centroids = header.get("interests.centroids")
    n_interests = centroids.shape[0] if centroids is not None and centroids.shape else 1
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"interests.centroids": ("F32", (n_interests, d_model))}
    expected |= {"interests.assignment": ("I64", (len(widths), n_rows))}
    for name, width in widths.items():
        expected |= {
            f"modality.{name}.vectors": ("F32", (n_rows, width)),
            f"modality.{name}.present": ("BOOL", (n_rows,)),
        }
    compare(file, header, expected)
    return Stated(n_rows, n_trained, widths, d_model, with_current_keys(content))


def check_weights(
    folder: Path, stated: Stated, config: MISSRecConfig, catalogue: Catalogue, event_columns: Sequence[EventColumn]
) -> None:
    """Compare the shapes in ``weights.safetensors`` with those of the model, of which nothing is allocated.

    Raises
    ------
    BundleError
        A tensor is missing, not of the model, or of another shape or type.
    """
    file = folder / WEIGHTS_FILE
    header = {current_name(name): tensor for name, tensor in header_of(file).items()}
    if config.n_encoder_layers + config.n_decoder_layers > len(header):
        layers = config.n_encoder_layers + config.n_decoder_layers
        raise refused(file, f"holds {len(header)} tensors", f"those of {layers} layers, as {MODEL_FILE} states")
    plain = dataclasses.replace(config, feature_scaling="none", mask_untrained_ids=True)  # neither changes a shape
    with torch.device("meta"), Uninitialised():
        own = build_missrec(plain, catalogue, event_columns).state_dict()
    expected = {}
    for name, tensor in own.items():
        stored, shape = header.get(name), tuple(tensor.shape)
        if name.startswith("interests.") or (stored is None and name.startswith(ADDED_LATER)):
            continue
        if stored is not None and name.startswith(PER_ROW) and len(stored.shape) == len(shape) > 0:
            shape = _of_training(name, stored.shape, shape, stated)
        expected[name] = (_TYPES[tensor.dtype], shape)
    compare(file, header, expected)


def _of_training(name: str, stored: tuple[int, ...], own: tuple[int, ...], stated: Stated) -> tuple[int, ...]:
    """Return the shape of a weight with one entry per row: its rows may end at those of the training, or after."""
    n_rows = min(max(stored[0], stated.n_trained), own[0])
    lists = name.startswith("terms.")  # of other items, no longer than the catalogue of the training was
    return n_rows, *(min(size, has) if lists else size for size, has in zip(own[1:], stored[1:]))


def check_numbers(folder: Path, stated: Stated) -> None:
    """Read every number of vectors, interests and weights once: all are finite, and all rows are rows of the catalogue.

    Raises
    ------
    BundleError
        Names file, tensor and row of the first number that is not.
    """
    catalogue = header_of(folder / CATALOGUE_FILE)
    n_interests = catalogue["interests.centroids"].shape[0]
    check_ranges(folder / CATALOGUE_FILE, catalogue, {"interests.assignment": (0, n_interests - 1)})
    weights = header_of(folder / WEIGHTS_FILE)
    limits = dict.fromkeys(_ROWS, (0.0, stated.n_rows - 1.0)) | dict.fromkeys(_COUNTED, NOT_NEGATIVE)
    check_ranges(folder / WEIGHTS_FILE, weights, {name: limits.get(current_name(name), NO_LIMIT) for name in weights})
