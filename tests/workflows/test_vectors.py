"""Vectors of items: whitening reads the items that have one, and a cache belongs to one encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from missrec_t4r.etl.features.cache import VectorCache
from missrec_t4r.etl.features.encode import fit_reduction, reduced
from tests.workflows.tables import few_open_files


def test_items_without_the_modality_do_not_move_the_whitening() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(3.0, size=(40, 4)).astype(np.float32)
    present = np.arange(40) < 30
    vectors[~present] = 0
    state = fit_reduction(vectors, present, whiten=True, reduce_to=None)
    alone = fit_reduction(vectors[:30], np.ones(30, bool), whiten=True, reduce_to=None)
    for name, values in state.items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-5, atol=1e-6)
    assert not reduced(vectors, present, state)[~present].any()


def test_vectors_of_another_encoder_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    key = b"k" * 16
    VectorCache(tmp_path, {"name": "one", "revision": 1}).add([key], np.ones((1, 3), np.float32))
    assert key in VectorCache(tmp_path, {"revision": 1, "name": "one"})
    assert key not in VectorCache(tmp_path, {"name": "one", "revision": 2})


def test_a_cache_may_have_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A shard that could not be opened would count as damaged, and be encoded again by every run."""
    keys = [number.to_bytes(16, "little") for number in range(40)]
    written = VectorCache(tmp_path, {"name": "x"})
    for number, key in enumerate(keys):
        written.add([key], np.full((1, 2), number, np.float32))
    with few_open_files():
        cached = VectorCache(tmp_path, {"name": "x"}).get([*keys, b"?" * 16])
    assert {key: vector.tolist() for key, vector in cached.items()} == {keys[n]: [n, n] for n in range(40)}
