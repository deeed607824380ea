"""Augmented views: items dropped and the rest left-aligned, words dropped at random positions."""

import pytest
import torch

from missrec_t4r.config import PretrainConfig
from missrec_t4r.data.augmentation import augmented_view, drop_items, random_positions
from missrec_t4r.model.contrastive import BatchEmbeddings, WordDrop
from tests import shop

SESSIONS = torch.tensor([[5, 7, 9, 5, 8], [4, 6, 0, 0, 0], [3, 0, 0, 0, 0]])


def test_the_first_item_is_never_dropped_and_the_rest_is_left_aligned_in_order() -> None:
    torch.manual_seed(0)
    for _ in range(30):
        view = drop_items(SESSIONS, 0.4)
        for session, found in zip(SESSIONS.tolist(), view.tolist(), strict=True):
            kept = [item for item in found if item]
            assert found == kept + [0] * (len(found) - len(kept))
            assert kept[0] == session[0]
            remaining = iter(session)
            assert all(item in remaining for item in kept), "the order is the session's"


def test_items_are_dropped_with_the_given_probability() -> None:
    torch.manual_seed(0)
    sessions = torch.full((4000, 11), 7)
    dropped = 11 - (drop_items(sessions, 0.2) > 0).sum(1)
    assert dropped.float().mean().item() == pytest.approx(0.2 * 10, abs=0.06)
    drawn = random_positions(SESSIONS.repeat(4000, 1), 0.2)
    assert drawn[:, 0].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert not drawn[SESSIONS.repeat(4000, 1) == 0].any()


def test_views_drop_items_or_words_in_the_given_share() -> None:
    torch.manual_seed(0)
    settings = PretrainConfig(item_drop_share=0.9)
    views = [augmented_view(SESSIONS, settings, has_word_drop=True) for _ in range(500)]
    worded = [view for view in views if view.word_dropped is not None]
    assert len(worded) == pytest.approx(50, abs=20)
    assert all(torch.equal(view.item_ids, SESSIONS) for view in worded)
    without = [augmented_view(SESSIONS, settings, has_word_drop=False) for _ in range(50)]
    assert all(view.word_dropped is None for view in without)


def test_word_drop_replaces_the_text_embedding_at_the_random_positions_alone() -> None:
    model = shop.model(shop.default(item_ids=False))
    item_ids = shop.batch([["lamp", "rug", "mug"]])  # the rug has no text
    items = BatchEmbeddings.of(model.item_encoder, item_ids).take(item_ids)
    other = model.item_encoder.vectors.get_buffer("text") * 0.5
    exchanged = WordDrop(model.item_encoder, {"text": other}, "none")(
        items, item_ids, torch.tensor([[True, True, False]])
    )
    text = model.item_encoder.names.index("text")
    expected = model.item_encoder.adapters["text"](other[item_ids[0, 0]])
    torch.testing.assert_close(exchanged.modality[text, 0, 0], expected)
    untouched = torch.ones_like(items.modality, dtype=torch.bool)
    untouched[text, 0, 0] = False
    assert torch.equal(exchanged.modality[untouched], items.modality[untouched])
    assert torch.equal(exchanged.mask, items.mask)
