"""The ten lines after a plain ``pip install``: without Merlin, with the rows that NVTabular gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.etl.pipeline import etl
from tests.project.bare import BARE, base_dependencies
from tests.project.packages import ROOT
from tests.recommender.ten_lines import COLUMNS

pytest.importorskip("nvtabular", reason="compares with NVTabular; without it all of this folder is a plain install")

N_USERS, N_ITEMS = 30, 24


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events with an event type and a price, items with titles, and pictures of most items."""
    folder, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(3)
    rows = []
    for user in range(N_USERS):
        start = int(rng.integers(N_ITEMS))
        for step in range(int(rng.integers(4, 9))):
            item = f"P{(start + step) % N_ITEMS:02}"
            kind = str(rng.choice(["view", "buy"]))
            rows.append((f"u{user}", item, 1_700_000_000 + 60 * step, kind, round(float(rng.random()), 3)))
    events = pd.DataFrame(rows, columns=[*COLUMNS.values(), "event_type", "price"]).sample(frac=1, random_state=0)
    events.to_parquet(folder / "events.parquet", index=False)
    items = pd.DataFrame(
        {
            "artikel": [f"P{item:02}" for item in range(N_ITEMS)],
            "title": [f"{['lamp', 'desk', 'rug'][item % 3]} number {item}" for item in range(N_ITEMS)],
            "picture": [f"{item}.png" if item % 5 else None for item in range(N_ITEMS)],
            "in_stock": [item % 4 != 0 for item in range(N_ITEMS)],
        }
    )
    items.to_parquet(folder / "items.parquet", index=False)
    for item in range(N_ITEMS):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{item}.png")
    return folder


@pytest.fixture(scope="module")
def plain(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of shops and models, and what an interpreter without Merlin saw."""
    out = tmp_path_factory.mktemp("plain")
    code = BARE + "from pathlib import Path\nfrom tests.recommender import ten_lines\n"
    code += "ten_lines.main(Path(sys.argv[2]), Path(sys.argv[3]))\nassert 'nvtabular' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, base_dependencies(), str(raw), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return out, json.loads(done.stdout)


def test_every_line_works(plain: tuple[Path, dict[str, Any]], raw: Path) -> None:
    _, seen = plain
    assert seen["modalities"] == ["image", "text"]
    assert seen["metrics"][0] > 3
    stocked = pd.read_parquet(raw / "items.parquet").query("in_stock")["artikel"].tolist()
    found = seen["of_users"]
    assert list(found) == ["user", "item", "title", "score", "rank", "reason"]
    assert found["user"] == ["u1"] * 5 + ["u2"] * 5
    assert set(found["item"]) <= set(stocked)
    assert len(seen["similar"]) == 3
    first, again = seen["of_sessions"]
    assert first == again
    assert "N1" in seen["all"]
    assert len(seen["of_ids"]) == 3


def test_the_server_is_refused_with_the_extra_that_brings_it(plain: tuple[Path, dict[str, Any]]) -> None:
    assert "missrec-t4r[triton]" in plain[1]["served"]


def test_the_data_folder_is_that_of_nvtabular(plain: tuple[Path, dict[str, Any]], raw: Path, tmp_path: Path) -> None:
    """Its rows in the order of users; everything else of the folder but the workflows, byte by byte."""
    shop = plain[0] / "shop"
    options = {f"{name}_column": column for name, column in COLUMNS.items()}
    etl(shop / "events.parquet", shop / "items.parquet", tmp_path / "data", engine="memory", **options)
    for split in ("train", "valid", "test"):
        expected, found = (_rows(folder / split) for folder in (tmp_path / "data", shop / "data"))
        assert found.equals(expected)
        assert (shop / "data" / split / "schema.pbtxt").is_file()
    for name in ("schema.pbtxt", "session_transform.json"):
        assert (shop / "data" / name).read_text() == (tmp_path / "data" / name).read_text()
    expected_items, found_items = (
        Catalogue.load(folder / "catalogue").items for folder in (tmp_path / "data", shop / "data")
    )
    assert found_items.equals(expected_items)
    assert not (shop / "data" / "workflow").exists()


def _rows(split: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(split.glob("*.parquet"))]).sort_by("user_id")


def test_such_a_folder_can_be_updated_with_nvtabular(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import shutil

    data = Path(shutil.copytree(plain[0] / "shop" / "data", tmp_path / "data"))
    events = pd.read_parquet(plain[0] / "shop" / "events.parquet").assign(zeit=lambda frame: frame["zeit"] + 10_000)
    events.head(20).assign(artikel="N7").to_parquet(tmp_path / "new.parquet", index=False)
    told = etl(tmp_path / "new.parquet", None, data, update=True, delta=True)
    assert told["updated"]
    assert told["items"] == N_ITEMS + 1
    assert f"max: {N_ITEMS + 3}" in (data / "schema.pbtxt").read_text()
