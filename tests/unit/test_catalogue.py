"""Catalogue and sessions as files: rows do not change, damaged files are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, ModalityError, SchemaError


def test_ids_are_encoded_to_rows_and_decoded(data: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    assert catalogue.rows_of(["P0", "P11", "nobody", None]).tolist() == [3, 14, 2, 1]
    assert catalogue.ids_of([14, 3]) == ["P11", "P0"]
    assert not catalogue.modalities["image"].present[5]


def test_the_catalogue_of_a_data_folder_is_named(data: Path) -> None:
    with pytest.raises(DataError, match=f"holds no catalogue.json; .* take {data / 'catalogue'}"):
        Catalogue.load(data)


def test_saving_replaces_the_folder_whole(data: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    target = tmp_path / "catalogue"
    target.mkdir()
    (target / "stale.npy").write_text("old")
    catalogue.save(target)
    assert sorted(p.name for p in target.iterdir()) == [
        "catalogue.json",
        "image.npy",
        "items.parquet",
        "presence.npy",
        "text.npy",
        "vocabulary.parquet",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["catalogue"]  # nothing is left aside


def test_damaged_files_are_named(data: Path, tmp_path: Path) -> None:
    Catalogue.load(data / "catalogue").save(tmp_path / "c")
    vectors = np.load(tmp_path / "c" / "text.npy")
    np.save(tmp_path / "c" / "text.npy", vectors[:-1])
    with pytest.raises(ModalityError, match=r"'text' has vectors of shape \(14, 8\)"):
        Catalogue.load(tmp_path / "c")
    vectors[7, 2] = np.nan
    np.save(tmp_path / "c" / "text.npy", vectors)
    with pytest.raises(ModalityError, match="NaN or infinity in row 7"):
        Catalogue.load(tmp_path / "c")
    meta = json.loads((tmp_path / "c" / "catalogue.json").read_text())
    (tmp_path / "c" / "catalogue.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(DataError, match="catalogue format 99"):
        Catalogue.load(tmp_path / "c")
    with pytest.raises(DataError, match="missrec etl"):
        Catalogue.load(tmp_path / "nothing")


def test_sessions_are_ragged_arrays(data: Path) -> None:
    sessions = Sessions.load(data / "test")
    histories, targets = sessions.split_last()
    assert (len(sessions), histories.lengths.max(), targets[0]) == (40, 7, sessions[0][-1])
    assert sessions.padded([0], 3).tolist() == [sessions[0][-3:].tolist()]
    assert Sessions.from_lists([[1, 3, 2, 4]]).known()[0].tolist() == [3, 4]


def test_a_folder_without_sessions_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(DataError, match="missrec etl"):
        Sessions.load(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match="item_id-list"):
        Sessions.load(tmp_path)


def test_fingerprint_variants_and_state_are_saved_and_loaded(data: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    text = catalogue.modalities["text"]
    assert text.fingerprint is None  # nobody said whose vectors these are
    fitted = Modality(
        text.vectors,
        text.present,
        {"name": "clip", "fingerprint": "sha256:1"},
        {"word_drop": -text.vectors},
        {"mean": np.arange(8, dtype=np.float32)},
    )
    Catalogue(catalogue.items, {**catalogue.modalities, "text": fitted}).save(tmp_path / "c")
    back = Catalogue.load(tmp_path / "c")
    assert list(back.modalities) == list(catalogue.modalities)  # a variant is no modality
    assert back.modalities["text"].fingerprint == "sha256:1"
    np.testing.assert_array_equal(back.modalities["text"].variants["word_drop"], -text.vectors)
    np.testing.assert_array_equal(back.modalities["text"].state["mean"], np.arange(8))
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "c").iterdir()}
    assert modes == {0o644}  # others may read
    np.save(tmp_path / "c" / "text.word_drop.npy", text.vectors[:-1])
    with pytest.raises(ModalityError, match="variant 'word_drop' of modality 'text'"):
        Catalogue.load(tmp_path / "c")
