"""Classical text and image encoders in place of pretrained ones: unit-length vectors with scikit-learn alone.

Text: words and character n-grams, tf-idf, feature hashing with signs (Weinberger et al., ICML 2009). It keeps rare
words, such as brands and model numbers, which a truncated SVD of tf-idf drops and a sentence encoder blurs
(docs/experiments.md). Image: colour histogram, gradient orientations in a grid of cells and a small thumbnail, reduced
by PCA. They need no download, run in seconds and are deterministic, but recognise neither synonyms nor objects: combine
them with a sentence encoder and CLIP (`missrec_t4r.etl.features.hf_encoders`). The fitted state is returned as
`Encoded.state`; with it, new items are encoded exactly like the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_union
from sklearn.preprocessing import normalize

from missrec_t4r.arrays import AnyArray, Bools, Floats
from missrec_t4r.errors import ModalityError
from missrec_t4r.progress import track

State = Mapping[str, AnyArray]

TEXT_WIDTH, IMAGE_WIDTH = 512, 128
HASH_WIDTH = 2**18
_COUNTS: dict[str, Any] = {"n_features": HASH_WIDTH, "norm": None, "alternate_sign": False}
_COUNTERS = {
    "words": HashingVectorizer(token_pattern=r"(?u)\b\w+\b", **_COUNTS),
    "characters": HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), **_COUNTS),
}
_CHUNK = 1 << 14
"""Texts whose vectors are computed at a time: numbers of 64 bits for all of a large catalogue would fill the memory."""
_SEED = 0
"""Of the randomised decomposition."""
SIDE, CELLS, ORIENTATIONS, THUMBNAIL, COLOURS = 64, 4, 8, 8, 4
"""Image side in pixels, cells per side, gradient directions, thumbnail side, levels per colour channel."""
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Exceptions that Pillow raises for a file that is not an image."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of one modality.

    Parameters
    ----------
    vectors : ndarray [item, width], float32
        Unit length; zero where the item lacks the modality.
    present : ndarray [item], bool
        True where the item has the modality.
    encoder : dict
        Description of the encoder: name, parameters, library version.
    broken : list of int
        Items whose content exists but cannot be decoded.
    state : mapping of str to ndarray
        Fitted state, with which further items are encoded alike.
    cached : int
        Distinct contents whose vectors came from the cache.
    """

    vectors: Floats
    present: Bools
    encoder: dict[str, Any]
    broken: list[int] = field(default_factory=list)
    state: State = field(default_factory=dict)
    cached: int = 0


def encode_texts(texts: Sequence[str | None], *, width: int = TEXT_WIDTH, state: State | None = None) -> Encoded:
    """Encode one text per item.

    Parameters
    ----------
    texts : sequence of str or None
        The item lacks the modality where the text is None or has no word.
    width : int
        Of the vectors. The cosine of two texts is off by about ``width ** -0.5``.
    state : mapping of str to ndarray, optional
        Fitted state of an earlier call: nothing is fitted then, and equal texts get equal vectors.

    Raises
    ------
    ModalityError
        Fewer than two items have a text.

    Examples
    --------
    >>> encoded = encode_texts(["red tent", "blue tent", None, "wok"])
    >>> encoded.vectors.shape, encoded.present.tolist()
    ((4, 512), [True, True, False, True])
    """
    if state is not None and "components" in state:
        return _by_components(texts, state)
    hashed = {name: counter.transform([text or "" for text in texts]) for name, counter in _COUNTERS.items()}
    present = np.diff(hashed["words"].indptr) > 0
    if state is None:
        _require_two("text", present)
        state = _fit_texts({name: counts[present] for name, counts in hashed.items()}, width)
    width = int(state["width"][0])
    encoder = {
        "name": "classical-text",
        "method": "hashed words and character 3-5-grams, tf-idf, feature hashing with signs",
        "stands_in_for": "a pretrained text encoder",
        "width": width,
        "library": f"scikit-learn {sklearn.__version__}",
    }
    vectors, rows = np.zeros((len(texts), width), np.float32), np.flatnonzero(present)
    for chunk in (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)):
        folded = [_folded(_weighted(counts[chunk], state, name), width) for name, counts in hashed.items()]
        vectors[chunk] = normalize(np.sum(folded, 0))
    return Encoded(vectors, present, encoder, state=state)


def _fit_texts(hashed: Mapping[str, Any], width: int) -> State:
    """Return the inverse document frequencies of the hash columns that occur, and of one that does not."""
    state = {"width": np.array([width], np.int32)}
    for name, counts in hashed.items():
        idf = TfidfTransformer().fit(counts).idf_
        used = np.unique(counts.indices)
        state[f"{name}_columns"], state[f"{name}_idf"] = used.astype(np.int32), idf[used].astype(np.float32)
        state[f"{name}_unseen_idf"] = np.array([1 + np.log(1 + counts.shape[0])], np.float32)
    return state


def _weighted(counts: Any, state: State, name: str) -> Any:
    """Return tf-idf of unit length with the fitted weights, sparse [item, hash column]; tf is sublinear."""
    idf = np.full(HASH_WIDTH, state[f"{name}_unseen_idf"][0], np.float64)
    idf[state[f"{name}_columns"]] = state[f"{name}_idf"]
    weighted = counts.astype(np.float64)
    weighted.data = (1 + np.log(weighted.data)) * idf[weighted.indices]
    return normalize(weighted, copy=False)


def _folded(weighted: Any, width: int) -> npt.NDArray[np.floating[Any]]:
    """Add up hash columns [item, hash column] with random signs into ``width``: cosines stay the same in mean."""
    weighted.data[weighted.indices >= HASH_WIDTH // 2] *= -1  # the hash is random: its last bit is the sign
    weighted.indices %= width
    return np.asarray(weighted[:, :width].toarray())


def _by_components(texts: Sequence[str | None], state: State) -> Encoded:
    """Encode texts by a truncated SVD of tf-idf, whose state catalogues of November 2026 and before may hold."""
    width = 2**15
    words = HashingVectorizer(n_features=width, ngram_range=(1, 2), norm=None, alternate_sign=False)
    characters = HashingVectorizer(
        n_features=width, analyzer="char_wb", ngram_range=(3, 5), norm=None, alternate_sign=False
    )
    hashed = make_union(words, characters).transform([text or "" for text in texts]).tocsr()
    present = np.asarray(hashed[:, :width].sum(1)).ravel() > 0  # at least one word
    weighted = hashed[present][:, state["columns"]].astype(np.float64)  # sparse [item, fitted column]
    weighted.data = (1 + np.log(weighted.data)) * state["idf"][weighted.indices]
    weighted = normalize(weighted) if present.any() else weighted
    vectors = np.asarray(weighted @ state["components"].T)
    return Encoded(_spread(vectors, present), present, {"name": "classical-text"}, state=state)


def encode_images(paths: Sequence[Path | None], *, width: int = IMAGE_WIDTH, state: State | None = None) -> Encoded:
    """Encode one image per item.

    Parameters
    ----------
    paths : sequence of Path or None
        The item lacks the modality where the path is None, the file is missing, or it cannot be decoded; the latter
        are listed as broken.
    width : int
        Upper bound; fewer images give narrower vectors.
    state : mapping of str to ndarray, optional
        Fitted state of an earlier call: nothing is fitted then.

    Raises
    ------
    ModalityError
        Fewer than two images can be decoded.
    """
    described: list[Floats] = []
    present, broken = np.zeros(len(paths), bool), []
    for item, path in enumerate(track(paths, "images")):
        if path is None or not path.is_file():
            continue
        try:
            with Image.open(path) as image:
                described.append(describe(image))
            present[item] = True
        except UNREADABLE:
            broken.append(item)
    if state is None:
        _require_two("image", present)
        state = _fit_images(np.stack(described), width)
    encoder = {
        "name": "classical-image",
        "method": "colour histogram, gradient orientations per cell and thumbnail, PCA",
        "stands_in_for": "a pretrained image encoder",
        "side": SIDE,
        "width": len(state["components"]),
        "seed": _SEED,
        "library": f"scikit-learn {sklearn.__version__}",
    }
    table = np.stack(described) if described else np.zeros((0, len(state["mean"])), np.float32)
    return Encoded(_spread((table - state["mean"]) @ state["components"].T, present), present, encoder, broken, state)


def _fit_images(table: Floats, width: int) -> State:
    width = min(width, len(table) - 1, table.shape[1])
    reduced = PCA(width, svd_solver="randomized", random_state=_SEED).fit(table)
    return {"mean": reduced.mean_.astype(np.float32), "components": reduced.components_.astype(np.float32)}


def describe(image: Image.Image) -> Floats:
    """Return colours, gradients and thumbnail of an image, each of unit length, concatenated, [feature]."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255
    blocks = pixels.reshape(THUMBNAIL, SIDE // THUMBNAIL, THUMBNAIL, SIDE // THUMBNAIL, 3)
    thumbnail = blocks.mean((1, 3)) - 0.5  # [THUMBNAIL, THUMBNAIL, colour]: the mean of each block
    return np.concatenate([_unit(part.ravel()) for part in (_colours(pixels), _gradients(pixels), thumbnail)])


def _colours(pixels: Floats) -> Floats:
    """Return the joint histogram of the colour levels, [COLOURS ** 3]; the square root damps large uniform areas."""
    level = np.minimum((pixels * COLOURS).astype(np.int64), COLOURS - 1)  # [SIDE, SIDE, colour]
    bins = (level[..., 0] * COLOURS + level[..., 1]) * COLOURS + level[..., 2]
    return np.sqrt(np.bincount(bins.ravel(), minlength=COLOURS**3)).astype(np.float32)


def _gradients(pixels: Floats) -> Floats:
    """Return gradient strength per cell and direction, [CELLS ** 2 * ORIENTATIONS]."""
    down, right = np.gradient(pixels.mean(2))  # each [SIDE, SIDE]
    # Modulo pi: light to dark and dark to light are the same direction.
    direction = np.minimum((np.arctan2(down, right) % np.pi / np.pi * ORIENTATIONS).astype(int), ORIENTATIONS - 1)
    cell = np.arange(SIDE) * CELLS // SIDE  # cell index of a pixel row or column
    bins = (cell[:, None] * CELLS + cell) * ORIENTATIONS + direction  # [SIDE, SIDE]
    return np.bincount(bins.ravel(), np.hypot(down, right).ravel(), CELLS**2 * ORIENTATIONS).astype(np.float32)


def _unit(values: Floats) -> Floats:
    length = float(np.linalg.norm(values))
    return values / length if length > 0 else values


def _spread(vectors: npt.NDArray[np.floating[Any]], present: Bools) -> Floats:
    full = np.zeros((len(present), vectors.shape[1]), np.float32)
    if present.any():
        full[present] = normalize(vectors)
    return full


def _require_two(name: str, present: Bools) -> None:
    if present.sum() < 2:
        raise ModalityError(
            f"{int(present.sum())} of {len(present)} items have a usable {name}",
            "at least two",
            f"check the {name} columns and paths, or leave the modality out",
        )
