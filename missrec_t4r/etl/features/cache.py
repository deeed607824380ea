"""Cache of modality vectors on disk, keyed by the hash of the encoded content: a killed or repeated run continues.

One folder per encoder. A shard is two files, ``<shard>.vectors.npy`` and ``<shard>.keys.npy``, each written atomically,
the keys last: a shard without keys is unfinished and is not read. Two processes may write at the same time.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.arrays import Floats
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.io.hashing import json_digest

KEY_BYTES = 16


def content_key(content: bytes) -> bytes:
    """Return the cache key of a text or an image file: 128 bits of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


class VectorCache:
    """Cached vectors of one encoder.

    Parameters
    ----------
    folder : Path or None
        Folder of the caches of all encoders; None keeps nothing.
    encoder : mapping
        Identity of the encoder; each has its own folder.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> VectorCache(folder, {"name": "x"}).add([b"k" * 16], np.ones((1, 3), np.float32))
    >>> VectorCache(folder, {"name": "x"}).get([b"k" * 16, b"?" * 16])
    {b'kkkkkkkkkkkkkkkk': array([1., 1., 1.], dtype=float32)}
    """

    def __init__(self, folder: Path | None, encoder: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else folder / json_digest(encoder)[:32]
        self._location: dict[bytes, tuple[int, int]] = {}
        self._shards: list[Path] = []
        for shard in [] if self.folder is None else sorted(self.folder.glob("*.vectors.npy")):
            try:
                keys = np.load(_keys_of(shard), allow_pickle=False)
                n_vectors = len(np.load(shard, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError):
                continue  # unfinished or damaged: its contents are encoded again
            if len(keys) == n_vectors:
                self._index([row.tobytes() for row in keys], shard)

    def __contains__(self, key: bytes) -> bool:
        return key in self._location

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Floats]:
        """Return the vectors of those keys that are cached."""
        rows_of_shard: dict[int, dict[bytes, int]] = {}
        for key in keys:
            if key in self._location:
                shard, row = self._location[key]
                rows_of_shard.setdefault(shard, {})[key] = row
        cached: dict[bytes, Floats] = {}
        for shard, rows in rows_of_shard.items():  # one after the other: a mapped file stays open
            vectors = np.load(self._shards[shard], mmap_mode="r", allow_pickle=False)
            cached |= {key: np.array(vectors[row]) for key, row in rows.items()}
        return cached

    def add(self, keys: Sequence[bytes], vectors: Sequence[Floats] | Floats) -> None:
        """Write vectors to the cache.

        Raises
        ------
        DataError
            The disk is full or read-only.
        """
        if self.folder is None or not keys:
            return
        shard = (self.folder / uuid.uuid4().hex).with_suffix(".vectors.npy")
        with atomic_write_file(shard) as file:
            np.save(file, np.asarray(vectors, np.float32))
        with atomic_write_file(_keys_of(shard)) as file:
            np.save(file, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))
        self._index(keys, shard)

    def _index(self, keys: Sequence[bytes], shard: Path) -> None:
        self._shards.append(shard)
        self._location.update((key, (len(self._shards) - 1, row)) for row, key in enumerate(keys))


def _keys_of(shard: Path) -> Path:
    return shard.with_name(shard.name.replace(".vectors.", ".keys."))
