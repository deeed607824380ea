"""Vectors on disk by the hash of what was encoded, so that nothing is encoded twice and a killed run goes on.

One folder per encoder. A shard is two files, ``<shard>.vectors.npy`` and ``<shard>.keys.npy``, each written aside and
renamed, the keys last: a shard without keys is unfinished and is not read. Two runs may write at once.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from missrec_t4r.io.atomic import atomic_write_file

Floats = npt.NDArray[np.float32]

KEY_BYTES = 16


def content_key(content: bytes) -> bytes:
    """Return the key of a text or of a picture file: 128 bits of BLAKE2b."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON-able mapping, whatever its order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class VectorCache:
    """Vectors of one encoder.

    Parameters
    ----------
    folder : Path
        Where the caches of all encoders lie.
    encoder : mapping
        Identity of the encoder; another one gets another folder.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> VectorCache(folder, {"name": "x"}).add([b"k" * 16], np.ones((1, 3), np.float32))
    >>> VectorCache(folder, {"name": "x"}).get([b"k" * 16, b"?" * 16])
    ({0: array([1., 1., 1.], dtype=float32)}, [1])
    """

    def __init__(self, folder: Path, encoder: Mapping[str, Any]) -> None:
        self.folder = Path(folder) / digest(encoder)[:32]
        self._where: dict[bytes, tuple[int, int]] = {}
        self._shards: list[Floats] = []
        for keys, vectors in self._read():
            self._take(keys, vectors)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def get(self, keys: Sequence[bytes]) -> tuple[dict[int, Floats], list[int]]:
        """Return the vectors that are there, by position, and the positions of those that are not."""
        found, missing = {}, []
        for position, key in enumerate(keys):
            if key in self._where:
                shard, line = self._where[key]
                found[position] = np.asarray(self._shards[shard][line])
            else:
                missing.append(position)
        return found, missing

    def add(self, keys: Sequence[bytes], vectors: Floats) -> None:
        """Keep vectors for good.

        Raises
        ------
        DataError
            The disk is full or read-only.
        """
        if not len(keys):
            return
        shard = self.folder / uuid.uuid4().hex
        with atomic_write_file(shard.with_suffix(".vectors.npy")) as file:
            np.save(file, np.asarray(vectors, np.float32))
        with atomic_write_file(shard.with_suffix(".keys.npy")) as file:
            np.save(file, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))
        self._take(list(keys), np.asarray(vectors, np.float32))

    def _take(self, keys: Sequence[bytes], vectors: Floats) -> None:
        self._shards.append(vectors)
        self._where.update((key, (len(self._shards) - 1, line)) for line, key in enumerate(keys))

    def _read(self) -> Iterator[tuple[list[bytes], Floats]]:
        for file in sorted(self.folder.glob("*.keys.npy")):
            vectors = file.with_name(file.name.replace(".keys.", ".vectors."))
            try:
                keys = np.load(file, allow_pickle=False)
                read = np.load(vectors, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                continue  # damaged: worked out again
            if len(keys) == len(read):
                yield [row.tobytes() for row in keys], read
