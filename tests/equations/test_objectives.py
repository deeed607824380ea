"""The objectives against the reference, and the reference's own contrastive losses against plain arithmetic."""

import math

import numpy as np
import pytest
import torch

from missrec_t4r.model.fast import cross_entropy
from missrec_t4r.model.losses import next_item_loss, orthogonality_loss
from tests.equations import reference as ref

RNG = np.random.default_rng(11)
SCORES = RNG.uniform(-1, 1, (4, 9))
TARGETS = [3, 8, 5, 3]
MASK = np.array([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])
MEMORY = RNG.normal(size=(4, 3, 5))


def test_cross_entropy() -> None:
    found = next_item_loss(torch.from_numpy(SCORES) / 0.07, torch.tensor(TARGETS))
    assert found.item() == pytest.approx(ref.cross_entropy(SCORES, TARGETS, 0.07), abs=1e-10)


def test_cross_entropy_by_hand() -> None:
    # two candidates, scores .07 apart at temperature .07: the better one has probability e / (e + 1)
    logits = torch.tensor([[-torch.inf, 1.0, 0.0]])
    assert next_item_loss(logits, torch.tensor([1])).item() == pytest.approx(math.log1p(math.exp(-1)))


def test_positions_without_a_target_do_not_count() -> None:
    logits, targets = torch.from_numpy(SCORES), torch.tensor([3, 0, 5, 0])
    assert next_item_loss(logits, targets).item() == pytest.approx(ref.cross_entropy(SCORES[[0, 2]], [3, 5], 1.0))


def test_targets_that_cannot_be_recommended_do_not_count() -> None:
    logits = torch.from_numpy(SCORES).clone().requires_grad_()
    masked = logits.masked_fill(torch.arange(9) == 8, -torch.inf)  # the target of the second position
    loss = next_item_loss(masked, torch.tensor(TARGETS))
    without = np.delete(SCORES, 8, 1)[[0, 2, 3]]
    assert loss.item() == pytest.approx(ref.cross_entropy(without, [3, 5, 3], 1.0))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


def test_several_targets_are_weighted_sums_of_single_ones() -> None:
    logits, second = torch.from_numpy(SCORES), [5, 4, 0, 0]
    found = next_item_loss(logits, torch.tensor([TARGETS, second]).T, torch.tensor([1.0, 0.3]))
    expected = ref.cross_entropy(SCORES, TARGETS, 1.0) + 0.3 * ref.cross_entropy(SCORES[:2], second[:2], 1.0)
    assert found.item() == pytest.approx(expected)


def test_gradients_are_those_of_the_plain_cross_entropy() -> None:
    leaf = torch.from_numpy(SCORES).clone().requires_grad_()
    targets, weights = torch.tensor([TARGETS, [5, 0, 0, 8]]).T, torch.tensor([1.0, 0.3], dtype=torch.float64)

    def logits() -> torch.Tensor:
        return (leaf / 0.07).index_fill(1, torch.tensor([0, 1, 2, 8]), -torch.inf)  # the 8 is twice a target

    (2.0 * cross_entropy.next_item_loss(logits(), targets, weights)).backward()
    found, leaf.grad, masked = leaf.grad, None, logits()
    first = torch.nn.functional.cross_entropy(masked[[0, 2, 3]], targets[[0, 2, 3], 0])
    second = torch.nn.functional.cross_entropy(masked[:1], targets[:1, 1])
    (2.0 * (first + 0.3 * second)).backward()
    torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-12)
    assert not found[1].any()


def test_a_loss_without_any_target_is_zero() -> None:
    logits = torch.from_numpy(SCORES).clone().requires_grad_()
    loss = next_item_loss(logits, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_cosine_orthogonality() -> None:
    found = orthogonality_loss(torch.from_numpy(MEMORY), torch.from_numpy(MASK), "cosine")
    expected = ref.orthogonality_cosine([memory[mask] for memory, mask in zip(MEMORY, MASK, strict=True)])
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_cosine_orthogonality_by_hand() -> None:
    memory = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 1.0]]])  # right angle, 45 degrees
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert orthogonality_loss(memory, mask, "cosine").item() == pytest.approx((0.0 + 0.5) / 2)
    mask[1, 1] = False
    assert orthogonality_loss(memory, mask, "cosine").item() == pytest.approx(0.0)
    assert orthogonality_loss(memory, torch.zeros_like(mask), "cosine").item() == 0.0


def test_faithful_orthogonality() -> None:
    found = orthogonality_loss(torch.from_numpy(MEMORY), torch.from_numpy(MASK), "faithful")
    expected = ref.orthogonality_faithful(list(zip(MEMORY, MASK.mean(1), strict=True)))
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_faithful_orthogonality_by_hand() -> None:
    # two of three places are real: u = 2/3 of (1 + 2 + 0, 0) = (2, 0); u . u / d = 4 / 2
    memory = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    assert orthogonality_loss(memory, torch.tensor([[True, True, False]]), "faithful").item() == pytest.approx(2.0)
    memory[0, 2, 0] = 3.0  # what the encoder makes of an empty place counts, as in the release: u = 2/3 of (6, 0)
    assert orthogonality_loss(memory, torch.tensor([[True, True, False]]), "faithful").item() == pytest.approx(8.0)


def test_reference_contrasts_are_cross_entropies_of_the_batch() -> None:
    distinct = [3, 8, 5, 4]
    in_batch = SCORES[:, distinct]
    assert ref.sequence_item_contrast(SCORES, distinct, 0.07) == pytest.approx(
        ref.cross_entropy(in_batch, range(4), 0.07)
    )
    views, others = MEMORY[:, 0], MEMORY[:, 1]
    cosines = ref.unit(views) @ ref.unit(others).T
    found = ref.sequence_sequence_contrast(views, others, distinct, 0.07)
    assert found == pytest.approx(ref.cross_entropy(cosines, range(4), 0.07))


def test_reference_contrasts_do_not_count_equal_items_as_negatives() -> None:
    # sessions 0 and 1 have the same positive: each has itself alone in its softmax, so both lose nothing
    assert ref.sequence_item_contrast(SCORES[:2], [3, 3], 0.07) == pytest.approx(0.0)
    assert ref.sequence_sequence_contrast(MEMORY[:2, 0], MEMORY[:2, 1], [3, 3], 0.07) == pytest.approx(0.0)
    assert ref.sequence_item_contrast(SCORES[:2], [3, 4], 0.07) > 0
