"""Gradients reach what is learned, and saving forgets nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import TrainingBatch, collate, training_batches
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.training.step import training_loss
from tests import shop
from tests.properties.cases import CONFIGS, scores

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
TRAIN = TrainConfig.paper(batch_size=1000)


def whole_batch(config: MISSRecConfig) -> TrainingBatch:
    """All sessions with their targets, and one as long as the model's memory so that every position is used."""
    longest = (shop.ITEMS * 2)[: config.max_sequence_length + 1]
    named = [*([*session, target] for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)), longest]
    data = Sessions.from_lists([shop.rows(session) for session in named])
    [(examples, _)] = training_batches(data, config, TRAIN, np.random.default_rng(0))
    return collate(data, examples, 1, all_positions=config.attention == "causal", backwards=False)


def gradients(net: MISSRec) -> dict[str, float]:
    training_loss(net, whole_batch(net.config), TRAIN).backward()
    return {name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in net.named_parameters()}


@every_config
def test_gradients_reach_every_parameter(config: MISSRecConfig) -> None:
    found = gradients(shop.model(config))
    # the same number added to all keys cancels in the softmax: their biases cannot learn, in anybody's attention
    unlearnable = {name for name in found if name.endswith("attention.key.bias")}
    assert {name for name, size in found.items() if size < 1e-9} == unlearnable
    assert len(found) - len(unlearnable) > 30


@every_config
def test_gradients_reach_every_parameter_of_a_fresh_model_in_training_mode(config: MISSRecConfig) -> None:
    torch.manual_seed(0)
    net = build_missrec(dataclasses.replace(config, dropout=0.1), shop.catalogue()).train()
    net.discover_interests(seed=0)
    found = gradients(net)
    assert {name for name, size in found.items() if size == 0.0} <= {n for n in found if n.endswith("key.bias")}
    assert max(found.values()) < 1e3, "a zero vector met a normalisation: Adam would not recover from such a step"


def test_an_inductive_model_survives_a_target_that_it_cannot_score() -> None:
    nothing = shop.catalogue(without={"text": ["mug"], "image": ["mug"]})
    net = shop.model(shop.default(item_ids=False), nothing)
    assert np.isfinite(list(gradients(net).values())).all()
    assert torch.isfinite(training_loss(net, whole_batch(net.config), TRAIN))


@every_config
def test_every_used_row_of_the_tables_learns(config: MISSRecConfig) -> None:
    net = shop.model(config)
    gradients(net)
    positions = net.decoder.positions.weight.grad
    assert positions is not None
    assert (positions.abs().amax(1) > 0).all()
    if net.item_encoder.id_embedding is not None:
        learned = net.item_encoder.id_tables[-1].grad.abs().amax(1) > 0  # type: ignore[union-attr]  # of candidates
        cold = {"plate"} if config.mask_untrained_ids else set()
        expected = [False] * 3 + [item not in cold for item in shop.ITEMS]
        assert learned.tolist() == expected


@every_config
def test_a_saved_model_scores_bitwise_the_same(config: MISSRecConfig, tmp_path: Path) -> None:
    net = shop.model(config).float()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    other = build_missrec(config, shop.catalogue()).eval()
    assert not torch.equal(scores(other, shop.batch()), scores(net, shop.batch()))
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(scores(other, shop.batch()), scores(net, shop.batch()))


@every_config
def test_a_few_steps_lower_the_loss(config: MISSRecConfig) -> None:
    torch.manual_seed(0)
    net, batch = build_missrec(config, shop.catalogue()).eval(), whole_batch(config)  # no dropout: a smooth descent
    net.discover_interests(seed=0)
    optimiser, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(15):
        optimiser.zero_grad()
        loss = training_loss(net, batch, TRAIN)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
