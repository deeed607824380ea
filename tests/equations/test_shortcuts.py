"""Ways to the same numbers for less work: each against the plain formula, values and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.model import losses
from missrec_t4r.model.attention import EncoderLayer, MultiHeadAttention
from missrec_t4r.model.build import build_network
from missrec_t4r.model.fast import SHORTCUTS, cross_entropy, use_shortcuts
from missrec_t4r.model.fast.attention import FastAttention, FastEncoderLayer
from missrec_t4r.model.fast.contextual_encoder import FastContextualEncoder
from missrec_t4r.model.fast.dropout import FastDropout, dropout
from missrec_t4r.model.fast.fusion import FastCandidateFusion
from missrec_t4r.model.fast.item_encoder import unit
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from tests import shop
from tests.equations import reference as ref
from tests.equations import translate

DIM, HEADS = 8, 2


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 0.2, 0.5)
    return module.double()


def plain_attention(module: MultiHeadAttention, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (
        layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for layer, x in ((module.query, queries), (module.key, keys), (module.value, keys))
    )
    blind = ~mask.any(-1, keepdim=True)
    scores = (q @ k.transpose(2, 3) / (DIM // HEADS) ** 0.5).masked_fill(~(mask | blind).unsqueeze(1), -torch.inf)
    return module.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2).masked_fill(blind, 0.0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 7), (2, 30), (3, 4), (6, 3)])
def test_attention_by_either_way(n_queries: int, n_keys: int, training: bool) -> None:
    module = randomised(FastAttention(DIM, HEADS, 1e-9)).train(training)  # a dropout that drops nothing
    assert isinstance(module, MultiHeadAttention)
    mask = torch.rand(3, n_queries, n_keys) < 0.6
    mask[0, 0] = False
    inputs = [torch.randn(3, n, DIM, dtype=torch.float64, requires_grad=True) for n in (n_queries, n_keys)]
    chosen, asked = [*inputs, *module.parameters()], torch.randn(3, n_queries, DIM, dtype=torch.float64)
    found, expected = module(*inputs, mask), plain_attention(module, *inputs, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    numpy = translate.attention(module)
    for row, query, key, seen in zip(found, *inputs, mask, strict=True):
        other = numpy(translate.array(query), translate.array(key), seen.numpy())
        torch.testing.assert_close(row.detach(), torch.from_numpy(other), rtol=0, atol=1e-10)
    for left, right in zip(
        torch.autograd.grad((found * asked).sum(), chosen),
        torch.autograd.grad((expected * asked).sum(), chosen),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_both_ways_of_attention_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module, taken = randomised(FastAttention(DIM, HEADS, 0.0)), []
    monkeypatch.setattr(module, "_few_queries", lambda *_: taken.append("few"))
    monkeypatch.setattr(module, "attend", lambda *_: taken.append("many"))
    for n_queries in (1, 6):
        module(torch.randn(1, n_queries, DIM).double(), torch.randn(1, 9, DIM).double(), torch.ones(1, 1, 9).bool())
    assert taken == ["few", "many"]


def test_centroids_projected_once_are_those_projected_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("missrec_t4r.model.fast.contextual_encoder.MANY", 1)
    vocabulary = InterestVocabulary(n_interests=4, n_modalities=2, n_rows=9, d_model=DIM).double()
    vocabulary.assignment[:, 3:] = torch.randint(1, 5, (2, 6), generator=torch.Generator().manual_seed(1))
    vocabulary.centroids[1:] = torch.randn(4, DIM, dtype=torch.float64)
    layers = [EncoderLayer(DIM, HEADS, 12, 0.0, 1e-12) for _ in range(2)]
    encoder = use_shortcuts(randomised(FastContextualEncoder(layers, torch.nn.LayerNorm(DIM, 1e-12))))
    interests = vocabulary(torch.tensor([[3, 4, 5], [6, 7, 0], [8, 0, 0], [3, 8, 7]]))
    assert interests.ids is not None
    assert interests.ids.numel() > len(interests.ids.unique()), "no interest is named twice"
    found, expected = encoder(interests), encoder(interests._replace(ids=None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = list(encoder.parameters())
    for left, right in zip(
        torch.autograd.grad(found.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["dynamic_shared", "dynamic_instance"])
@pytest.mark.parametrize("n_single", [1, 8])  # almost all items have both modalities, or few
def test_two_modalities_by_the_difference_of_their_votes(name: str, n_single: int) -> None:
    torch.manual_seed(0)
    n = 12
    modality = ref.unit(torch.randn(2, n, DIM, dtype=torch.float64).numpy())
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, :n_single] = False
    ids = torch.from_numpy(ref.unit(torch.randn(n, DIM, dtype=torch.float64).numpy()))
    tokens = torch.from_numpy(modality).requires_grad_()
    session = F.normalize(torch.randn(5, DIM, dtype=torch.float64), dim=-1).requires_grad_()
    candidates = CandidateEmbeddings(tokens, mask, ids.requires_grad_(), torch.arange(n) % 3 > 0)
    fusion = FastCandidateFusion(name, n).double()  # type: ignore[arg-type]
    assert fusion.phi is not None
    fusion.phi.data = torch.linspace(-5, 5, len(fusion.phi), dtype=torch.float64)
    votes = torch.einsum("bd,mnd->mbn", session, tokens)
    weights = (fusion.phi * votes).masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(0)
    fused, own = (weights * votes).sum(0), session @ candidates.ids.T  # type: ignore[union-attr]
    expected = torch.where(candidates.id_mask, (own + 2 * fused) / 3, fused)  # type: ignore[arg-type]
    found = fusion(session, candidates)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    asked, chosen = torch.randn(5, n, dtype=torch.float64), [session, tokens, ids, fusion.phi]
    for left, right in zip(
        torch.autograd.grad((found * asked).sum(), chosen),
        torch.autograd.grad((expected * asked).sum(), chosen),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_unit_length_has_the_gradient_of_normalize() -> None:
    x = torch.randn(4, 5, DIM, dtype=torch.float64)
    x[0, 0], x[0, 1] = 0.0, 1e-14  # as torch has it: divided by 1e-12
    asked, gradients = torch.randn_like(x), []
    for scale in (unit, lambda x: F.normalize(x, dim=-1)):
        leaf = x.clone().requires_grad_()
        (scale(leaf) * asked).sum().backward()
        gradients.append(leaf.grad)
        torch.testing.assert_close(scale(leaf), F.normalize(x, dim=-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_independently_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 401, requires_grad=True)
    found = dropout(x, probability)
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(1 - probability, abs=0.003)
    assert found.mean().item() == pytest.approx(1.0, abs=0.02)
    pairs = (kept[:, 1:] & kept[:, :-1]).float().mean().item()
    assert pairs == pytest.approx((1 - probability) ** 2, abs=0.004), "neighbours must not depend on each other"
    found.sum().backward()
    assert torch.equal(x.grad, found.detach())


def test_dropout_is_drawn_from_torchs_seed_and_rests_in_evaluation() -> None:
    layer, x = FastDropout(0.3), torch.ones(7, 9)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert layer.eval()(x) is x


def test_items_that_sessions_share_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    item_encoder, rows = shop.model(shop.default()).item_encoder, shop.batch(padding=2)
    with torch.no_grad():
        expected = item_encoder(rows)
        monkeypatch.setattr("missrec_t4r.model.fast.item_encoder.MANY", 1)
        found = item_encoder(rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


WHOLE = {
    "default": shop.default(dropout=0.0),
    "paper": shop.paper(dropout=0.0),
    "contextual": shop.paper(dropout=0.0, sequence_fusion="contextual", candidate_fusion="dynamic_instance"),
    "without interests": shop.default(dropout=0.0, interest_ratio=0.0),
    "layers": shop.default(dropout=0.0, n_encoder_layers=2, n_decoder_layers=2, item_ids=False),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("many", [1, 10_000])
def test_a_model_with_shortcuts_is_the_plain_model(name: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("missrec_t4r.model.fast.contextual_encoder.MANY", many)
    monkeypatch.setattr("missrec_t4r.model.fast.item_encoder.MANY", many)
    fast = shop.model(WHOLE[name])
    plain = build_network(WHOLE[name], shop.catalogue(), shortcuts=False).double()
    plain.load_state_dict({name: weight for name, weight in fast.state_dict().items() if not name.startswith("terms.")})
    switched = [module for module in fast.modules() if type(module) in SHORTCUTS.values()]
    missing = set() if WHOLE[name].has_interests else {FastEncoderLayer}
    assert {type(module) for module in switched} == set(SHORTCUTS.values()) - missing
    assert not [module for module in plain.modules() if type(module) in SHORTCUTS.values()]
    item_ids, targets = shop.batch(padding=2), shop.targets()
    results = []
    for model, loss in ((fast, cross_entropy.next_item_loss), (plain, losses.next_item_loss)):
        model.terms.clear()
        for training in (False, True):
            encoded = model.train(training).encode(item_ids, last_only=True)
            scores = model.score(encoded.vectors, model.candidates(), item_ids)
            results.append([encoded.vectors, encoded.memory * encoded.interests.mask.unsqueeze(-1), scores])
        weights = {name: weight for name, weight in model.named_parameters() if ".key.bias" not in name}
        gradients = torch.autograd.grad(loss(scores / 0.07, targets), list(weights.values()), allow_unused=True)
        results[-1] += [weight if weight is not None else torch.zeros(()) for weight in gradients]
    for found, expected in ((results[0], results[2]), (results[1], results[3])):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
