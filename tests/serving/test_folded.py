"""The fused encoder returns the session vectors of the model, or declines the configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from missrec_t4r.retrieval import fused_encoder as module
from missrec_t4r.retrieval.fused_encoder import FusedEncoder, fuse_encoder
from tests.serving import shop


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_encoder_layers": 3, "candidate_fusion": "dynamic_instance"},
        {"attention": "bidirectional", "n_encoder_layers": 2},
        {"missing_modality": "zero_row", "item_ids": False, "attention": "bidirectional"},
        {"interest_ratio": 1.0, "n_head": 1},
    ],
)
def test_it_equals_the_model_on_every_shape(settings: dict[str, object]) -> None:
    model = shop.model_for(shop.catalogue(), **settings)
    encoder = fuse_encoder(model, model.item_encoder.catalogue())
    assert encoder is not None
    rng = np.random.default_rng(0)
    assert encoder(np.zeros((0, 3), np.int64)).shape == (0, model.config.d_model)
    for batch in (1, 2, 9):
        for length in range(1, shop.MAX_LENGTH + 1):
            rows = rng.integers(3, shop.N_ITEMS + 3, (batch, length))
            for line in range(batch):
                rows[line, int(rng.integers(0, length + 1)) :] = 0
            session = torch.from_numpy(rows)
            expected = model(session) * (session > 0).any(1, keepdim=True)
            torch.testing.assert_close(encoder(rows), expected.detach(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"attention": "bidirectional", "n_encoder_layers": 2}])
def test_many_interests_give_the_same_vectors(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores between all pairs are kept for few interests; for many, their projections."""
    model = shop.model_for(shop.catalogue(), **settings)
    few = fuse_encoder(model, model.item_encoder.catalogue())
    monkeypatch.setattr(module, "_SCORES_IN_MEMORY", 0)
    many = fuse_encoder(model, model.item_encoder.catalogue())
    assert few is not None
    assert many is not None
    assert (few._first is None, many._first is None) == (False, True)
    for rows in ([[5, 9, 7]], [[5, 6, 9, 7], [9, 5, 0, 0], [0, 0, 0, 0]]):
        expected = model(torch.tensor(rows)).detach() * (torch.tensor(rows) > 0).any(1, keepdim=True)
        for encoder in (few, many):
            torch.testing.assert_close(encoder(np.array(rows)), expected, atol=2e-6, rtol=0)


def test_items_without_any_interest_are_answered_by_what_is_left_of_them() -> None:
    model = shop.model_for(shop.catalogue(), interest_ratio=0.5)
    model.interests.assignment[:, 5:8] = 0
    encoder = fuse_encoder(model, model.item_encoder.catalogue())
    assert encoder is not None
    for rows in ([[5]], [[5, 6, 7], [9, 5, 0]], [[5, 6, 0], [7, 0, 0]]):
        expected = model(torch.tensor(rows)).detach()
        torch.testing.assert_close(encoder(np.array(rows)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"sequence_fusion": "contextual", "attention": "bidirectional"}, {"n_decoder_layers": 2}]
)
def test_models_that_it_does_not_know_are_left_to_the_recording(settings: dict[str, object]) -> None:
    model = shop.model_for(shop.catalogue(), **settings)
    assert fuse_encoder(model, model.item_encoder.catalogue()) is None


def test_an_encoder_that_would_answer_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shop.model_for(shop.catalogue())
    real = FusedEncoder.__call__
    monkeypatch.setattr(module.FusedEncoder, "__call__", lambda self, rows: real(self, rows) * 1.001)
    assert fuse_encoder(model, model.item_encoder.catalogue()) is None
