"""The loss of a training step against a loop over prefixes that knows nothing of batches, positions or padding."""

import numpy as np
import pytest
import torch

from missrec_t4r.config import TrainConfig
from missrec_t4r.data.batching import collate, training_batches
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.training.step import training_loss
from tests import shop
from tests.equations import reference as ref
from tests.equations import translate

SESSIONS = [shop.rows([*session, target]) for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)]
CONFIGS = {
    "paper": shop.paper(orthogonality_weight=0.0, dropout=0.0),
    "default": shop.default(orthogonality_weight=0.0, feature_scaling="none"),
    "own candidate IDs": shop.default(orthogonality_weight=0.0, feature_scaling="none", candidate_ids="own"),
    "default, inductive": shop.default(orthogonality_weight=0.0, feature_scaling="none", item_ids=False),
}


@pytest.mark.parametrize("next_items", [1, 2])
@pytest.mark.parametrize(
    ("name", "backwards"),
    [
        ("paper", False),
        ("default", False),
        ("default", True),
        ("own candidate IDs", False),
        ("default, inductive", False),
    ],
)
def test_training_loss(name: str, backwards: bool, next_items: int) -> None:
    config = CONFIGS[name]
    model, train = shop.model(config), TrainConfig.paper(batch_size=1000, next_items=next_items, next_items_weight=0.3)
    model.train(name == "paper")  # then the padding row is a class, as in the release
    data = Sessions.from_lists(SESSIONS)
    [(examples, _)] = training_batches(data, config, train, np.random.default_rng(0))
    batch = collate(data, examples, next_items, all_positions=config.attention == "causal", backwards=backwards)
    expected, phi = translate.whole(model, shop.catalogue()), translate.phi(model)
    candidates = translate.candidates(model, shop.catalogue())
    bias = 0.0 if terms_of(model).history_bias is None else float(terms_of(model).history_bias.bias.detach())
    losses: list[list[float]] = [[] for _ in range(next_items)]
    for session in SESSIONS:
        session = session[::-1] if backwards else session
        vectors = ref.unit(expected.positions(session[:-1])) if config.attention == "causal" else None
        for n in range(1, len(session)):
            vector = expected.session_vector(session[:n]) if vectors is None else vectors[n - 1]
            scores = ref.with_history_bias(
                ref.fused_scores(vector, candidates, phi, padding=model.training), session[:n], bias
            )
            for ahead, target in enumerate(session[n : n + next_items]):
                losses[ahead].append(ref.cross_entropy(scores[None], [target], config.temperature))
    weighted = sum(weight * float(np.mean(part)) for weight, part in zip([1.0, 0.3], losses))
    assert training_loss(model, batch, train).item() == pytest.approx(weighted, abs=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_the_step_are_those_of_the_plain_formula(name: str) -> None:
    model, config = shop.model(CONFIGS[name]), CONFIGS[name]
    data, train = Sessions.from_lists(SESSIONS), TrainConfig.paper(batch_size=1000)
    [(examples, _)] = training_batches(data, config, train, np.random.default_rng(0))
    batch = collate(data, examples, 1, all_positions=config.attention == "causal", backwards=False)
    training_loss(model, batch, train).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    prefixes = [(session[:n], session[n]) for session in SESSIONS for n in range(1, len(session))]
    total = torch.zeros((), dtype=torch.float64)
    for history, target in prefixes:  # one example at a time, no padding, candidates anew each time
        item_ids = torch.tensor([history])
        logits = model.score(model(item_ids), model.candidates(), item_ids) / config.temperature
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([target])) / len(prefixes)
    total.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-8, atol=1e-10, msg=name)
