"""Bundles with a retrieval index; the tests lower the number of rows from which it is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from missrec_t4r.bundle.bundle import load_bundle, write_bundle
from missrec_t4r.bundle.manifest import BUNDLE_FILES, SEARCH_FILE, verify_bundle, write_manifest
from missrec_t4r.bundle.update_catalogue import previous_of, rollback_catalogue, update_catalogue
from missrec_t4r.errors import BundleError
from missrec_t4r.io.tensor_file import (
    PeriodicPageRelease,
    StoredRows,
    advise_random_access,
    release_pages,
    write_tensors,
)
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import LoadedRun
from missrec_t4r.serving.triton.repository import BUNDLE_IN_REPOSITORY, write_repository


@pytest.fixture
def large(loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("bundle", "update_catalogue"):
        monkeypatch.setattr(f"missrec_t4r.bundle.{module}.SEARCH_FROM", 10)
    monkeypatch.setattr("missrec_t4r.bundle.update_catalogue._MOST_IN_MEMORY", 64)  # vectors in a nameless file
    monkeypatch.setattr("missrec_t4r.runs.extend._LARGE", 64)  # weights as they are mapped
    monkeypatch.setattr("missrec_t4r.retrieval.index_file.CHUNK", 12)
    write_bundle(tmp_path / "bundle", model=loaded.model, catalogue=loaded.catalogue, data=loaded.data)
    return tmp_path / "bundle"


def answers(bundle: Path, sessions: np.ndarray, *, certified_from: int, own: bool) -> tuple[np.ndarray, np.ndarray]:
    back = load_bundle(bundle)
    tables = back.tables if own else None
    ranking = Ranker(back.model, back.catalogue, certified_from=certified_from, tables=tables).rank(sessions, top_k=12)
    return ranking.rows, ranking.scores


def same(bundle: Path) -> None:
    n_rows = load_bundle(bundle).catalogue.n_rows
    sessions = np.random.default_rng(0).integers(3, n_rows, (40, 5))
    rows, scores = answers(bundle, sessions, certified_from=10, own=True)
    plain, expected = answers(bundle, sessions, certified_from=10**9, own=False)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert np.array_equal(rows, plain)


def test_a_large_bundle_lists_its_tables_and_answers_with_them(large: Path, tmp_path: Path) -> None:
    assert set(verify_bundle(large)["files"]) == {*BUNDLE_FILES, SEARCH_FILE}
    same(large)
    write_repository(large, tmp_path / "repository")
    verify_bundle(tmp_path / "repository" / BUNDLE_IN_REPOSITORY)


def test_updates_and_rollbacks_bring_the_tables_of_their_catalogue(large: Path) -> None:
    before = verify_bundle(large)["files"][SEARCH_FILE]["sha256"]
    width = load_bundle(large).catalogue.modalities["text"].width
    ids = load_bundle(large).catalogue.items["item_id"].to_pylist()
    new = pa.table({"item_id": [ids[0], "new lamp", "new desk"], "retired": [True, False, False]})
    vectors = np.random.default_rng(1).normal(size=(3, width)).astype(np.float32)
    vectors[0] = np.nan
    update_catalogue(large, new, modalities={"text": vectors})
    same(large)
    assert verify_bundle(large)["files"][SEARCH_FILE]["sha256"] != before
    weights = load_file(large / "weights.safetensors")
    assert {len(one) for name, one in weights.items() if name.startswith("terms.item_knn.neigh")} <= {len(ids) + 3 + 2}
    rollback_catalogue(large)
    assert verify_bundle(large)["files"][SEARCH_FILE]["sha256"] == before
    assert previous_of(large).is_dir()
    same(large)


@pytest.mark.parametrize("damage", ["flipped", "gone", "pickle"])
def test_damaged_tables_are_refused_and_named(large: Path, damage: str) -> None:
    content = bytearray((large / SEARCH_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (large / SEARCH_FILE).write_bytes(content if damage == "flipped" else b"\x80\x04.")
    if damage == "gone":
        (large / SEARCH_FILE).unlink()
    if damage == "pickle":
        write_manifest(large)
    with pytest.raises(BundleError, match=r"search\.safetensors"):
        load_bundle(large)


@pytest.mark.parametrize("name", ["table.place", "table.several", "table.tokens", "quantised.codes"])
def test_sealed_tables_of_something_else_are_refused(large: Path, name: str) -> None:
    stored = load_file(large / SEARCH_FILE)
    stored = {key: tensor.clone() for key, tensor in stored.items()}
    stored[name] = stored[name] + 1000 if stored[name].dtype == torch.int64 else stored[name][1:]
    save_file(stored, large / SEARCH_FILE)
    write_manifest(large)
    with pytest.raises(BundleError, match=r"search\.safetensors holds"):
        load_bundle(large)


def test_a_bundle_without_tables_is_read_as_ever(large: Path) -> None:
    (large / SEARCH_FILE).unlink()
    assert write_manifest(large)["format"] == 1
    assert load_bundle(large).tables is None


def test_sealed_nan_in_the_vectors_is_refused(large: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(large, tmp_path / "copy"))
    stored = {name: tensor.clone() for name, tensor in load_file(copy / "catalogue.safetensors").items()}
    stored["modality.text.vectors"][7, 0] = torch.nan
    save_file(stored, copy / "catalogue.safetensors")
    write_manifest(copy)
    with pytest.raises(BundleError, match=r"NaN or infinity in modality\.text\.vectors, row 7"):
        load_bundle(copy)


def test_few_rows_are_read_and_many_are_mapped_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(3000, 1024)
    write_tensors(tmp_path / "rows.safetensors", {"rows": table, "other": torch.arange(5)})
    rows = torch.tensor([[7, 0], [2999, 7]])
    assert torch.equal(StoredRows(tmp_path / "rows.safetensors", "rows").take(rows), table[rows])
    assert StoredRows(tmp_path / "rows.safetensors", "rows").take(rows[:0]).shape == (0, 2, 1024)
    mapped, own = load_file(tmp_path / "rows.safetensors")["rows"], table.clone()
    advise_random_access([mapped])

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().split("rows.safetensors")[1:]
        return sum(int(one.split("Rss:")[1].split()[0]) for one in lines)

    before = resident()
    assert torch.equal(mapped, table)
    assert resident() - before > 10_000
    release = PeriodicPageRelease([mapped, own], every=3)
    release.count(2)
    assert resident() - before > 10_000
    release.count(1)
    assert resident() - before < 1_000
    assert torch.equal(mapped, table)
    assert torch.equal(own, table)  # what is no file is left alone
    mapped[0, 0] += 1
    release_pages([mapped])
    assert mapped[0, 0] == table[0, 0] + 1  # as is what was written to
