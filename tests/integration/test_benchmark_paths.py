"""A benchmark whose folder does not exist says so before it measures, without a traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("words", "error", "found"),
    [
        ("quality.missing_modality --run NOWHERE", "CheckpointError", "holds no run.json"),
        ("quality.shop_statistics --data NOWHERE", "DataError", "holds no interactions.parquet, items.parquet"),
        ("release.compare --release NOWHERE", "ReleaseError", "holds no missrec.py"),
        ("speed.alternate --before HERE --bundle NOWHERE", "BundleError", "holds no manifest.json"),
        ("speed.alternate --before NOWHERE --bundle NOWHERE", "DataError", "is no checkout of this package"),
        ("speed.alternate --bundle NOWHERE", "ConfigError", "no --before"),
        ("speed.large_bundle --bundle NOWHERE --out OUT", "BundleError", "holds no manifest.json"),
        ("speed.large_server --bundle NOWHERE", "BundleError", "holds no manifest.json"),
        ("speed.predicted NOWHERE", "DataError", "holds no catalogue.json"),
        ("speed.serving --bundle NOWHERE", "BundleError", "holds no manifest.json"),
        ("speed.serving --large NOWHERE", "BundleError", "holds no manifest.json"),
        ("speed.topk --bundle NOWHERE", "BundleError", "holds no manifest.json"),
        ("speed.train --data NOWHERE", "DataError", "text_clip.npy, image_clip.npy"),
        ("speed.train --release NOWHERE", "ReleaseError", "holds no missrec.py"),
    ],
)
def test_a_wrong_path_ends_a_benchmark_with_a_message(
    words: str,
    error: str,
    found: str,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {"NOWHERE": tmp_path / "nowhere", "HERE": repository, "OUT": tmp_path / "out"}
    module, *given = [str(folders.get(word, word)) for word in words.split()]
    monkeypatch.setattr(sys, "argv", [module, *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    printed, said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.startswith(f"{error}: ")
    assert str(tmp_path / "nowhere") in said or error == "ConfigError"
    assert f"{found}; expected: " in said
    assert printed == ""
