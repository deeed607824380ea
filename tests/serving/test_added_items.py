"""Items added by a catalogue update are cold items: their cold-start scores in the bundle are those of the model."""

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
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import load_run
from tests.serving import shop


@pytest.fixture
def grown(make_run: Callable[..., Path], tmp_path: Path) -> LoadedBundle:
    loaded = load_run(make_run(n_neighbours=8, cold_start_exposure=1.0))
    model, rng = loaded.model, np.random.default_rng(2)
    sessions = Sessions.from_lists([rng.integers(3, loaded.catalogue.n_rows - 2, 6) for _ in range(200)])
    terms_of(model).item_knn.fit(sessions, 5)  # the last two rows have no event
    terms_of(model).item_knn.choose(ItemKNNSettings(0.1, 0.8, 0.3))
    terms_of(model).cold_start.choose(ColdStartSettings(1.0, 0.5, 0.5, 0.2))
    model.terms.refresh()
    write_bundle(tmp_path / "bundle", model=model, catalogue=loaded.catalogue, data=loaded.data)
    text = np.stack([loaded.catalogue.modalities["text"].vectors[5], rng.normal(size=12)]).astype(np.float32)
    items = pa.table({"item_id": ["twin-of-row-5", "other"]})
    update_catalogue(tmp_path / "bundle", items, modalities={"text": text})
    return load_bundle(tmp_path / "bundle")


def test_added_items_get_imputed_scores_and_the_ranker_agrees_with_the_model(grown: LoadedBundle) -> None:
    n = grown.catalogue.n_rows
    assert terms_of(grown.model).cold_start.rows.tolist() == [n - 4, n - 3, n - 2, n - 1]
    rng = np.random.default_rng(1)
    histories = Sessions.from_lists([rng.integers(3, n, length) for length in rng.integers(1, 12, 60)])
    ranker = Ranker(grown.model, grown.catalogue)
    assert compare_offline(ranker, grown.model, histories).equal
    assert compare_offline(Ranker(grown.model, grown.catalogue, together=True), grown.model, histories).equal
    answers = ranker.rank(shop.padded([line[-8:] for line in histories]), top_k=10).rows
    assert set(range(n - 4, n)) & set(answers.flatten().tolist())


def test_a_cold_item_is_recommended_after_what_goes_with_its_most_similar_item(grown: LoadedBundle) -> None:
    twin = grown.catalogue.n_rows - 2
    cold_start = terms_of(grown.model).cold_start
    assert int(cold_start.alike[2, 0]) == 5  # its nearest
    with torch.inference_mode():
        history = torch.tensor([[int(terms_of(grown.model).item_knn.neighbours[5, 0])], [3]])
        without = Ranker(grown.model, grown.catalogue).query(history.numpy(), {}).added[:, twin].clone()
        cold_start.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
        assert not torch.equal(without, Ranker(grown.model, grown.catalogue).query(history.numpy(), {}).added[:, twin])
