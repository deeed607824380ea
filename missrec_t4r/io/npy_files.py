"""Read .npy files of numbers: the header is checked before anything is allocated, and nothing is ever unpickled."""

from __future__ import annotations

import math
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from missrec_t4r.arrays import AnyArray

npy: Any = np.lib.format  # has no types


def read_npy(file: Path, *, mapped: bool = False) -> AnyArray:
    """Return the array of a .npy file.

    Parameters
    ----------
    file : Path
    mapped : bool
        Map the file, copy on write, instead of reading it.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is not a .npy file, holds other things than numbers, or claims another size than it has.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "vectors.npy"
    >>> np.save(file, np.eye(2))
    >>> read_npy(file).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            version = npy.read_magic(stream)
            shape, _, dtype = (
                npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
            )
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, EOFError, TokenError) as error:
            raise ValueError(f"it is not a .npy file: {error}") from error
        n_bytes = size - stream.tell()
    if dtype.kind not in "fiub" or dtype.names is not None:
        raise ValueError(f"it holds {dtype}, no numbers")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != n_bytes:
        raise ValueError(f"it claims {dtype} of shape {shape} and has {n_bytes} bytes")
    array: AnyArray = np.load(file, "c" if mapped else None, allow_pickle=False)
    return array
