"""Whitening and dimension reduction of vectors: one fitted affine map, stored so that new items get the same one.

Whitening gives every direction the same variance (Su et al. 2021, arXiv:2103.15316): x -> (x - mean) U S^-1/2, with the
covariance U S U'. Reduction keeps the directions of greatest variance (PCA). The results are scaled to unit length.
"""

from __future__ import annotations

import numpy as np

from missrec_t4r.arrays import Bools, Floats
from missrec_t4r.errors import ModalityError
from missrec_t4r.etl.features.sklearn_encoders import State

MEAN, MATRIX = "reduction.mean", "reduction.matrix"
_LEAST_VARIANCE = 1e-6
"""Relative to the greatest; directions below it hold only rounding errors, which whitening would blow up."""


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
    return {MEAN: mean.astype(np.float32), MATRIX: np.ascontiguousarray(matrix, np.float32)}


def reduced(vectors: Floats, present: Bools, state: State) -> Floats:
    """Return the mapped vectors [item, reduced] in unit length; items without the modality stay zero."""
    out = np.zeros((len(vectors), state[MATRIX].shape[1]), np.float32)
    mapped = (vectors[present] - state[MEAN]) @ state[MATRIX]  # [present item, reduced]
    lengths = np.linalg.norm(mapped, axis=1, keepdims=True)
    out[present] = mapped / np.where(lengths > 0, lengths, 1)  # the mean itself maps to zero
    return out
