"""The traced encoder returns the session vectors of the model for every configuration, or is not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.retrieval.traced_encoder import SessionEncoder, trace_encoder
from tests.serving import shop


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_encoder_layers": 2, "n_decoder_layers": 2, "candidate_fusion": "dynamic_instance"},
        {"sequence_fusion": "contextual", "attention": "bidirectional"},
        {"missing_modality": "zero_row", "item_ids": False, "attention": "bidirectional"},
    ],
)
def test_a_recording_equals_the_model_on_every_shape(settings: dict[str, object]) -> None:
    model = shop.model_for(shop.catalogue(), **settings)
    encoder = SessionEncoder(model, model.item_encoder.catalogue())
    replay = trace_encoder(encoder)
    assert replay is not encoder
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        for batch in (1, 2, 9):
            for length in range(1, shop.MAX_LENGTH + 1):
                rows = torch.from_numpy(rng.integers(3, shop.N_ITEMS + 3, (batch, length)))
                for line in range(batch):
                    rows[line, int(rng.integers(0, length + 1)) :] = 0
                vectors = model(rows) * (rows > 0).any(1, keepdim=True)
                torch.testing.assert_close(replay(rows), vectors, atol=2e-6, rtol=0)


def test_a_recording_that_would_answer_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shop.model_for(shop.catalogue())
    encoder = SessionEncoder(model, None)
    real = encoder.forward

    def fixed(session: torch.Tensor) -> torch.Tensor:
        return real(session) * (2.0 if session.shape[0] == 2 else 1.0)  # a recording keeps one of the two for ever

    monkeypatch.setattr(encoder, "forward", fixed)
    assert trace_encoder(encoder) is encoder


def test_side_features_go_past_the_recording() -> None:
    own = shop.catalogue()
    ranker = Ranker(shop.model_for(own), own)
    rows = np.array([[5, 9, 4]])
    with torch.inference_mode():
        torch.testing.assert_close(
            ranker.encode(rows, {"unused": np.zeros((1, 3))}), ranker.encode(rows), atol=1e-6, rtol=0
        )
