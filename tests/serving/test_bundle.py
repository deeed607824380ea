from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from missrec_t4r.bundle.bundle import load_bundle, write_bundle
from missrec_t4r.bundle.manifest import BUNDLE_FILES, MANIFEST_FILE, verify_bundle, write_manifest
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import BundleError
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.runs.run_folder import LoadedRun
from tests.serving import shop


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_a_bundle_comes_back_as_it_was(bundle: Path, loaded: LoadedRun) -> None:
    back = load_bundle(bundle)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    assert back.model.config == loaded.model.config
    assert back.catalogue.items.equals(loaded.catalogue.items)
    assert list(back.catalogue.modalities) == ["text", "image"]  # their order is that of the interest assignments
    for name, modality in loaded.catalogue.modalities.items():
        assert np.array_equal(back.catalogue.modalities[name].vectors, modality.vectors)
        assert np.array_equal(back.catalogue.modalities[name].present, modality.present)
        assert back.catalogue.modalities[name].encoder == modality.encoder
    rows = np.array([[3, 9, 12]])
    with torch.inference_mode():
        session = torch.from_numpy(rows)
        assert torch.equal(back.model(session), loaded.model(session))
    assert not back.model.training


def test_modalities_may_share_their_presence_mask(loaded: LoadedRun, tmp_path: Path) -> None:
    catalogue = shop.catalogue()
    text = catalogue.modalities["text"]
    catalogue.modalities["image"].present[:] = text.present
    shared = Catalogue(
        catalogue.items, {"text": text, "image": replace(catalogue.modalities["image"], present=text.present)}
    )
    write_bundle(tmp_path / "bundle", model=shop.model_for(shared), catalogue=shared, data=loaded.data)
    assert load_bundle(tmp_path / "bundle").catalogue.modalities["image"].present.tolist() == text.present.tolist()


def test_the_manifest_lists_every_file_and_nothing_is_code(bundle: Path) -> None:
    assert {file.name for file in bundle.iterdir()} == {MANIFEST_FILE, *BUNDLE_FILES}
    assert set(verify_bundle(bundle)["files"]) == set(BUNDLE_FILES)
    pickles = {bytes([0x80, protocol]) for protocol in range(2, 6)}
    assert not [file for file in bundle.iterdir() if file.read_bytes()[:2] in pickles or file.suffix in {".pkl", ".pt"}]


def test_the_request_is_cut_to_what_the_model_takes(run: Path, loaded: LoadedRun, tmp_path: Path) -> None:
    data = Path(shutil.copytree(loaded.data, tmp_path / "data"))
    file = data / "session_transform.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_sequence_length": 500}))
    write_bundle(tmp_path / "bundle", model=loaded.model, catalogue=loaded.catalogue, data=data)
    assert load_bundle(tmp_path / "bundle").transform.max_sequence_length == shop.MAX_LENGTH


@pytest.mark.parametrize("name", [MANIFEST_FILE, *BUNDLE_FILES])
@pytest.mark.parametrize(("place", "mask"), [(0.0, 0x20), (0.3, 0x01), (0.62, 0xFF), (1.0, 0x01)])
def test_one_flipped_byte_is_refused_and_its_file_named(copy: Path, name: str, place: float, mask: int) -> None:
    content = bytearray((copy / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= mask
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        load_bundle(copy)


@pytest.mark.parametrize("name", [MANIFEST_FILE, *BUNDLE_FILES])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        verify_bundle(copy)


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_longer_and_a_shorter_file_are_refused_by_size(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    for content in (whole + b" ", whole[:-1], b""):
        (copy / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{len(content)} bytes; expected: {len(whole)} bytes"):
            verify_bundle(copy)


def test_a_file_that_nobody_listed_is_refused(copy: Path) -> None:
    (copy / "model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(BundleError, match=r"model\.pkl is not part of a bundle"):
        verify_bundle(copy)


def test_partial_verification_still_sees_sizes_and_its_own_files(copy: Path) -> None:
    flip(copy / "weights.safetensors")
    verify_bundle(copy, only=("items.parquet",))
    flip(copy / "items.parquet")
    with pytest.raises(BundleError, match=r"items\.parquet is damaged"):
        verify_bundle(copy, only=("items.parquet",))


def test_a_manifest_that_was_edited_to_fit_an_edited_file_is_refused(copy: Path) -> None:
    file, manifest = copy / "model.json", copy / MANIFEST_FILE
    file.write_text(file.read_text() + " ")
    content = json.loads(manifest.read_text())
    content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        verify_bundle(copy)


def test_a_newer_format_says_so(copy: Path) -> None:
    (copy / MANIFEST_FILE).write_text(json.dumps({"format": 3, "files": {}}))
    with pytest.raises(BundleError, match="format 3; expected: format 2 at most. use the version that wrote it"):
        verify_bundle(copy)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"format": 1, "files": {"../x": {}}}', "\x80"])
def test_a_manifest_that_is_none_is_refused(copy: Path, content: str) -> None:
    (copy / MANIFEST_FILE).write_text(content, encoding="latin-1")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.json", lambda c: c | {"config": c["config"] | {"d_model": 18}}),
        ("model.json", lambda c: c | {"config": c["config"] | {"surprise": 1}}),
        ("model.json", lambda c: c | {"modalities": {"sound": 3}}),
        ("features.json", lambda c: c | {"modalities": {}}),
    ],
)
def test_parts_that_do_not_fit_are_refused(copy: Path, name: str, change: object) -> None:
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(change(content)))  # type: ignore[operator]  a function per case
    write_manifest(copy)
    with pytest.raises(BundleError, match=r"do not fit each other|catalogue\.safetensors holds"):
        load_bundle(copy)


def test_an_older_bundle_is_replaced_whole(copy: Path, loaded: LoadedRun) -> None:
    flip(copy / "weights.safetensors")
    write_bundle(copy, model=loaded.model, catalogue=loaded.catalogue, data=loaded.data)
    verify_bundle(copy)
    assert [entry.name for entry in copy.parent.iterdir()] == [copy.name]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, loaded: LoadedRun) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        write_bundle(tmp_path / "thesis", model=loaded.model, catalogue=loaded.catalogue, data=loaded.data)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_failed_write_leaves_nothing(tmp_path: Path, loaded: LoadedRun) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BundleError, match=r"session_transform\.json"):
        write_bundle(tmp_path / "bundle", model=loaded.model, catalogue=loaded.catalogue, data=tmp_path / "data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_loading_and_ranking_unpickle_nothing_and_need_no_merlin(bundle: Path) -> None:
    watched = """
import sys
found = []
sys.addaudithook(lambda event, args: found.append(args) if event.startswith("pickle.") else None)
import numpy as np
from missrec_t4r.serving.triton.backend import RankerBackend, SessionsBackend
import pathlib
folder = pathlib.Path(sys.argv[1])
sessions = SessionsBackend(folder)
assert "torch" not in sys.modules, "the sessions model starts without torch"
found.clear()  # what importing libraries does is theirs
answer = RankerBackend(folder).infer(sessions.infer([
    {"item_ids": np.array([["ware-1-ü".encode(), b"x"]], object), "length": np.array([[2]], np.int32)}]))[0]
assert answer["n_unknown"].tolist() == [[1]], answer
heavy = {"nvtabular", "merlin", "transformers4rec", "transformers", "dask"} & set(sys.modules)
assert not heavy, heavy
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", watched, str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
