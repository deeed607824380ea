"""Whitening and reduction of vectors: one fitted affine map, kept so that new items take the same one.

Whitening gives every direction the same variance (Su et al. 2021, arXiv:2103.15316): x -> (x - mean) U S^-1/2, with the
covariance U S U'. Reduction keeps the directions of greatest variance. Both end in unit length.
"""

from __future__ import annotations

import numpy as np

from missrec_t4r.errors import ModalityError
from missrec_t4r.etl.features.sklearn_encoders import Bools, Floats, State

MEAN, MATRIX = "reduction.mean", "reduction.matrix"
_LEAST_VARIANCE = 1e-6
"""Relative to the greatest; directions below carry rounding errors alone and are left out when whitening."""


def fit_reduction(vectors: Floats, present: Bools, *, whiten: bool, reduce_to: int | None) -> State:
    """Return mean and matrix [width, reduced].

    Parameters
    ----------
    vectors : ndarray [item, width]
    present : ndarray [item], bool
        The items that count.
    whiten : bool
        Divide by the standard deviation of each direction.
    reduce_to : int or None
        How many directions to keep; fewer if the items span fewer.

    Raises
    ------
    ModalityError
        Fewer than two items, or items that are all the same.
    """
    some = vectors[present].astype(np.float64)
    if len(some) < 2:
        raise ModalityError(f"{len(some)} items have vectors to whiten", "at least two", "leave --whiten out")
    mean = some.mean(0)
    variance, directions = np.linalg.eigh(np.atleast_2d(np.cov(some - mean, rowvar=False)))
    variance, directions = variance[::-1], directions[:, ::-1]
    kept = int((variance > _LEAST_VARIANCE * max(variance[0], 0.0)).sum())
    if variance[0] <= 0 or not kept:
        raise ModalityError("all vectors are the same", "vectors that differ", "check the texts or pictures")
    if not whiten:
        kept = len(variance)
    kept = min(kept, reduce_to or kept)
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(len(variance))])
    matrix = (directions * signs)[:, :kept]  # an eigenvector's sign is arbitrary: make the result reproducible
    if whiten:
        matrix = matrix / np.sqrt(variance[:kept])
    return {MEAN: mean.astype(np.float32), MATRIX: np.ascontiguousarray(matrix, np.float32)}


def reduced(vectors: Floats, present: Bools, state: State) -> Floats:
    """Apply the map to the items that count; the others stay zero."""
    out = np.zeros((len(vectors), state[MATRIX].shape[1]), np.float32)
    mapped = (vectors[present] - state[MEAN]) @ state[MATRIX]
    lengths = np.linalg.norm(mapped, axis=1, keepdims=True)
    out[present] = mapped / np.where(lengths > 0, lengths, 1)
    return out
