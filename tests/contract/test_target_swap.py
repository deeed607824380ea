"""Exchanging the target, and everything after it, changes no session vector: bit for bit, in every loader and mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.t4r import PrefixMasking, build_model, to_core
from tests.contract import shop

LENGTHS = {"shortest": 2, "below": 4, "at": shop.MAX_LENGTH, "above": 9}
"""Items of a session against the model's maximum of 6."""


def session_vectors(model: Any, batch: dict[str, Tensor], training: bool, testing: bool) -> Tensor:
    torch.manual_seed(11)  # the same cut, the same dropout
    return model.heads[0].body(dict(batch), training=training, testing=testing)


def exchange(batch: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Replace all hidden real values by others."""
    changed = dict(batch)
    item = batch["item_id-list"]
    changed["item_id-list"] = torch.where(hidden, 3 + (item + 40) % (shop.N_ROWS - 3), item)
    category = batch["category-list"]
    changed["category-list"] = torch.where(hidden, (category + 3) % shop.N_CATEGORIES, category)
    changed["price-list"] = torch.where(hidden, batch["price-list"] + 5, batch["price-list"])
    return changed


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("engine", ["merlin", "missrec"])
@pytest.mark.parametrize("mode", ["training", "testing"])
def test_exchanging_the_target_changes_no_session_vector(
    tmp_path: Path, loader: Callable[..., Any], engine: str, mode: str, length: int, attention: str
) -> None:
    rows = [row for row in shop.sessions(200, seed=3) if len(row) == length][:12]
    shop.write_sessions(tmp_path, rows)
    torch.manual_seed(0)
    model = build_model(Recipe(model=shop.config(attention=attention)), shop.schema(), shop.catalogue())
    model.heads[0].body[1].refresh_steps = 0
    model.heads[0].body[1].refresh(seed=0)
    model.train(mode == "training")
    flags = {"training": mode == "training", "testing": mode == "testing"}
    for batch, _ in loader(engine, tmp_path, shop.schema(), batch_size=12, shuffle=mode == "training"):
        before = session_vectors(model, batch, **flags)
        masking = model.heads[0].body[0].masking
        labels = masking.masked_targets[masking.masked_targets > 0]
        hidden = (batch["item_id-list"] > 0) & ~masking.mask_schema
        assert hidden.any(1).all()
        after = session_vectors(model, exchange(batch, hidden), **flags)
        assert torch.equal(before, after)
        assert (masking.masked_targets[masking.masked_targets > 0] != labels).all(), (
            "the exchange must reach the labels"
        )
        first = hidden.logical_not() & (torch.arange(hidden.shape[1]) == (masking.mask_schema.sum(1, keepdim=True) - 1))
        touched = session_vectors(model, exchange(batch, first), **flags)
        assert not torch.isclose(before, touched).all(-1).any(), "an exchange of the last visible item must be seen"


def test_all_prefixes_of_our_loader_predict_the_item_that_followed(data: Path, loader: Callable[..., Any]) -> None:
    masking = PrefixMasking(hidden_size=1, cut="last")
    seen = set()
    for batch, _ in loader("missrec", data / "train", shop.schema(), batch_size=16, shuffle=True):
        info = masking.compute_masked_targets(batch["item_id-list"], training=True)
        for ids, visible, labels in zip(batch["item_id-list"], info.schema, info.targets, strict=True):
            n = int(visible.sum())
            assert labels.tolist() == [0] * (n - 1) + [int(ids[n])] + [0] * (len(ids) - n)
            seen.add((tuple(ids[:n].tolist()), int(ids[n])))
    wanted = set()
    for row in shop.sessions(96, seed=0):
        wanted |= {(tuple(row[max(0, t - shop.MAX_LENGTH) : t]), row[t]) for t in range(1, len(row))}
    assert seen == wanted


def test_inference_hides_nothing(data: Path, loader: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = build_model(Recipe(model=shop.config()), shop.schema(event_features=False), shop.catalogue()).eval()
    core = to_core(model)
    core.discover_interests(0)
    batch, _ = next(
        iter(loader("merlin", data / "test", shop.schema(event_features=False), batch_size=8, shuffle=False, width=9))
    )
    item_ids = batch["item_id-list"]
    rows = [row[row > 0][-shop.MAX_LENGTH :] for row in item_ids]
    last = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        expected = core.score(core(last), core.candidates(), last)
        torch.testing.assert_close(model(dict(batch)), expected, rtol=0, atol=1e-6)


def test_t4rs_own_masking_would_show_the_label() -> None:
    from transformers4rec.torch.masking import CausalLanguageModeling

    clm = CausalLanguageModeling(hidden_size=4)
    info = clm.compute_masked_targets(torch.tensor([[11, 12, 13, 14]]), testing=True)
    label = info.targets[info.targets > 0]
    assert label.tolist() == [14]
    assert info.schema.all(), "the position of item 14 is not hidden: why this package has a masking of its own"


def test_any_item_but_the_first_is_the_target_of_a_random_cut() -> None:
    torch.manual_seed(0)
    rows = torch.tensor([[5, 6, 7, 8]] * 200 + [[5, 6, 0, 0]] * 20)
    target = PrefixMasking(hidden_size=8, cut="random").target_index(rows, training=True, testing=False)
    assert set(target[:200].tolist()) == {1, 2, 3}
    assert set(target[200:].tolist()) == {1}
