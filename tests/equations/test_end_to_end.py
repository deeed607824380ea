"""The whole model against the reference: session vectors, scores of the whole catalogue, and the loss."""

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.model.losses import next_item_loss, orthogonality_loss
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from tests import shop
from tests.equations import reference as ref
from tests.equations import translate

EXACT = 1e-10
ROUNDED = 1e-6
"""Vectors that are scaled to unit length are kept in single precision, and so is what follows from them."""

CONFIGS = {
    "paper": (shop.paper(), EXACT),
    "paper, inductive": (shop.paper(item_ids=False), EXACT),
    "paper, contextual": (shop.paper(sequence_fusion="contextual"), EXACT),
    "paper, static": (shop.paper(candidate_fusion="static"), EXACT),
    "paper, phi per item": (shop.paper(candidate_fusion="dynamic_instance"), EXACT),
    "paper, two layers each": (shop.paper(n_encoder_layers=2, n_decoder_layers=2), EXACT),
    "paper, density peaks": (shop.paper(interest_algorithm="dpc_knn"), EXACT),
    "paper with our masks": (shop.ours_masked(mask_untrained_ids=True), EXACT),
    "contextual with our masks": (shop.ours_masked(sequence_fusion="contextual"), EXACT),
    "default": (shop.default(), ROUNDED),
    "default, unscaled": (shop.default(feature_scaling="none"), EXACT),
    "default, own candidate IDs": (shop.default(candidate_ids="own"), ROUNDED),
    "default, inductive": (shop.default(item_ids=False), ROUNDED),
    "default, without interests": (shop.default(interest_ratio=0.0), ROUNDED),
    "contextual, without interests": (shop.ours_masked(sequence_fusion="contextual", interest_ratio=0.0), EXACT),
    "default, two layers each": (shop.default(n_encoder_layers=2, n_decoder_layers=2), ROUNDED),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def setting(request: pytest.FixtureRequest) -> tuple[MISSRecConfig, float]:
    return request.param


def test_session_vectors(setting: tuple[MISSRecConfig, float]) -> None:
    config, tolerance = setting
    model = shop.model(config)
    expected = translate.whole(model, shop.catalogue())
    sessions = [*shop.SESSIONS, ["mug", "plate"], ["plate", "lamp"]]  # at inference a cold item may be in the history
    expected_vectors = np.stack([expected.session_vector(shop.rows(session)) for session in sessions])
    with torch.no_grad():
        vectors = model(shop.batch(sessions, padding=2)).numpy()
    np.testing.assert_allclose(vectors, expected_vectors, rtol=0, atol=tolerance)
    assert np.ptp(vectors, 0).max() > 0.1, "all sessions look alike: the comparison would prove nothing"


@pytest.mark.parametrize(
    ("config", "tolerance"), [setting for setting in CONFIGS.values() if setting[0].sequence_fusion == "add"]
)
def test_every_position(config: MISSRecConfig, tolerance: float) -> None:
    model = shop.model(config)
    expected = translate.whole(model, shop.catalogue())
    with torch.no_grad():
        vectors = model.encode(shop.batch()).vectors.numpy()
    for found, session in zip(vectors, shop.SESSIONS, strict=True):
        positions = ref.unit(expected.positions(shop.rows(session)))
        np.testing.assert_allclose(found[: len(session)], positions, rtol=0, atol=tolerance)


def test_scores_of_the_whole_catalogue(setting: tuple[MISSRecConfig, float]) -> None:
    config, tolerance = setting
    model = shop.model(config)
    with torch.no_grad():
        scores = model.score(model(shop.batch()), model.candidates(), shop.batch()).numpy()
    np.testing.assert_allclose(scores, _expected_scores(model), rtol=0, atol=tolerance)
    assert np.isneginf(scores[:, : ref.FIRST_ITEM]).all()
    assert np.isfinite(scores[:, ref.FIRST_ITEM :]).all()


def test_loss(setting: tuple[MISSRecConfig, float]) -> None:
    config, tolerance = setting
    model = shop.model(config)
    items = model.item_encoder.catalogue().take(shop.batch())
    encoded = model.encode(shop.batch(), items=items, last_only=True)
    logits = model.score(encoded.vectors, model.candidates(), shop.batch()) / config.temperature
    expected = ref.cross_entropy(_expected_scores(model), shop.rows(shop.TARGETS), config.temperature)
    assert next_item_loss(logits, shop.targets()).item() == pytest.approx(expected, abs=tolerance / config.temperature)
    regulariser = orthogonality_loss(encoded.memory, encoded.interests.mask, config.orthogonality)
    assert regulariser.item() == pytest.approx(_expected_regulariser(model), rel=tolerance)


def _expected_scores(model: MISSRec) -> ref.Array:
    expected, phi = translate.whole(model, shop.catalogue()), translate.phi(model)
    candidates, scores = translate.candidates(model, shop.catalogue()), []
    for session in shop.SESSIONS:
        score = ref.fused_scores(expected.session_vector(shop.rows(session)), candidates, phi)
        bias = 0.0 if terms_of(model).history_bias is None else float(terms_of(model).history_bias.bias.detach())
        scores.append(ref.with_history_bias(score, shop.rows(session), bias))
    return np.stack(scores)


def _expected_regulariser(model: MISSRec) -> float:
    expected = translate.whole(model, shop.catalogue())
    memories = [expected.memory(shop.rows(session))[0] for session in shop.SESSIONS]
    if model.config.orthogonality == "cosine":
        return ref.orthogonality_cosine(memories)
    lengths = list(map(len, shop.SESSIONS))
    places = ref.released_places(list(map(len, memories)), lengths, model.config.max_sequence_length)
    return ref.orthogonality_faithful([expected.padded_memory(shop.rows(s), places) for s in shop.SESSIONS])
