"""Stable 64-bit hash of user ids: assigns users to partitions, in the first build and in all later updates.

Must never change: data folders are partitioned and ordered by it. Vectorised over ids; words of eight bytes are mixed
by the finaliser of SplitMix64. An integer is one word; a text is its UTF-8 bytes, zero-padded to whole words, and its
length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]

_START = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WORD = 8


def hash_ids(ids: pa.Array) -> Hashes:
    """Return one 64-bit hash per id, [id]; ids are int64 or string, without nulls.

    Examples
    --------
    >>> first, second, again = hash_ids(pa.array(["ann", "ben", "ann"])).tolist()
    >>> first == again, first == second
    (True, False)
    """
    if pa.types.is_integer(ids.type):
        return _mixed(np.asarray(ids).astype(np.int64).view(np.uint64) + _START)
    texts = ids.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(texts) + 1, texts.offset * _WORD)
    content = bytes(data) if data is not None else b""
    padded = np.frombuffer(content + bytes(_WORD), np.uint8)
    # Overlapping view: words[i] is the eight bytes from byte i on
    words: npt.NDArray[np.uint64] = np.ndarray(len(content) + 1, "<u8", padded, strides=(1,))
    lengths = np.diff(bounds)
    hashes = _mixed(lengths.astype(np.uint64) + _START)
    for start in range(0, int(lengths.max(initial=0)), _WORD):
        longer = np.flatnonzero(lengths > start)  # ids that have bytes in this word
        n_bytes = np.minimum(lengths[longer] - start, _WORD).astype(np.uint64)
        mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - n_bytes * np.uint64(8))  # drops bytes of the next id
        hashes[longer] = _mixed(hashes[longer] ^ (words[bounds[:-1][longer] + start] & mask))
    return hashes


def partition_of(hashes: Hashes, partitions: int) -> npt.NDArray[np.uint16]:
    """Return the partition of every hash, [id]; partitions are equal ranges, so the order by hash is by partition."""
    return ((hashes >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.uint16)


def _mixed(values: Hashes) -> Hashes:
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _FIRST
        values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
