"""E16 and E17, pre-training's contrasts, against the reference and by hand."""

import math

import numpy as np
import pytest
import torch

from missrec_t4r.model.contrastive import (
    BatchEmbeddings,
    Positives,
    in_batch_loss,
    sequence_item_contrast,
    sequence_sequence_contrast,
)
from tests import shop
from tests.equations import reference as ref

POSITIVES = [3, 8, 5, 3, 9, 13]
RNG = np.random.default_rng(5)


def _unit(rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(RNG.normal(size=(rows, width))), dim=-1)


@pytest.mark.parametrize("fusion", ["static", "dynamic_shared"])
def test_sequence_item_contrast(fusion: str) -> None:
    model = shop.model(shop.default(candidate_fusion=fusion, item_ids=False, history_bias=False))
    positives, sessions = torch.tensor(POSITIVES), _unit(len(POSITIVES), model.config.d_model)
    items = BatchEmbeddings.of(model.item_encoder, positives, torch.tensor([[4, 6]]))
    found = sequence_item_contrast(model.fusion, sessions, Positives(positives, positives), items, 0.07)
    scores = model.fusion(sessions, model.candidates()).detach().numpy()  # equal to the reference: test_fusion.py
    assert found.item() == pytest.approx(ref.sequence_item_contrast(scores, POSITIVES, 0.07), abs=1e-10)


def test_the_correction_takes_log_frequencies_off_the_logits() -> None:
    model = shop.model(shop.default(candidate_fusion="static", item_ids=False, history_bias=False))
    positives, sessions = torch.tensor(POSITIVES), _unit(len(POSITIVES), model.config.d_model)
    items, frequency = BatchEmbeddings.of(model.item_encoder, positives), torch.from_numpy(RNG.uniform(0.01, 0.2, 15))
    everyone = Positives(positives, positives)
    found = sequence_item_contrast(model.fusion, sessions, everyone, items, 0.07, frequency.log())
    scores = model.fusion(sessions, model.candidates()).detach().numpy() - 0.07 * np.log(frequency.numpy())
    assert found.item() == pytest.approx(ref.sequence_item_contrast(scores, POSITIVES, 0.07), abs=1e-10)


def test_sequence_sequence_contrast() -> None:
    sessions, views, positives = _unit(6, 5), _unit(6, 5), torch.tensor(POSITIVES)
    found = sequence_sequence_contrast(sessions, views, Positives(positives, positives), 0.07)
    expected = ref.sequence_sequence_contrast(sessions.numpy(), views.numpy(), POSITIVES, 0.07)
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_equal_items_are_not_each_others_negatives_by_hand() -> None:
    # line 0 wants item 4 and sees item 7 one lower: e / (e + 1); its second item 4 is no negative
    logits, items = torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([4, 7, 4])
    assert in_batch_loss(logits, Positives(items[:1], items)).item() == pytest.approx(math.log1p(math.exp(-1)) / 3)


def test_the_losses_of_two_ranks_are_those_of_their_joint_batch() -> None:
    """Each rank scores its sessions against everyone's positives; the sum over ranks is the global loss."""
    sessions, views, positives = _unit(6, 5).requires_grad_(), _unit(6, 5), torch.tensor(POSITIVES)
    whole = sequence_sequence_contrast(sessions, views, Positives(positives, positives), 0.1)
    (expected,) = torch.autograd.grad(whole, sessions)
    ranks = [
        sequence_sequence_contrast(sessions[own], views, Positives(positives[own], positives, own.start), 0.1)
        for own in (slice(0, 3), slice(3, 6))
    ]
    assert sum(ranks).item() == pytest.approx(whole.item())
    torch.testing.assert_close(torch.autograd.grad(sum(ranks), sessions)[0], expected)


def test_batch_tokens_are_those_of_the_catalogue() -> None:
    model = shop.model(shop.default(item_ids=False))
    rows = torch.tensor([[5, 3, 0], [9, 9, 14]])
    items = BatchEmbeddings.of(model.item_encoder, rows)
    assert items.rows.tolist() == [0, 3, 5, 9, 14]
    taken, whole = items.take(rows), model.item_encoder.catalogue().take(rows)
    torch.testing.assert_close(taken.modality, whole.modality)
    assert torch.equal(taken.mask, whole.mask)
