"""Classical stand-ins for pretrained encoders: texts and images -> unit-length vectors with scikit-learn alone.

Text: hashed word and character n-grams, tf-idf, truncated SVD. Image: colour histogram, gradient orientations in a
grid of cells and a small thumbnail, reduced by PCA. They need no download, run in seconds and are deterministic, but
know no synonyms and no objects: take CLIP or a sentence encoder where you can (``missrec etl --modality``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from PIL import Image
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import normalize

from missrec_t4r.errors import ModalityError
from missrec_t4r.progress import Progress, quiet

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

HASH_WIDTH = 2**15
SIDE, CELLS, ORIENTATIONS, THUMBNAIL, COLOURS = 64, 4, 8, 8, 4
"""Picture size in pixels, cells per side, gradient directions, thumbnail size, levels per colour channel."""


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
        Fingerprint: name, parameters, library version.
    broken : list of int
        Items whose content is there but cannot be read.
    """

    vectors: Floats
    present: Bools
    encoder: dict[str, Any]
    broken: list[int] = field(default_factory=list)


def encode_texts(texts: Sequence[str | None], *, width: int = 128, seed: int = 0) -> Encoded:
    """Encode one text per item.

    Parameters
    ----------
    texts : sequence of str or None
        None and texts without a word mean that the item lacks the modality.
    width : int
        Upper bound; fewer texts give narrower vectors.
    seed : int
        Of the randomised decomposition.

    Raises
    ------
    ModalityError
        Fewer than two items have a text.

    Examples
    --------
    >>> encoded = encode_texts(["red tent", "blue tent", None, "wok"])
    >>> encoded.vectors.shape, encoded.present.tolist()
    ((4, 2), [True, True, False, True])
    """
    words = HashingVectorizer(n_features=HASH_WIDTH, ngram_range=(1, 2), norm=None, alternate_sign=False)
    characters = HashingVectorizer(
        n_features=HASH_WIDTH, analyzer="char_wb", ngram_range=(3, 5), norm=None, alternate_sign=False
    )
    hashed = make_union(words, characters).transform([text or "" for text in texts])
    present = np.asarray(hashed[:, :HASH_WIDTH].sum(1)).ravel() > 0  # at least one word
    _refuse_lonely("text", present)
    width = min(width, int(present.sum()) - 1)
    reduce = make_pipeline(TfidfTransformer(sublinear_tf=True), TruncatedSVD(width, n_iter=5, random_state=seed))
    encoder = {
        "name": "classical-text",
        "method": "hashed word 1-2-grams and character 3-5-grams, tf-idf, truncated SVD",
        "stands_in_for": "a pretrained text encoder",
        "width": width,
        "seed": seed,
        "library": f"scikit-learn {sklearn.__version__}",
    }
    return Encoded(_spread(reduce.fit_transform(hashed[present]), present), present, encoder)


def encode_images(
    paths: Sequence[Path | None], *, width: int = 128, seed: int = 0, progress: Progress = quiet
) -> Encoded:
    """Encode one picture per item.

    Parameters
    ----------
    paths : sequence of Path or None
        None and files that are not there mean that the item lacks the modality; so do unreadable files, which are
        listed as broken.
    width : int
        Upper bound; fewer pictures give narrower vectors.

    Raises
    ------
    ModalityError
        Fewer than two pictures can be read.
    """
    described: list[Floats] = []
    present, broken = np.zeros(len(paths), bool), []
    for item, path in enumerate(progress.track(paths, "images")):
        if path is None or not path.is_file():
            continue
        try:
            with Image.open(path) as image:
                described.append(describe(image))
            present[item] = True
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            broken.append(item)
    _refuse_lonely("image", present)
    table = np.stack(described)
    width = min(width, len(table) - 1, table.shape[1])
    encoder = {
        "name": "classical-image",
        "method": "colour histogram, gradient orientations per cell and thumbnail, PCA",
        "stands_in_for": "a pretrained image encoder",
        "side": SIDE,
        "width": width,
        "seed": seed,
        "library": f"scikit-learn {sklearn.__version__}",
    }
    vectors = PCA(width, svd_solver="randomized", random_state=seed).fit_transform(table)
    return Encoded(_spread(vectors, present), present, encoder, broken)


def describe(image: Image.Image) -> Floats:
    """Return colours, gradients and thumbnail of a picture, each of unit length, one after the other."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255
    thumbnail = pixels.reshape(THUMBNAIL, SIDE // THUMBNAIL, THUMBNAIL, SIDE // THUMBNAIL, 3).mean((1, 3)) - 0.5
    return np.concatenate([_unit(part.ravel()) for part in (_colours(pixels), _gradients(pixels), thumbnail)])


def _colours(pixels: Floats) -> Floats:
    level = np.minimum((pixels * COLOURS).astype(np.int64), COLOURS - 1)
    bins = (level[..., 0] * COLOURS + level[..., 1]) * COLOURS + level[..., 2]
    return np.sqrt(np.bincount(bins.ravel(), minlength=COLOURS**3)).astype(np.float32)


def _gradients(pixels: Floats) -> Floats:
    down, right = np.gradient(pixels.mean(2))
    direction = np.minimum((np.arctan2(down, right) % np.pi / np.pi * ORIENTATIONS).astype(int), ORIENTATIONS - 1)
    cell = np.arange(SIDE) * CELLS // SIDE
    bins = (cell[:, None] * CELLS + cell) * ORIENTATIONS + direction
    return np.bincount(bins.ravel(), np.hypot(down, right).ravel(), CELLS**2 * ORIENTATIONS).astype(np.float32)


def _unit(values: Floats) -> Floats:
    length = float(np.linalg.norm(values))
    return values / length if length > 0 else values


def _spread(vectors: npt.NDArray[np.floating[Any]], present: Bools) -> Floats:
    full = np.zeros((len(present), vectors.shape[1]), np.float32)
    full[present] = normalize(vectors)
    return full


def _refuse_lonely(name: str, present: Bools) -> None:
    if present.sum() < 2:
        raise ModalityError(
            f"{int(present.sum())} of {len(present)} items have a usable {name}",
            "at least two",
            f"check the {name} columns and paths, or leave the modality out",
        )


def join_texts(columns: Iterable[Sequence[Any]]) -> list[str | None]:
    """Join the texts of several columns item by item; None where all are empty."""
    lines = (
        ". ".join(str(value).strip() for value in row if value and str(value).strip())
        for row in zip(*columns, strict=True)
    )
    return [line or None for line in lines]
