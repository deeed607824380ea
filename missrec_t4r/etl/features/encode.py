"""Encode the contents of one modality: texts or image paths in, unit-length vectors and the encoder's fingerprint out.

Encoders are the classical ones (fitted here, or with a given fitted state) or pretrained ones, whose vectors are cached
by content. Pretrained encoders see every distinct content once, shorter texts first, so that a batch needs little
padding. Whitening and dimension reduction follow: one fitted affine map, stored so that new items get the same one.

Whitening gives every direction the same variance (Su et al. 2021, arXiv:2103.15316): x -> (x - mean) U S^-1/2, with the
covariance U S U'. Reduction keeps the directions of greatest variance (PCA). The results are scaled to unit length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from missrec_t4r.arrays import Bools, Floats
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import ModalityError
from missrec_t4r.etl.features.cache import VectorCache, content_key
from missrec_t4r.etl.features.sklearn_encoders import UNREADABLE, Encoded, State, encode_images, encode_texts
from missrec_t4r.io.hashing import json_digest
from missrec_t4r.progress import track

CLASSICAL = "classical"
_MEAN, _MATRIX = "reduction.mean", "reduction.matrix"
_LEAST_VARIANCE = 1e-6
"""Relative to the greatest; directions below it hold only rounding errors, which whitening would blow up."""
_FLUSH = 256
"""Vectors held in memory before they are written to the cache: the most that a killed run loses."""
_NOT_IDENTIFYING = {"library", "method", "stands_in_for", "seed", "width"}
"""Description of a classical encoder that is left out of its fingerprint: the fitted state already determines it."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Settings of the encoder of one modality."""

    encoder: str = CLASSICAL
    """``classical``, a folder, or a name in the local Hugging Face cache."""
    device: str = "auto"
    """Device of pretrained encoders: auto, cpu or cuda."""
    precision: str = "fp32"
    """Precision of pretrained encoders: fp32, bf16 or fp16."""
    batch_size: int = 64
    """Texts or images per forward pass of a pretrained encoder."""
    cache: Path | None = None
    """Folder of cached vectors; None disables the cache."""
    width: int | None = None
    """Width of the classical encoders' vectors, an upper bound for pictures; None for each encoder's own."""
    whiten: bool = False
    """Whiten the vectors: the same variance in every direction."""
    reduce_to: int | None = None
    """Number of principal components to keep; None keeps all."""

    def __post_init__(self) -> None:
        """Validate the settings."""
        require_at_least(1, batch_size=self.batch_size, width=self.width, reduce_to=self.reduce_to)


def encode_contents(
    kind: str, contents: Sequence[Any], settings: EncoderSettings, state: State | None = None
) -> Encoded:
    """Encode one modality of all items.

    Parameters
    ----------
    kind : {"text", "image"}
    contents : sequence of str, Path or None
        One per item; None where the item has none.
    state : mapping of str to ndarray, optional
        Fitted state of an earlier call: nothing is fitted, and whitening and reduction are those of the state.

    Returns
    -------
    Encoded
        ``encoder`` holds the fingerprint and all settings that another call needs to reproduce the vectors.
    """
    if settings.encoder != CLASSICAL:
        encoded = _pretrained(kind, contents, settings)
    else:
        encode: Callable[..., Encoded] = encode_texts if kind == "text" else encode_images
        width = {} if settings.width is None else {"width": settings.width}
        encoded = encode(contents, state=state, **width)
    fitted = dict(encoded.state if state is None else state)
    if state is None and (settings.whiten or settings.reduce_to is not None):
        fitted |= fit_reduction(encoded.vectors, encoded.present, whiten=settings.whiten, reduce_to=settings.reduce_to)
    vectors = reduced(encoded.vectors, encoded.present, fitted) if _MATRIX in fitted else encoded.vectors
    encoder = {**encoded.encoder, "model": settings.encoder, "precision": settings.precision}
    if _MATRIX in fitted:
        encoder |= {"whiten": settings.whiten, "reduced_to": int(fitted[_MATRIX].shape[1])}
    encoder["fingerprint"] = fingerprint(encoded.encoder, fitted)
    return replace(encoded, vectors=vectors, encoder=encoder, state=fitted)


def fingerprint(identity: dict[str, Any], state: State) -> str:
    """Return the hash that identifies a vector space: weights, preprocessing, fitted state; not device or precision."""
    hashes = {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for name, array in state.items()}
    identifying = {key: value for key, value in identity.items() if key not in _NOT_IDENTIFYING}
    return "sha256:" + json_digest({"encoder": identifying, "state": hashes})


def to_encode(kind: str, contents: Sequence[Any], settings: EncoderSettings) -> dict[str, int]:
    """Count contents: all items, those with content, distinct ones, cached ones (for ``--dry-run``)."""
    keys = {key for _, key in _keyed(kind, contents)}
    cached = 0
    if settings.encoder != CLASSICAL:
        cache = _cache(_encoder(kind, settings), settings)
        cached = sum(key in cache for key in keys)
    present = sum(content is not None for content in contents)
    return {"items": len(contents), "with_content": present, "distinct": len(keys), "cached": cached}


def _encoder(kind: str, settings: EncoderSettings) -> Any:
    from missrec_t4r.etl.features.hf_encoders import PretrainedImage, PretrainedText

    encoder: Callable[..., Any] = PretrainedText if kind == "text" else PretrainedImage
    return encoder(settings.encoder, device=settings.device, precision=settings.precision)


def _cache(encoder: Any, settings: EncoderSettings) -> VectorCache:
    return VectorCache(settings.cache, {**encoder.identity, "precision": settings.precision})


def _pretrained(kind: str, contents: Sequence[Any], settings: EncoderSettings) -> Encoded:
    encoder = _encoder(kind, settings)
    cache = _cache(encoder, settings)
    key_of = dict(track(_keyed(kind, contents), f"{kind}: reading", len(contents)))
    item_of = {key: item for item, key in reversed(key_of.items())}  # the first item with this content
    vector_of = cache.get(item_of)
    n_cached = len(vector_of)
    missing = [item for key, item in item_of.items() if key not in vector_of]
    missing.sort(key=lambda item: len(contents[item]) if kind == "text" else 0)  # equal lengths need no padding
    batches = [missing[start : start + settings.batch_size] for start in range(0, len(missing), settings.batch_size)]
    buffer: dict[bytes, Floats] = {}  # what is not in the cache yet
    for batch in track(batches, f"{kind}: encoding", len(batches)):
        readable = [(key_of[item], content) for item in batch if (content := _read(kind, contents[item])) is not None]
        vectors = encoder.encode([content for _, content in readable]) if readable else []
        if not np.isfinite(vectors).all():
            raise ModalityError(
                f"the {kind} encoder gave NaN or infinity", "finite vectors", "try --precision fp32, or another encoder"
            )
        buffer |= {key: vector for (key, _), vector in zip(readable, vectors, strict=True)}
        if len(buffer) >= _FLUSH or batch is batches[-1]:
            cache.add(list(buffer), list(buffer.values()))
            vector_of |= buffer
            buffer = {}
    n_items = len(contents)
    if not vector_of:
        raise ModalityError(
            f"0 of {n_items} items have a usable {kind}", "at least one", f"check the {kind} columns and paths"
        )
    vectors = np.zeros((n_items, len(next(iter(vector_of.values())))), np.float32)
    present, broken = np.zeros(n_items, bool), []
    for item, key in key_of.items():
        if key in vector_of:
            vectors[item], present[item] = vector_of[key], True
        else:
            broken.append(item)
    return Encoded(vectors, present, dict(encoder.identity), broken, cached=n_cached)


def _keyed(kind: str, contents: Sequence[Any]) -> Iterable[tuple[int, bytes]]:
    """Yield the items with content and their keys; a missing image file counts as no content."""
    for item, content in enumerate(contents):
        if content is None or (kind == "image" and not content.is_file()):
            continue
        yield item, content_key(content.read_bytes() if kind == "image" else content.encode())


def _read(kind: str, content: Any) -> Any:
    """Return the encoder's input, or None for an image that cannot be decoded."""
    if kind == "text":
        return content
    try:
        with Image.open(BytesIO(Path(content).read_bytes())) as picture:
            return picture.convert("RGB")
    except UNREADABLE:
        return None


def fit_reduction(vectors: Floats, present: Bools, *, whiten: bool, reduce_to: int | None) -> State:
    """Return mean and matrix [width, reduced].

    Parameters
    ----------
    vectors : ndarray [item, width]
    present : ndarray [item], bool
        Items that have the modality; only these are fitted.
    whiten : bool
        Divide by the standard deviation of each direction.
    reduce_to : int or None
        Number of directions to keep; fewer if the items span fewer.

    Raises
    ------
    ModalityError
        Fewer than two items, or items that are all the same.
    """
    rows = vectors[present].astype(np.float64)  # [present item, width]
    if len(rows) < 2:
        raise ModalityError(f"{len(rows)} items have vectors to whiten", "at least two", "leave --whiten out")
    mean = rows.mean(0)  # [width]
    covariance = np.atleast_2d(np.cov(rows - mean, rowvar=False))  # [width, width]; cov is 0-d for width 1
    variance, directions = np.linalg.eigh(covariance)  # [width], [width, width]: eigenvectors are columns
    variance, directions = variance[::-1], directions[:, ::-1]  # eigh sorts ascending: greatest variance first
    n_directions = int((variance > _LEAST_VARIANCE * max(variance[0], 0.0)).sum())
    if variance[0] <= 0 or not n_directions:
        raise ModalityError("all vectors are the same", "vectors that differ", "check the texts or pictures")
    if not whiten:
        n_directions = len(variance)
    n_directions = min(n_directions, reduce_to or n_directions)
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(len(variance))])
    # An eigenvector's sign is arbitrary: its largest entry is made positive, so that the result is reproducible.
    matrix = (directions * signs)[:, :n_directions]  # [width, reduced]
    if whiten:
        matrix = matrix / np.sqrt(variance[:n_directions])
    return {_MEAN: mean.astype(np.float32), _MATRIX: np.ascontiguousarray(matrix, np.float32)}


def reduced(vectors: Floats, present: Bools, state: State) -> Floats:
    """Return the mapped vectors [item, reduced] in unit length; items without the modality stay zero."""
    out = np.zeros((len(vectors), state[_MATRIX].shape[1]), np.float32)
    mapped = (vectors[present] - state[_MEAN]) @ state[_MATRIX]  # [present item, reduced]
    lengths = np.linalg.norm(mapped, axis=1, keepdims=True)
    out[present] = mapped / np.where(lengths > 0, lengths, 1)  # the mean itself maps to zero
    return out
