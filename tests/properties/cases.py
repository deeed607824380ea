"""Cases of the property tests: random sessions of the test shop under every configuration."""

from __future__ import annotations

import functools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.schema import FIRST_ITEM_ROW
from tests import shop

CONFIGS: dict[str, MISSRecConfig] = {
    "default": shop.default(),
    "default, two layers each": shop.default(n_encoder_layers=2, n_decoder_layers=2),
    "own candidate IDs": shop.default(candidate_ids="own"),
    "inductive": shop.default(item_ids=False),
    "paper": shop.paper(),
    "paper, contextual": shop.paper(sequence_fusion="contextual"),
    "masked, contextual": shop.ours_masked(sequence_fusion="contextual"),
    "phi per item": shop.default(candidate_fusion="dynamic_instance"),
    "without interests": shop.default(interest_ratio=0.0),
    "static": shop.default(candidate_fusion="static"),
}
MAX_LENGTH = shop.SMALL["max_sequence_length"]
LAST_ROW = FIRST_ITEM_ROW + len(shop.ITEMS) - 1

quick = settings(max_examples=12, deadline=None, derandomize=True)
items = st.integers(FIRST_ITEM_ROW, LAST_ROW)
sessions = st.lists(items, min_size=1, max_size=7)
batches = st.lists(sessions, min_size=1, max_size=4)


@functools.cache
def model(name: str) -> MISSRec:
    """Return the model of a configuration, built once; tests must not change it."""
    return shop.model(CONFIGS[name])


def pad(chosen: list[list[int]], width: int | None = None) -> Tensor:
    """Return sessions as rows [batch, seq], at least ``width`` wide."""
    seq = max([width or 0, *map(len, chosen)])
    return torch.tensor([session + [0] * (seq - len(session)) for session in chosen])


@torch.no_grad()
def scores(net: MISSRec, item_ids: Tensor) -> Tensor:
    """Return the scores of the whole catalogue [batch, catalogue]."""
    return net.score(net(item_ids), net.candidates(), item_ids)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Compare in double precision; equal infinities are equal."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
