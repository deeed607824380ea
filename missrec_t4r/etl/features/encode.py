"""One modality encoded: contents in, unit vectors and the encoder's fingerprint out, whichever encoder it is.

Contents are texts or paths of pictures. Encoders are the classical ones (fitted here, or with a fitted state) or
pretrained ones, whose vectors are cached by content; whitening and reduction follow.
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

from missrec_t4r.errors import ConfigError, ModalityError
from missrec_t4r.etl.features.cache import VectorCache, content_key, digest
from missrec_t4r.etl.features.sklearn_encoders import UNREADABLE, Encoded, Floats, State, encode_images, encode_texts
from missrec_t4r.etl.features.whitening import MATRIX, MEAN, fit_reduction, reduced
from missrec_t4r.progress import track

CLASSICAL = "classical"
_FLUSH = 256
"""Vectors in memory before they are written to the cache: what a kill can cost."""
_COSMETIC = {"library", "method", "stands_in_for", "seed", "width"}
"""What a classical encoder says about itself beside its state, which already tells everything."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How to encode one modality."""

    encoder: str = CLASSICAL
    """``classical``, a folder, or a name in the local Hugging Face cache."""
    device: str = "auto"
    """Of pretrained encoders: auto, cpu or cuda."""
    precision: str = "fp32"
    """Of pretrained encoders: fp32, bf16 or fp16."""
    batch_size: int = 64
    """Contents per forward pass of a pretrained encoder."""
    cache: Path | None = None
    """Folder of cached vectors; None keeps none."""
    width: int = 128
    """Upper bound of the classical encoders' width."""
    whiten: bool = False
    """Give every direction the same variance."""
    reduce_to: int | None = None
    """Keep so many directions of greatest variance."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.batch_size < 1 or self.width < 1 or (self.reduce_to is not None and self.reduce_to < 1):
            raise ConfigError("a batch size or a width below 1", "at least 1")


def encode_contents(
    kind: str,
    contents: Sequence[Any],
    settings: EncoderSettings,
    state: State | None = None,
) -> Encoded:
    """Encode one modality of all items.

    Parameters
    ----------
    kind : {"text", "image"}
    contents : sequence of str, Path or None
        One per item; None says that it has none.
    state : mapping of str to ndarray, optional
        Of an earlier call: nothing is fitted, and whitening and reduction are those of the state.

    Returns
    -------
    Encoded
        ``encoder`` holds the fingerprint and everything that `encode_contents` needs again.
    """
    encoded = _plain(kind, contents, settings, state)
    fitted = dict(encoded.state)
    if state is not None:
        fitted |= {key: value for key, value in state.items() if key in (MEAN, MATRIX)}
    elif settings.whiten or settings.reduce_to is not None:
        fitted |= fit_reduction(encoded.vectors, encoded.present, whiten=settings.whiten, reduce_to=settings.reduce_to)
    vectors = reduced(encoded.vectors, encoded.present, fitted) if MATRIX in fitted else encoded.vectors
    encoder = {**encoded.encoder, "model": settings.encoder, "precision": settings.precision}
    if MATRIX in fitted:
        encoder |= {"whiten": settings.whiten, "reduced_to": int(fitted[MATRIX].shape[1])}
    encoder["fingerprint"] = fingerprint(encoded.encoder, fitted)
    return replace(encoded, vectors=vectors, encoder=encoder, state=fitted)


def fingerprint(identity: dict[str, Any], state: State) -> str:
    """Return what identifies the vectors' space: weights, preprocessing and fitted state; not device or precision."""
    hashes = {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for name, array in state.items()}
    named = {key: value for key, value in identity.items() if key not in _COSMETIC}
    return "sha256:" + digest({"encoder": named, "state": hashes})


def to_encode(kind: str, contents: Sequence[Any], settings: EncoderSettings) -> dict[str, int]:
    """Return how many contents there are, are distinct, and are already cached: what a run would do."""
    keys = {key for _, key in _keyed(kind, contents)}
    known = 0
    if settings.encoder != CLASSICAL:
        cache = _cache(_encoder(kind, settings), settings)
        known = sum(key in cache for key in keys) if cache is not None else 0
    present = sum(content is not None for content in contents)
    return {"items": len(contents), "with_content": present, "distinct": len(keys), "cached": known}


def _plain(kind: str, contents: Sequence[Any], settings: EncoderSettings, state: State | None) -> Encoded:
    """Encode without whitening and reduction."""
    if settings.encoder != CLASSICAL:
        return _pretrained(kind, contents, settings)
    fitted = {key: value for key, value in state.items() if key not in (MEAN, MATRIX)} if state is not None else None
    if kind == "text":
        return encode_texts(contents, width=settings.width, state=fitted)
    return encode_images(contents, width=settings.width, state=fitted)


def _encoder(kind: str, settings: EncoderSettings) -> Any:
    from missrec_t4r.etl.features.hf_encoders import PretrainedImage, PretrainedText

    chosen: Callable[..., Any] = PretrainedText if kind == "text" else PretrainedImage
    return chosen(settings.encoder, device=settings.device, precision=settings.precision)


def _cache(encoder: Any, settings: EncoderSettings) -> VectorCache | None:
    named = {**encoder.identity, "precision": settings.precision}
    return VectorCache(settings.cache, named) if settings.cache is not None else None


def _pretrained(kind: str, contents: Sequence[Any], settings: EncoderSettings) -> Encoded:
    encoder = _encoder(kind, settings)
    cache = _cache(encoder, settings)
    key_of = dict(track(_keyed(kind, contents), f"{kind}: reading", len(contents)))
    item_of = {key: item for item, key in reversed(key_of.items())}  # the first item with this content
    distinct = list(item_of)
    known, missing = cache.get(distinct) if cache is not None else ({}, list(range(len(distinct))))
    found = {distinct[position]: vector for position, vector in known.items()}
    fresh = sorted((item_of[distinct[position]] for position in missing), key=lambda item: _size(contents[item]))
    batches = [fresh[start : start + settings.batch_size] for start in range(0, len(fresh), settings.batch_size)]
    kept: dict[bytes, Floats] = {}
    for batch in track(batches, f"{kind}: encoding", len(batches)):
        readable = [(key_of[item], content) for item in batch if (content := _read(kind, contents[item])) is not None]
        vectors = encoder.encode([content for _, content in readable]) if readable else []
        _refuse_nan(kind, vectors)
        kept |= {key: vector for (key, _), vector in zip(readable, vectors, strict=True)}
        if len(kept) >= _FLUSH:
            found |= _flush(cache, kept)
            kept = {}
    found |= _flush(cache, kept)
    return _spread(kind, len(contents), key_of, found, encoder.identity, len(known))


def _flush(cache: VectorCache | None, kept: dict[bytes, Floats]) -> dict[bytes, Floats]:
    if cache is not None and kept:
        cache.add(list(kept), np.stack(list(kept.values())))
    return kept


def _spread(
    kind: str, items: int, key_of: dict[int, bytes], found: dict[bytes, Floats], identity: dict[str, Any], cached: int
) -> Encoded:
    """Return one vector per item from one vector per content; contents without one are broken."""
    if not found:
        raise ModalityError(
            f"0 of {items} items have a usable {kind}", "at least one", f"check the {kind} columns and paths"
        )
    vectors = np.zeros((items, len(next(iter(found.values())))), np.float32)
    present = np.zeros(items, bool)
    for item, key in key_of.items():
        if key in found:
            vectors[item], present[item] = found[key], True
    broken = [item for item, key in key_of.items() if key not in found]
    return Encoded(vectors, present, dict(identity), broken, cached=cached)


def _keyed(kind: str, contents: Sequence[Any]) -> Iterable[tuple[int, bytes]]:
    """Yield the items that have a content, with its key; a picture that is not there is no content."""
    for item, content in enumerate(contents):
        if content is None or (kind == "image" and not content.is_file()):
            continue
        yield item, content_key(content.read_bytes() if kind == "image" else content.encode())


def _read(kind: str, content: Any) -> Any:
    """Return what the encoder takes, or None for a broken picture."""
    if kind == "text":
        return content
    try:
        with Image.open(BytesIO(Path(content).read_bytes())) as picture:
            return picture.convert("RGB")
    except UNREADABLE:
        return None


def _size(content: Any) -> int:
    return len(content) if isinstance(content, str) else 0  # texts of one length need no padding


def _refuse_nan(kind: str, vectors: Any) -> None:
    if len(vectors) and not np.isfinite(vectors).all():
        raise ModalityError(
            f"the {kind} encoder gave NaN or infinity", "finite vectors", "try --precision fp32, or another encoder"
        )
