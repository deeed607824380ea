"""Every recipe that ships builds its model and takes a step."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from missrec_t4r.config import Recipe, shipped_recipes
from missrec_t4r.data.batching import iterate, training_batches
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.training.step import training_loss

FILES = sorted((Path(__file__).parents[2] / "missrec_t4r" / "recipes").glob("*.yaml"))


def test_the_recipes_are_the_files() -> None:
    assert [file.stem for file in FILES] == shipped_recipes()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_builds_and_takes_a_step(file: Path) -> None:
    recipe, rng = Recipe.load(file), np.random.default_rng(0)
    present = np.arange(33) >= 3
    vectors = rng.normal(size=(33, 6)).astype(np.float32) * present[:, None]
    items = pa.table({"item_id": np.arange(30), "train_count": np.full(30, 2)})
    torch.manual_seed(0)
    model = build_missrec(recipe.model, Catalogue(items, {"text": Modality(vectors, present)}))
    model.discover_interests(seed=0)
    sessions = Sessions.from_lists([rng.integers(3, 33, 8) for _ in range(20)])
    batch = next(
        iterate(sessions, training_batches(sessions, recipe.model, recipe.train, rng), recipe.model, recipe.train)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(3):
        loss = training_loss(model, batch, recipe.train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
