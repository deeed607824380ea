"""Attention, encoder layer and decoder layer against the reference, with random masks that blind whole rows."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from missrec_t4r.model.attention import DecoderLayer, EncoderLayer, MultiHeadAttention
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.interests import InterestTokens
from tests.equations import reference as ref
from tests.equations import translate

BATCH, SEQ, INTERESTS, DIM, HEADS, INNER, EPS = 3, 5, 4, 8, 2, 12, 1e-12


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0.5 if weight.ndim == 1 else 0.0, 0.4)
    return module.double().eval()


@pytest.fixture
def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, SEQ, DIM, dtype=torch.float64)


@pytest.fixture
def memory() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(BATCH, INTERESTS, DIM, dtype=torch.float64)


def random_mask(*shape: int) -> Tensor:
    """About half of the keys, none at all for the second query of the first session."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[0, 1] = False
    return mask


def close(found: Tensor, expected: list[ref.Array]) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.stack(expected), rtol=0, atol=1e-10)


def test_attention(tokens: Tensor, memory: Tensor) -> None:
    module = randomised(MultiHeadAttention(DIM, HEADS, 0.5))
    mask = random_mask(BATCH, SEQ, INTERESTS)
    expected = translate.attention(module)
    close(
        module(tokens, memory, mask),
        [expected(x.numpy(), c.numpy(), m.numpy()) for x, c, m in zip(tokens, memory, mask, strict=True)],
    )


def test_attention_that_sees_nothing_adds_the_output_bias_alone(tokens: Tensor, memory: Tensor) -> None:
    module = randomised(MultiHeadAttention(DIM, HEADS, 0.5))
    found = module(tokens, memory, random_mask(BATCH, SEQ, INTERESTS))[0, 1]
    torch.testing.assert_close(found, module.output.bias, rtol=0, atol=0)


def test_encoder_layer(tokens: Tensor) -> None:
    module = randomised(EncoderLayer(DIM, HEADS, INNER, 0.5, EPS))
    mask = random_mask(BATCH, SEQ, SEQ)
    expected = translate.encoder_layer(module)
    close(module(tokens, mask), [expected(x.numpy(), m.numpy()) for x, m in zip(tokens, mask, strict=True)])


def test_decoder_layer(tokens: Tensor, memory: Tensor) -> None:
    module = randomised(DecoderLayer(DIM, HEADS, INNER, 0.5, EPS))
    mask, memory_mask = random_mask(BATCH, SEQ, SEQ), random_mask(BATCH, SEQ, INTERESTS)
    expected = translate.decoder_layer(module)
    found = module(tokens, tokens, mask, memory, memory_mask)
    parts = zip(tokens, mask, memory, memory_mask, strict=True)
    close(found, [expected(x.numpy(), m.numpy(), c.numpy(), v.numpy()) for x, m, c, v in parts])


def test_decoder_layer_answers_for_chosen_positions_alone(tokens: Tensor, memory: Tensor) -> None:
    module = randomised(DecoderLayer(DIM, HEADS, INNER, 0.5, EPS))
    mask, memory_mask = random_mask(BATCH, SEQ, SEQ), random_mask(BATCH, SEQ, INTERESTS)
    everywhere = module(tokens, tokens, mask, memory, memory_mask)
    at_three = module(tokens[:, 3:4], tokens, mask[:, 3:4], memory, memory_mask[:, 3:4])
    torch.testing.assert_close(at_three, everywhere[:, 3:4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_layers", [0, 1, 2])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_contextual_encoder(memory: Tensor, attention: str, n_layers: int) -> None:
    layers = [EncoderLayer(DIM, HEADS, INNER, 0.5, EPS) for _ in range(n_layers)]
    module = randomised(ContextualEncoder(layers, torch.nn.LayerNorm(DIM, EPS), attention))  # type: ignore[arg-type]
    position = torch.tensor([[0, 0, 1, 3], [0, 1, 1, 2], [2, 2, 2, 2]])
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])
    found = module(InterestTokens(memory, mask, position))
    expected = translate.encoder(module)
    for b, real in enumerate(mask.sum(1)):
        places = position[b, :real].numpy()
        visible = places[None, :] <= places[:, None] if attention == "causal" else np.ones((real, real), bool)
        close(found[b, :real], list(expected(memory[b, :real].numpy(), visible)))
