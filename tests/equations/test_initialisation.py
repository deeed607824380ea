"""How weights start: ours, and the release's where the setting asks for it."""

import math

import pytest
import torch
from torch import nn

from missrec_t4r.model.attention import MultiHeadAttention
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from tests import shop

WIDE = {"d_model": 64}


def built(**changes: object) -> MISSRec:
    torch.manual_seed(0)
    return build_missrec(shop.paper(**(WIDE | changes)), shop.catalogue())


@pytest.mark.parametrize("initialisation", ["normal", "release"])
def test_projections_of_queries_keys_and_values(initialisation: str) -> None:
    model = built(initialisation=initialisation)
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    bound = math.sqrt(6 / (64 + 3 * 64))  # Xavier: 6 / (inputs + outputs), the three projections being one matrix
    for attention in attentions:
        for projection in (attention.query, attention.key, attention.value):
            spread = projection.weight.detach().std().item()
            assert spread == pytest.approx(0.02 if initialisation == "normal" else bound / math.sqrt(3), rel=0.05)
            assert not projection.bias.any()
        assert attention.output.weight.detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert len(attentions) == 3


def test_everything_else_is_normal() -> None:
    model = built(initialisation="release")
    adapters = set(model.item_encoder.adapters.modules())
    projections = {p for m in model.modules() if isinstance(m, MultiHeadAttention) for p in (m.query, m.key, m.value)}
    others = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in adapters | projections]
    assert len(others) == 7  # three output projections, two feed-forward blocks
    assert all(layer.weight.detach().std().item() == pytest.approx(0.02, rel=0.05) for layer in others)
    assert model.decoder.positions.weight.detach().std().item() == pytest.approx(0.02, rel=0.1)


def test_a_missing_modality_and_the_padding_have_a_direction() -> None:
    model = built()
    assert all(adapter.bias.any() for adapter in model.item_encoder.adapters.values())
    assert model.item_encoder.id_embedding is not None
    assert model.item_encoder.id_embedding.weight.any(1).all()
