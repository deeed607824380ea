"""The cold-start term (E20) against a reference in plain Python, and what it may not do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.runs.extend import load_strictly
from missrec_t4r.runs.run_folder import load_tensors, save_tensors
from tests import shop
from tests.equations.reference import FIRST_ITEM, Array

TRAINING = [shop.rows([*session, target]) for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)]
PLATE = shop.row("plate")
SETTINGS = ColdStartSettings(neighbours=0.7, content=0.4, threshold=0.5, bias=0.25)


def net(modalities: tuple[float, float] = (1.0, 1.0), settings: ColdStartSettings = SETTINGS) -> MISSRec:
    model = shop.model(shop.default(n_neighbours=6, n_similar_items=0, cold_start_exposure=1.0)).double().eval()
    terms_of(model).item_knn.fit(Sessions.from_lists(TRAINING), 50)
    terms_of(model).item_knn.choose(ItemKNNSettings(0.5, 0.8, 0.3))
    terms_of(model).cold_start.modalities.copy_(torch.tensor(modalities))
    terms_of(model).cold_start.choose(settings)
    model.terms.refresh()
    return model


def added(model: MISSRec, sessions: torch.Tensor) -> Array:
    return model.terms(torch.zeros(len(sessions), model.item_encoder.n_rows).double(), sessions).detach().numpy()


def reference(model: MISSRec, session: list[int], term: Array, modalities: tuple[float, float]) -> float:
    content = shop.catalogue().modalities
    trained = sorted({row for line in TRAINING for row in line})
    names = [name for name, chosen in zip(content, modalities, strict=True) if chosen]
    unit, tokens = {}, {}
    for name in names:
        vectors, here = content[name].vectors.astype(np.float64), content[name].present
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        around = vectors - vectors[[row for row in trained if here[row]]].mean(0)
        weight, bias = (parameter.detach().numpy() for parameter in model.item_encoder.adapters[name].parameters())
        tokens[name] = vectors @ weight.T + bias
        tokens[name] /= np.linalg.norm(tokens[name], axis=1, keepdims=True)
        unit[name] = (around / np.linalg.norm(around, axis=1, keepdims=True)) * here[:, None]

    def alike(row: int) -> float | None:
        shared = [name for name in names if content[name].present[[row, PLATE]].all()]
        cosines = [of[name][row] @ of[name][PLATE] for of in (unit, tokens) for name in shared]
        return float(np.mean(cosines)) if shared else None

    near = {row: alike(row) for row in trained}
    weights = {row: np.exp(10 * value) for row, value in near.items() if value is not None}
    imputed = sum(weight * term[row] for row, weight in weights.items()) / sum(weights.values())
    cosines = []
    for name in names:
        mean = sum(0.7**age * unit[name][row] for age, row in enumerate(reversed(session)))
        if np.any(mean):
            cosines.append(mean @ unit[name][PLATE] / np.linalg.norm(mean))
    cosine = float(np.mean(cosines)) if cosines else 0.0
    tenth = np.sort(term)[::-1][9]
    return float(SETTINGS.neighbours * imputed + SETTINGS.content * cosine + SETTINGS.threshold * tenth + SETTINGS.bias)


@pytest.mark.parametrize("modalities", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_cold_items(modalities: tuple[float, float]) -> None:
    sessions, model = shop.batch(padding=1), net(modalities)
    found = added(model, sessions)[:, PLATE]
    term = terms_of(model).item_knn(sessions).detach().numpy()
    expected = [
        reference(model, shop.rows(session), line, modalities)
        for session, line in zip(shop.SESSIONS, term, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(set(np.round(found, 6))) > 3


def test_trained_items_keep_their_scores_to_the_bit() -> None:
    sessions = shop.batch()
    with_rule, without = added(net(), sessions), added(net(settings=ColdStartSettings(0, 0, 0, 0)), sessions)
    others = np.arange(FIRST_ITEM, len(with_rule[0])) != PLATE
    assert np.array_equal(with_rule[:, FIRST_ITEM:][:, others], without[:, FIRST_ITEM:][:, others])
    assert (with_rule[:, PLATE] != without[:, PLATE]).all()
    assert not without[:, PLATE].any()


def test_content_that_no_trained_item_has_says_nothing_about_cold_items() -> None:
    model, sessions = net(), shop.batch()
    image = model.item_encoder.names.index("image")
    by_text = added(net((1.0, 0.0) if image else (0.0, 1.0)), sessions)
    model.item_encoder.presence[image] = False
    model.item_encoder.presence[image, PLATE] = True
    model.terms.refresh()
    np.testing.assert_allclose(added(model, sessions), by_text, rtol=0, atol=1e-6)


def test_a_catalogue_without_newcomers_is_left_alone() -> None:
    model = net()
    terms_of(model).item_knn.fit(Sessions.from_lists([*TRAINING, shop.rows(["plate", "mug"])]), 50)
    model.terms.refresh()
    assert not terms_of(model).cold_start.active


def test_lists_are_found_again_after_loading_and_earlier_weights_load(tmp_path: Path) -> None:
    model, sessions = net(), shop.batch()
    save_tensors(tmp_path / "weights", model.state_dict())
    weights = load_tensors(tmp_path / "weights")
    again = shop.model(shop.default(n_neighbours=6, n_similar_items=0, cold_start_exposure=1.0)).double().eval()
    load_strictly(again, weights, "here")
    assert np.array_equal(added(again, sessions), added(model, sessions))
    earlier = {name: tensor for name, tensor in weights.items() if "cold_start" not in name}
    fresh = shop.model(shop.default(n_neighbours=6, n_similar_items=0, cold_start_exposure=1.0)).double().eval()
    load_strictly(fresh, earlier, "an earlier version's")
    assert not added(fresh, sessions)[:, PLATE].any()
