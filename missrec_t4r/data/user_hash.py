"""A hash of user ids that never changes: it decides in which partition a user is, now and in later updates.

Whole words of eight bytes are mixed at a time (the finaliser of SplitMix64), for all ids at once; integers are one
word, texts are their UTF-8 bytes, the last word filled with zeros, and their length.
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
    words: npt.NDArray[np.uint64] = np.ndarray(
        len(content) + 1, "<u8", padded, strides=(1,)
    )  # the eight bytes from any position on
    lengths = np.diff(bounds)
    hashes = _mixed(lengths.astype(np.uint64) + _START)
    for at in range(0, int(lengths.max(initial=0)), _WORD):
        longer = np.flatnonzero(lengths > at)
        left = np.minimum(lengths[longer] - at, _WORD).astype(np.uint64)
        word = words[bounds[:-1][longer] + at] & (
            np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - left * np.uint64(8))
        )
        hashes[longer] = _mixed(hashes[longer] ^ word)
    return hashes


def partition_of(hashes: Hashes, partitions: int) -> npt.NDArray[np.uint16]:
    """Return the partition of every hash: equal ranges, so that the order by hash goes through them one by one."""
    return ((hashes >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.uint16)


def _mixed(values: Hashes) -> Hashes:
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _FIRST
        values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
