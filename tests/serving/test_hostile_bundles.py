"""Manipulated bundles with matching checksums, and an audit of the code that serving executes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from missrec_t4r.bundle.manifest import BUNDLE_FILES, write_manifest
from missrec_t4r.cli import app
from missrec_t4r.errors import BundleError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.triton.repository import write_repository
from tests.serving.conftest import serving

WEIGHTS, ITEMS = "weights.safetensors", "items.parquet"


def damaged(folder: Path) -> None:
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncated(folder: Path) -> None:
    file = folder / ITEMS
    file.write_bytes(file.read_bytes()[:-100])


def cut_tensors(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    write_manifest(folder)


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}" * 50)
    write_manifest(folder)


def lying_header(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    write_manifest(folder)


def pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weights": [1.0]}, protocol=4))
    write_manifest(folder)


def torch_weights(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    write_manifest(folder)


def numpy_objects(folder: Path) -> None:
    np.save(folder / "catalogue.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (folder / "catalogue.npy").rename(folder / "catalogue.safetensors")
    write_manifest(folder)


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    shutil.move(folder / "model.json", outside)
    (folder / "model.json").symlink_to(outside)
    write_manifest(folder)


def one_more_file(folder: Path) -> None:
    (folder / "model.py").write_text("print('hello')\n")


def a_hidden_file(folder: Path) -> None:
    (folder / ".model.py").write_text("print('hello')\n")


def a_bomb(folder: Path) -> None:
    table = pa.table({"item_id": pa.array(["a"] * 2_000_000)})
    pq.write_table(table, folder / ITEMS, compression="zstd", use_dictionary=False)
    write_manifest(folder)


def extension_type(folder: Path) -> None:
    field = pa.field("item_id", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type"})
    pq.write_table(pa.table([pa.array(["a"])], schema=pa.schema([field])), folder / ITEMS)
    write_manifest(folder)


def a_path_that_climbs(folder: Path) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    content["files"]["../../model.json"] = content["files"].pop("model.json")
    file.write_text(json.dumps(content))


def a_deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 200_000)


@pytest.mark.parametrize(
    ("spoil", "file", "reason"),
    [
        (damaged, WEIGHTS, "is damaged: its SHA-256"),
        (truncated, ITEMS, "bytes; expected"),
        (cut_tensors, WEIGHTS, "is not a safetensors file .*(not fully covered|IncompleteBuffer)"),
        (huge_header, WEIGHTS, "claims a header of 4611686018427387904 bytes"),
        (lying_header, WEIGHTS, "is not a safetensors file .*(not fully covered|IncompleteBuffer)"),
        (pickled_weights, WEIGHTS, "is a pickle"),
        (torch_weights, WEIGHTS, "is a zip archive, as torch.save writes"),
        (numpy_objects, "catalogue.safetensors", "is a numpy file"),
        (linked_out, "model.json", "is a link to"),
        (one_more_file, "model.py", "is not part of a bundle"),
        (a_bomb, ITEMS, "compressed by ZSTD"),
        (a_hidden_file, ".model.py", "is not part of a bundle"),
        (extension_type, ITEMS, "extension type"),
        (a_path_that_climbs, "manifest.json", "is damaged or of an unknown format"),
        (a_deep_manifest, "manifest.json", "is not JSON"),
    ],
)
def test_wrong_bundles_are_refused_with_file_and_reason(
    bundle: Path, tmp_path: Path, spoil: Callable[[Path], None], file: str, reason: str
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    spoil(folder)
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["bundle", "verify", "--bundle", str(folder)])
    assert done.exit_code == 2
    with pytest.raises(BundleError, match=rf"(?s){file}.*{reason}"):
        MISSRecClient.of_bundle(folder)  # the server's two models


def test_a_right_bundle_is_described(bundle: Path) -> None:
    done = CliRunner().invoke(app, ["bundle", "verify", "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["files"] == len(BUNDLE_FILES)
    assert result["items"] == 30


_AUDIT = """
import json as _json, os as _os, sys as _sys
_seen = _os.open({log!r}, _os.O_WRONLY | _os.O_CREAT | _os.O_APPEND)
def _hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "import"):
        _os.write(_seen, (_json.dumps([event, repr(arguments)[:200]]) + "\\n").encode())
    if event == "open" and str(arguments[0]).startswith({bundle!r}):
        _os.write(_seen, (_json.dumps([event, str(arguments[0]), str(arguments[1])]) + "\\n").encode())
_sys.addaudithook(_hook)
"""


@pytest.mark.triton
def test_the_serving_path_unpickles_nothing_and_imports_nothing_by_name(bundle: Path, tmp_path: Path) -> None:
    """Run both models of a real server under an audit hook, from import to response."""
    repository, log = tmp_path / "models", tmp_path / "audit.jsonl"
    write_repository(bundle, repository)
    inside = str(repository / "missrec_ranker" / "1" / "bundle")
    for model in ("missrec_sessions", "missrec_ranker"):
        file = repository / model / "1" / "model.py"
        file.write_text(_AUDIT.format(log=str(log), bundle=inside) + file.read_text())
    for server in serving(repository):
        with MISSRecClient(server.grpc_url) as client:
            client.recommend([["ware-3-ü"], []], rules={"where": {"train_count": {"min": 1}}}, reasons=True)
        loading = len(log.read_text().splitlines())
        with MISSRecClient(server.grpc_url) as client:
            client.recommend([["ware-3-ü"], ["gone", None]], rules={"where": {"train_count": {"min": 2}}}, reasons=True)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = {event[0] for event in events}
    assert "import" in kinds
    assert {Path(event[1]).name for event in events if event[0] == "open"} >= {ITEMS, "model.json"}
    assert kinds & {"pickle.find_class", "os.system", "os.exec", "socket.connect"} == set()
    assert all(event[2] in ("r", "rb") for event in events if event[0] == "open")
    words: set[str] = set()
    for name in ("model.json", "features.json", "session_transform.json"):
        words |= _words(json.loads((bundle / name).read_text()))
    imported = {event[1].split("'")[1] for event in events if event[0] == "import"}
    assert len(words) > 5
    assert imported & (words - set(sys.stdlib_module_names)) == set()
    assert [event for event in events[loading:] if event[0] != "import"] == []  # answering touches nothing


def _words(content: object) -> set[str]:
    if isinstance(content, dict):
        return set().union(*(_words(value) for value in content.values())) if content else set()
    return {content} if isinstance(content, str) else set()


def test_nothing_of_ours_that_serves_names_a_pickle() -> None:
    root = Path(__file__).parents[2]
    for folder in ("missrec_t4r/serving", "missrec_t4r/export", "missrec_t4r/data", "triton_models"):
        for file in (root / folder).rglob("*.py"):
            if file.name == "merlin_systems.py":
                continue  # the classic ensemble is pickles: docs/security.md
            text = file.read_text()
            for word in ("import pickle", "cloudpickle", "torch.load(", "allow_pickle=True", "import_module(", "eval("):
                assert word not in text.replace(".eval(", "").replace("literal_eval(", ""), (
                    f"{os.fspath(file)} has {word}"
                )
