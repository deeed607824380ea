"""Exchanging a target, and all after it, changes no vector that it is predicted from, in every loader and mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.t4r import PrefixMasking, build_model, to_core
from missrec_t4r.t4r.masking import Cut
from tests.contract import shop

LENGTHS = {"shortest": 2, "below": 4, "at": shop.MAX_LENGTH, "above": 9}
"""Items of a session against the model's maximum of 6."""


def session_vectors(model: Any, batch: dict[str, Tensor], training: bool, testing: bool) -> Tensor:
    """Return the vector from which the item after each column is predicted, [batch or prefix, column, dim]."""
    torch.manual_seed(11)  # the same cut, the same dropout
    output = model.heads[0].body(dict(batch), training=training, testing=testing)
    state = model.heads[0].body[1].state
    vectors = state.encoded.vectors
    if not state.sessions.every_position:
        return vectors.unsqueeze(1).expand(-1, output.shape[1], -1)
    at = (torch.arange(output.shape[1]) - state.sessions.window[:, :1]).clamp(0, vectors.shape[1] - 1)
    return vectors.gather(1, at.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))


def exchange(batch: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """Replace all hidden real values by others."""
    changed = dict(batch)
    item = batch["item_id-list"]
    changed["item_id-list"] = torch.where(hidden, 3 + (item + 40) % (shop.N_ROWS - 3), item)
    category = batch["category-list"]
    changed["category-list"] = torch.where(hidden, (category + 3) % shop.N_CATEGORIES, category)
    changed["price-list"] = torch.where(hidden, batch["price-list"] + 5, batch["price-list"])
    return changed


def _nearly_equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-6)


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
    settings = shop.config(attention=attention, dropout=0.0)  # dropout draws by shape
    model = build_model(Recipe(model=settings), shop.schema(), shop.catalogue())
    model.heads[0].body[1].refresh_steps = 0
    model.heads[0].body[1].refresh(seed=0)
    model.train(mode == "training")
    flags = {"training": mode == "training", "testing": mode == "testing"}
    whole_rows = mode == "training" and engine == "merlin"
    same: Any = (
        _nearly_equal if whole_rows else torch.equal
    )  # later items change the number of interests, so the shapes
    for batch, _ in loader(engine, tmp_path, shop.schema(), batch_size=12, shuffle=mode == "training"):
        before = session_vectors(model, batch, **flags)
        masking = model.heads[0].body[0].masking
        labels, column = masking.masked_targets, torch.arange(batch["item_id-list"].shape[1])
        n_labelled = (labels > 0).sum(0)
        assert n_labelled.any()
        for last in n_labelled.nonzero().flatten().tolist():  # the position of the last label that is compared
            later = (batch["item_id-list"] > 0) & (column > last)
            kept = (labels > 0) & (column <= last)
            after = session_vectors(model, exchange(batch, later), **flags)
            assert same(before[kept], after[kept])
            of_position = labels[:, last] > 0
            assert (masking.masked_targets[:, last] != labels[:, last])[of_position].all(), "it must reach the labels"
            touched = session_vectors(model, exchange(batch, (batch["item_id-list"] > 0) & (column == last)), **flags)
            assert not torch.isclose(before, touched)[of_position, last].all(-1).any(), "the last item must be seen"


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_whole_sessions_train_the_prefixes_of_our_loader(
    data: Path, loader: Callable[..., Any], attention: str
) -> None:
    """T4R's stock loader and ours give the same examples: prefixes, and the item that followed each."""
    wanted = sorted((row[:t], row[t]) for row in shop.sessions(96, seed=0) for t in range(1, len(row)))
    model = build_model(
        Recipe(model=shop.config(attention=attention, max_sequence_length=9)), shop.schema(), shop.catalogue()
    ).train()
    inputs, seen = model.heads[0].body[0], []
    for batch, _ in loader("merlin", data / "train", shop.schema(), batch_size=16, shuffle=True):
        inputs(dict(batch), training=True)
        labels, shown = inputs.masking.masked_targets, inputs.state.sessions.item_ids
        for row, column in (labels > 0).nonzero().tolist():
            seen.append((shown[row, : column + 1].tolist(), int(labels[row, column])))
    assert sorted(seen) == wanted


def test_longer_sessions_train_every_position_over_the_epochs(tmp_path: Path, loader: Callable[..., Any]) -> None:
    row = shop.sessions(200, seed=3, longest=40)
    row = [next(session for session in row if len(session) == 20)]
    shop.write_sessions(tmp_path, row)
    model = build_model(Recipe(model=shop.config(attention="causal")), shop.schema(), shop.catalogue()).train()
    inputs, trained = model.heads[0].body[0], set()
    torch.manual_seed(0)
    for _ in range(60):
        for batch, _ in loader("merlin", tmp_path, shop.schema(), batch_size=4, shuffle=True, width=20):
            inputs(dict(batch), training=True)
            columns = (inputs.masking.masked_targets[0] > 0).nonzero().flatten().tolist()
            assert len(columns) == shop.MAX_LENGTH
            trained |= set(columns)
    assert trained == set(range(19))


@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_the_loss_of_whole_sessions_is_that_of_our_own_trainer(
    data: Path, loader: Callable[..., Any], ratio: float
) -> None:
    from missrec_t4r.config import TrainConfig
    from missrec_t4r.data.batching import TrainingBatch
    from missrec_t4r.t4r import task as module
    from missrec_t4r.training.step import training_loss

    settings = shop.config(attention="causal", max_sequence_length=9, dropout=0.0, interest_ratio=ratio)
    model = build_model(Recipe(model=settings), shop.schema(event_features=False), shop.catalogue()).train()
    model.heads[0].body[1].refresh_steps = 0
    core = to_core(model)
    core.discover_interests(0)
    batch, _ = next(
        iter(loader("merlin", data / "train", shop.schema(event_features=False), batch_size=24, shuffle=True))
    )
    loss = model(dict(batch), training=True)["loss"]
    sessions, labels = model.heads[0].body[0].state.sessions, model.heads[0].body[0].masking.masked_targets
    own = training_loss(
        core, TrainingBatch(sessions.item_ids, labels[:, : sessions.item_ids.shape[1], None]), TrainConfig.paper()
    )
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    whole = torch.autograd.grad(loss, core.decoder.parameters(), allow_unused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGEST_TABLE", 7 * shop.N_ROWS)  # seven positions at a time
        parts = model(dict(batch), training=True)
    torch.testing.assert_close(parts["loss"], own, rtol=1e-5, atol=1e-5)
    in_parts = torch.autograd.grad(parts["loss"], core.decoder.parameters(), allow_unused=True)
    for one, other in zip(whole, in_parts, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("cut", ["all", "random", "last"])
def test_the_last_item_is_the_target_of_a_test_however_training_cuts(cut: Cut) -> None:
    rows = torch.tensor([[5, 6, 7, 8]] * 50 + [[5, 6, 0, 0]])
    target = PrefixMasking(hidden_size=8, cut=cut).target_index(rows, training=False, testing=True)
    assert target.tolist() == [3] * 50 + [1]
