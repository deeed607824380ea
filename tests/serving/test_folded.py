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
        {"n_decoder_layers": 1},
        {"n_decoder_layers": 1, "n_encoder_layers": 2, "attention": "bidirectional"},
        {"n_decoder_layers": 3, "n_encoder_layers": 2, "n_head": 4, "interest_ratio": 1.0},
        {"n_decoder_layers": 2, "attention": "bidirectional", "item_ids": False, "missing_modality": "zero_row"},
        {"interest_ratio": 0.0},
        {"interest_ratio": 0.0, "n_decoder_layers": 2},
        {"interest_ratio": 0.0, "n_decoder_layers": 3, "attention": "bidirectional", "n_head": 4},
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


@pytest.mark.parametrize("seed", range(8))
def test_it_equals_the_model_whatever_its_sizes_and_the_sessions_lengths(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few interests and many, one pass and several, empty sessions and full ones."""
    rng = np.random.default_rng(seed)
    settings = {
        "n_decoder_layers": int(rng.integers(1, 4)),
        "n_encoder_layers": int(rng.integers(1, 3)),
        "n_head": int(rng.choice([1, 2, 4])),
        "attention": str(rng.choice(["causal", "bidirectional"])),
        "interest_ratio": float(rng.choice([0.0, 0.2, 1.0])),
        "max_sequence_length": 40,
    }
    model = shop.model_for(shop.catalogue(), **settings)
    encoder = fuse_encoder(model, model.item_encoder.catalogue())
    assert encoder is not None, settings
    monkeypatch.setattr(module, "_POSITIONS_AT_ONCE", int(rng.choice([50, 1000])))
    rows = rng.integers(3, shop.N_ITEMS + 3, (12, 40))
    lengths = rng.integers(0, 41, 12)
    rows[np.arange(40) >= lengths[:, None]] = 0
    expected = model(torch.from_numpy(rows)).detach() * torch.from_numpy(lengths > 0).unsqueeze(1)
    torch.testing.assert_close(encoder(rows), expected, atol=2e-6, rtol=0, msg=lambda text: f"{settings}: {text}")


@pytest.mark.parametrize("settings", [{}, {"attention": "bidirectional", "n_encoder_layers": 2}])
def test_many_interests_give_the_same_vectors(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores between all pairs are kept for few interests; for many, their projections."""
    model = shop.model_for(shop.catalogue(), **settings)
    encoder = fuse_encoder(model, model.item_encoder.catalogue())
    assert encoder is not None
    sessions = [[[5, 9, 7]], [[5, 6, 9, 7], [9, 5, 0, 0], [0, 0, 0, 0]]]
    few = [encoder(np.array(rows)) for rows in sessions]
    monkeypatch.setattr(module, "_FEW_INTERESTS", 0)
    monkeypatch.setattr(module, "_NUMBERS_IN_MEMORY", 0)
    without_scores = fuse_encoder(model, model.item_encoder.catalogue())
    assert without_scores is not None
    for rows, expected in zip(sessions, few, strict=True):
        for many in (encoder, without_scores):
            torch.testing.assert_close(many(np.array(rows)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steep", [1, 30, 1000])
def test_steep_attention_between_interests_gives_the_same_vectors(steep: float) -> None:
    """Weights are looked up before they are divided by their sum, unless that sum could be too small for 32 bits."""
    model = shop.model_for(shop.catalogue(), n_encoder_layers=1)
    with torch.no_grad():
        model.encoder.layers[0].self_attention.query.weight.mul_(steep)
    encoder = FusedEncoder(model, model.item_encoder.catalogue())
    assert (encoder._few is None) == (steep == 1000)
    for rows in ([[5, 6, 9, 7]], [[5, 6, 7], [9, 5, 0]], [[8, 0, 0], [7, 10, 4]]):
        expected = model(torch.tensor(rows)).detach()
        torch.testing.assert_close(encoder(np.array(rows)), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_sessions_that_do_not_fit_into_one_pass_keep_their_order(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are encoded by length, in passes of so many positions; one session may be longer than that."""
    model = shop.model_for(shop.catalogue(), n_decoder_layers=2, attention=attention)
    encoder = fuse_encoder(model, model.item_encoder.catalogue())
    assert encoder is not None
    lengths = np.array([2, 8, 0, 1, 5, 8, 0, 3, 4])
    rows = np.random.default_rng(1).integers(3, shop.N_ITEMS + 3, (len(lengths), shop.MAX_LENGTH))
    rows[np.arange(shop.MAX_LENGTH) >= lengths[:, None]] = 0
    together = encoder(rows)
    for positions in (1, 11, 20):
        monkeypatch.setattr(module, "_POSITIONS_AT_ONCE", positions)
        torch.testing.assert_close(encoder(rows), together, atol=2e-6, rtol=0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("n_decoder_layers", [1, 2])
def test_items_without_any_interest_are_answered_by_what_is_left_of_them(n_decoder_layers: int, attention: str) -> None:
    """The first item of a session may have none where the second has one."""
    settings = {"interest_ratio": 0.5, "n_decoder_layers": n_decoder_layers, "attention": attention}
    model = shop.model_for(shop.catalogue(), **settings)
    model.interests.assignment[:, 5:8] = 0
    encoder = fuse_encoder(model, model.item_encoder.catalogue())
    assert encoder is not None
    for rows in ([[5]], [[5, 6, 9, 7]], [[5, 6, 7], [9, 5, 0]], [[5, 6, 0], [7, 0, 0]]):
        expected = model(torch.tensor(rows)).detach()
        torch.testing.assert_close(encoder(np.array(rows)), expected, atol=2e-6, rtol=0)


def test_models_that_it_does_not_know_are_left_to_the_trace() -> None:
    model = shop.model_for(shop.catalogue(), sequence_fusion="contextual", attention="bidirectional")
    assert fuse_encoder(model, model.item_encoder.catalogue()) is None


def test_an_encoder_that_would_answer_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shop.model_for(shop.catalogue())
    real = FusedEncoder.__call__
    monkeypatch.setattr(module.FusedEncoder, "__call__", lambda self, rows: real(self, rows) * 1.001)
    assert fuse_encoder(model, model.item_encoder.catalogue()) is None
