"""The rare-item term is served as it ranks offline, and items that a catalogue update adds are cold items."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from missrec_t4r.bundle.bundle import LoadedBundle, load_bundle, write_bundle
from missrec_t4r.bundle.update_catalogue import update_catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.export.parity import compare_offline
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.retrieval.int8_bounds import AVAILABLE
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import load_run

SETTINGS = torch.tensor([[2.0, 0.4, 0.2], [0.3, 0.1, -0.1]])  # content weights and offsets; cold, 1 or 2, 3 or 4


@pytest.fixture
def grown(make_run: Callable[..., Path], tmp_path: Path) -> LoadedBundle:
    loaded = load_run(make_run(n_neighbours=8, rare_item_cost=0.01))
    model, rng = loaded.model, np.random.default_rng(2)
    n_rows = loaded.catalogue.n_rows
    events = np.repeat(np.arange(3, n_rows - 1), np.arange(n_rows - 4) % 8 + 1)  # the last row has none
    terms_of(model).item_knn.fit(Sessions.from_lists(rng.permutation(events).reshape(1, -1).tolist()), 5)
    terms_of(model).item_knn.choose(ItemKNNSettings(0.1, 0.8, 0.3))
    terms_of(model).rare_items.fit()
    terms_of(model).rare_items.choose(SETTINGS, [1.0] * len(model.item_encoder.names))
    write_bundle(tmp_path / "bundle", model=model, catalogue=loaded.catalogue, data=loaded.data)
    text = np.stack([loaded.catalogue.modalities["text"].vectors[5], rng.normal(size=12)]).astype(np.float32)
    items = pa.table({"item_id": ["twin-of-row-5", "other"]})
    assert update_catalogue(tmp_path / "bundle", items, modalities={"text": text})["largest_difference"] == 0.0
    return load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("certified_from", [0, 10**9], ids=["int8 bounds", "scan"])
def test_the_ranker_agrees_with_the_model(grown: LoadedBundle, certified_from: int) -> None:
    if certified_from == 0 and not AVAILABLE:
        pytest.skip("this torch has no 8-bit product")
    n, rng = grown.catalogue.n_rows, np.random.default_rng(1)
    histories = Sessions.from_lists([rng.integers(3, n, length) for length in rng.integers(1, 12, 60)])
    ranker = Ranker(grown.model, grown.catalogue, certified_from=certified_from)
    assert (ranker.search.quantised is not None) == (certified_from == 0)
    assert compare_offline(ranker, grown.model, histories).equal
    term = terms_of(grown.model).rare_items
    assert {int(group) for group in term.groups} == {0, 1, 2}
    frequency = terms_of(grown.model).item_knn.frequency
    assert term.rows.tolist() == [row for row in range(3, n) if frequency[row] < 5 and row in term.rare().tolist()]


def test_an_added_item_gains_by_what_it_resembles(grown: LoadedBundle) -> None:
    """The twin has the text of the session's only item and nothing else: its cosine is 1."""
    twin, session = grown.catalogue.n_rows - 2, np.array([[5]])
    with torch.inference_mode():
        gained = Ranker(grown.model, grown.catalogue).query(session, {}).added
        terms_of(grown.model).rare_items.switch_off()
        gained = gained - Ranker(grown.model, grown.catalogue).query(session, {}).added
    assert float(gained[0, twin]) == pytest.approx(float(SETTINGS[:, 0].sum()), abs=1e-5)
    assert float(gained[0, twin + 1]) < 0.9 * float(gained[0, twin])
    assert float(gained[0, 5]) == 0.0
