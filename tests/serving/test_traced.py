"""Traced and graphed encoders return the session vectors of the model for every configuration, or are not used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from missrec_t4r.retrieval.graphed_encoder import GraphedEncoder, _Graph
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.retrieval.traced_encoder import SessionEncoder, trace_encoder
from tests.device.second_device import second_device
from tests.serving import shop

SETTINGS: list[dict[str, object]] = [
    {},
    {"n_encoder_layers": 2, "n_decoder_layers": 2, "candidate_fusion": "dynamic_instance"},
    {"sequence_fusion": "contextual", "attention": "bidirectional"},
    {"missing_modality": "zero_row", "item_ids": False, "attention": "bidirectional"},
    {"interest_ratio": 0.0},
    {"interest_ratio": 0.0, "sequence_fusion": "contextual", "attention": "bidirectional"},
]


def sessions(batches: Iterable[int]) -> Iterator[torch.Tensor]:
    """Yield random sessions of every length in batches of these sizes, with padding at the right."""
    rng = np.random.default_rng(0)
    for batch in batches:
        for length in range(1, shop.MAX_LENGTH + 1):
            rows = torch.from_numpy(rng.integers(3, shop.N_ITEMS + 3, (batch, length)))
            for line in range(batch):
                rows[line, int(rng.integers(0, length + 1)) :] = 0
            yield rows


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_recording_equals_the_model_on_every_shape(settings: dict[str, object]) -> None:
    model = shop.model_for(shop.catalogue(), **settings)
    encoder = SessionEncoder(model, model.item_encoder.catalogue())
    replay = trace_encoder(encoder)
    assert replay is not encoder
    with torch.inference_mode():
        for rows in sessions((1, 2, 9)):
            vectors = model(rows) * (rows > 0).any(1, keepdim=True)
            torch.testing.assert_close(replay(rows), vectors, atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("with_tokens", [True, False])
def test_sessions_padded_to_a_few_shapes_keep_their_vectors(settings: dict[str, object], with_tokens: bool) -> None:
    model = shop.model_for(shop.catalogue(), **settings)
    encoder = SessionEncoder(model, model.item_encoder.catalogue() if with_tokens else None, all_slots=True)
    shapes: set[tuple[int, ...]] = set()

    def encode(session: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(session.shape))
        vectors: torch.Tensor = encoder(session)
        return vectors

    padded = GraphedEncoder(encode, torch.device("cpu"), shop.MAX_LENGTH, 6)
    padded.lengths = [2, 4, shop.MAX_LENGTH]
    with torch.inference_mode():
        for rows in sessions(range(1, 8)):
            vectors = model(rows) * (rows > 0).any(1, keepdim=True)
            torch.testing.assert_close(padded(rows), vectors, atol=2e-6, rtol=0)
    within = {shape for shape in shapes if shape[0] <= 6}
    assert within == {(batch, length) for batch in (1, 2, 4, 6) for length in (2, 4, shop.MAX_LENGTH)}
    assert {shape[0] for shape in shapes - within} == {7}  # larger than any batch of the ranker: as it is


def test_a_graph_reads_and_writes_its_own_memory() -> None:
    model = shop.model_for(shop.catalogue())
    encoder = SessionEncoder(model, None, all_slots=True)
    padded = GraphedEncoder(encoder, torch.device("cpu"), shop.MAX_LENGTH, 2)
    read, written = torch.zeros(2, shop.MAX_LENGTH, dtype=torch.int64), torch.zeros(2, model.config.d_model)
    padded.graphs[2, shop.MAX_LENGTH] = _Graph(lambda: written.copy_(encoder(read)), read, written)
    first, second = torch.tensor([[5, 9, 4], [3, 0, 0]]), torch.tensor([[7, 8], [0, 0]])
    with torch.inference_mode():
        found = [padded(first), padded(second)]
        for rows, vectors in zip((first, second), found, strict=True):
            torch.testing.assert_close(vectors, encoder(rows), atol=2e-6, rtol=0)
    assert read.tolist()[0] == [7, 8, *[0] * (shop.MAX_LENGTH - 2)]


def test_threads_do_not_get_each_others_vectors() -> None:
    """Between a graph's reading and its writing another thread runs."""
    model = shop.model_for(shop.catalogue())
    encoder = SessionEncoder(model, None, all_slots=True)
    padded = GraphedEncoder(encoder, torch.device("cpu"), shop.MAX_LENGTH, 1)
    read, written = torch.zeros(1, shop.MAX_LENGTH, dtype=torch.int64), torch.zeros(1, model.config.d_model)

    def replay() -> None:
        time.sleep(0.01)
        written.copy_(encoder(read))

    padded.graphs[1, shop.MAX_LENGTH] = _Graph(replay, read, written)
    asked = [torch.tensor([[row]]) for row in (5, 9, 7, 3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(padded, asked))
    with torch.inference_mode():
        for rows, vectors in zip(asked, found, strict=True):
            torch.testing.assert_close(vectors, encoder(rows), atol=2e-6, rtol=0)


def test_a_graph_answers_outside_of_inference_mode() -> None:
    """What was made in inference mode cannot be written outside of it."""
    with torch.inference_mode():
        read, written = torch.zeros(1, shop.MAX_LENGTH, dtype=torch.int64), torch.ones(1, 3)
    padded = GraphedEncoder(lambda session: session.float(), torch.device("cpu"), shop.MAX_LENGTH, 1)
    padded.graphs[1, shop.MAX_LENGTH] = _Graph(lambda: None, read, written)
    assert padded(torch.tensor([[5]])).tolist() == [[1.0, 1.0, 1.0]]


def test_without_graphs_the_sessions_are_encoded_plainly_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with second_device():
        own = shop.catalogue()
        ranker = Ranker(shop.model_for(own), own, device="cuda:0")
        assert ranker.rank(np.array([[5, 9, 4]]), top_k=3).n_items.tolist() == [3]
    assert "without CUDA graphs" in caplog.text
    encoder = ranker.encoder.plain
    assert isinstance(encoder, GraphedEncoder)
    assert encoder.obstacle in caplog.text
    assert encoder.obstacle


def test_a_recording_that_would_answer_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shop.model_for(shop.catalogue())
    encoder = SessionEncoder(model, None)
    real = encoder.forward

    def fixed(session: torch.Tensor) -> torch.Tensor:
        return real(session) * (2.0 if session.shape[0] == 2 else 1.0)  # a recording keeps one of the two for ever

    monkeypatch.setattr(encoder, "forward", fixed)
    assert trace_encoder(encoder) is encoder


def test_event_features_go_past_the_recording() -> None:
    own = shop.catalogue()
    ranker = Ranker(shop.model_for(own), own)
    rows = np.array([[5, 9, 4]])
    with torch.inference_mode():
        torch.testing.assert_close(
            ranker.encode(rows, {"unused": np.zeros((1, 3))}), ranker.encode(rows), atol=1e-6, rtol=0
        )
