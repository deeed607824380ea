"""A data folder small enough to read: twelve items, two modalities, one item without image, forty sessions."""

import json
from pathlib import Path

import pytest

from tests import shop

N_ITEMS = 12


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    modalities = shop.random_modalities(N_ITEMS, {"text": 8, "image": 5}, seed=0, without={"image": [5]})
    titles = {"title": [f"thing {i}" for i in range(N_ITEMS)]}
    shop.write_circle(folder, [f"P{i}" for i in range(N_ITEMS)], modalities, columns=titles)
    (folder / "etl.json").write_text(json.dumps({"format": 1}))
    return folder
