"""Rare users and items leave events and catalogue together."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.etl.engine.reduce import keep_frequent
from missrec_t4r.etl.engine.workdir import FILTER_FOLDER, KEPT_FOLDER, partition_path
from missrec_t4r.etl.pipeline import etl
from tests.workflows.tables import few_open_files, items_of, save_vectors, write

ITEMS = pd.DataFrame({"item_id": ["a", "b", "c", "d", "e"]})


def _events(*sessions: str) -> pd.DataFrame:
    """Each word is a user's session, one letter per item."""
    lines = [(f"u{user}", item, time) for user, word in enumerate(sessions) for time, item in enumerate(word)]
    return pd.DataFrame(lines, columns=["user_id", "item_id", "timestamp"])


def test_k_core_repeats_until_nothing_changes(tmp_path: Path) -> None:
    # 2-core: d occurs once and goes; then u2 has one event left and goes; then c occurs once and goes. e never occurs.
    text = save_vectors(tmp_path / "text.npy", np.arange(1, 11).reshape(5, 2))
    files = write(tmp_path, _events("abab", "abc", "dc"), ITEMS)
    etl(*files, tmp_path / "data", k_core=2, modality={"text": text})
    catalogue = Catalogue.load(tmp_path / "data" / "catalogue")
    assert catalogue.ids_of([3, 4]) == ["a", "b"]
    assert catalogue.n_items == 2
    np.testing.assert_array_equal(catalogue.modalities["text"].vectors[3:], [[1, 2], [3, 4]])
    assert items_of(tmp_path / "data", "test") == {"u0": [3, 4, 3, 4]}
    assert items_of(tmp_path / "data", "train") == {"u0": [3, 4], "u1": [3, 4]}


def test_min_item_count_is_a_single_pass(tmp_path: Path) -> None:
    etl(*write(tmp_path, _events("abab", "abc", "dc"), ITEMS), tmp_path / "data", min_item_count=2)
    assert Catalogue.load(tmp_path / "data" / "catalogue").ids_of([3, 4, 5]) == ["a", "b", "c"]
    assert items_of(tmp_path / "data", "train") == {"u0": [3, 4], "u1": [3], "u2": [5]}  # u2 stays with one event


def test_a_core_that_nothing_survives_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--k-core 9 with --min-item-count 0 leaves no event.*lower the numbers"):
        etl(*write(tmp_path, _events("abab"), ITEMS), tmp_path / "data", k_core=9)


def test_there_may_be_more_partitions_than_files_that_a_process_may_open(tmp_path: Path) -> None:
    """A user in each of 40 partitions, on an item of two events."""
    (tmp_path / FILTER_FOLDER).mkdir()
    (tmp_path / KEPT_FOLDER).mkdir()
    for number in range(40):
        items = np.array([number // 2, number // 2], np.int32)[: 1 + number % 2]
        file = partition_path(tmp_path, FILTER_FOLDER, number, "npz")
        np.savez(file, users=np.zeros_like(items), items=items, eligible=np.ones(len(items), bool))
    with few_open_files():
        kept = keep_frequent(tmp_path, 40, {"k_core": 2, "min_item_count": 0})
    assert kept.all()
    masks = [np.load(partition_path(tmp_path, KEPT_FOLDER, number, "npy")).tolist() for number in (0, 1)]
    assert masks == [[False], [True, True]]  # the user of one event goes
