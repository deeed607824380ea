"""The event feature encoder: scaling, absent values, unknown codes, and no leak from later positions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.event_features import EventColumn, compact_event_features, fit_event_columns
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import SchemaError
from missrec_t4r.model.event_features import EventFeatureEncoder, EventFeatures
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from tests.event_features import shop
from tests.settings import EVERY_PART

COLUMNS = (
    EventColumn("event", "categorical", 6, 8),
    EventColumn("dwell", "continuous", 1, 8, log=True, mean=2.0, std=1.5),
    EventColumn("scene", "pretrained", 3, 8, std=2.0),
)
ITEMS = torch.tensor([[3, 4, 5, 0]])
VALUES = {
    "event": torch.tensor([[3, 4, 5, 0]], dtype=torch.int32),
    "dwell": torch.tensor([[1.0, 7.0, 40.0, 0.0]]),
    "scene": torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(1)),
}


def model(**changes: object) -> MISSRec:
    torch.manual_seed(3)
    sizes = {"d_model": 16, "n_head": 2, "d_feedforward": 16, "n_neighbours": 0, "max_sequence_length": 6}
    built = build_missrec(MISSRecConfig(**(EVERY_PART | sizes | changes)), shop.catalogue(), COLUMNS).eval()  # type: ignore[arg-type]
    built.discover_interests(0)
    return built


def test_a_missing_column_is_a_column_of_missing_values() -> None:
    encoder = EventFeatureEncoder(COLUMNS).eval()
    with torch.no_grad():
        for absent in encoder.absent:
            absent.normal_()
    nothing = encoder({}, ITEMS)
    empty = {
        "event": torch.zeros(1, 4, dtype=torch.int64),
        "dwell": torch.full((1, 4), torch.nan),
        "scene": torch.zeros(1, 4, 3),
    }
    assert torch.equal(encoder(empty, ITEMS), nothing)
    assert torch.equal(nothing[0, 0], torch.cat(list(encoder.absent)))
    some = encoder({"dwell": VALUES["dwell"]}, ITEMS)
    assert torch.equal(some[..., :8], nothing[..., :8])
    assert not torch.equal(some[..., 8:16], nothing[..., 8:16])


def test_missing_values_leave_finite_gradients() -> None:
    encoder = EventFeatureEncoder(COLUMNS)
    holes = {
        "dwell": torch.tensor([[torch.nan, 1.0, torch.inf, -3.0]]),
        "scene": VALUES["scene"] * torch.tensor([0.0, 1.0, torch.nan, 1.0])[:, None],
    }
    encoder(holes, ITEMS).square().sum().backward()
    gradients = [weight.grad for weight in encoder.parameters() if weight.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_code_that_training_never_had_is_the_unknown_one() -> None:
    encoder = EventFeatureEncoder(COLUMNS[:1]).eval()
    codes = torch.tensor([[2, 6, 999, -4]])
    vectors = encoder({"event": codes}, ITEMS)[0]
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)


def test_numbers_are_standardised_and_cannot_be_too_large() -> None:
    encoder = EventFeatureEncoder(COLUMNS[1:2]).eval()
    typical = float(np.expm1(2.0))  # the mean in the logarithm: the middle bin
    middle = encoder({"dwell": torch.full((1, 4), typical)}, ITEMS)[0, 0]
    weights = torch.softmax(-torch.arange(-5.0, 6.0).square(), 0)
    torch.testing.assert_close(middle, weights @ encoder.encoders[0].weight, atol=1e-4, rtol=1e-4)
    far = encoder({"dwell": torch.tensor([[1e6, 1e9, 1e12, 1e30]])}, ITEMS)[0]
    torch.testing.assert_close(far[0], far[3], rtol=0, atol=1e-6)


def test_wrong_shapes_and_types_are_refused() -> None:
    encoder = EventFeatureEncoder(COLUMNS)
    with pytest.raises(SchemaError, match="'event' comes as torch.float32 .* expected: codes of shape"):
        encoder({"event": torch.ones(1, 4)}, ITEMS)
    with pytest.raises(SchemaError, match=r"'scene' comes as .* of shape \[1, 4, 2\]"):
        encoder({"scene": torch.ones(1, 4, 2)}, ITEMS)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_position_sees_the_event_features_up_to_its_own(attention: str) -> None:
    built, before = model(attention=attention), None
    for at in range(3):
        changed = {name: values.clone() for name, values in VALUES.items()}
        changed["event"][0, at], changed["dwell"][0, at], changed["scene"][0, at] = 4 if at != 1 else 5, 99.0, 0.5
        before, after = (built.encode(ITEMS, event_features=values).vectors for values in (VALUES, changed))
        same = [bool(change < 1e-6) for change in (before - after)[0, :3].abs().amax(-1)]
        assert same == ([step < at for step in range(3)] if attention == "causal" else [False] * 3)


def test_padding_and_neighbours_in_the_batch_change_nothing() -> None:
    built = model()
    wide = torch.cat([ITEMS, torch.tensor([[9, 0, 0, 0]])])
    event_features = {name: torch.cat([values, values.flip(1)]) for name, values in VALUES.items()}
    alone = built(ITEMS[:, :3], {name: values[:, :3] for name, values in VALUES.items()})
    torch.testing.assert_close(built(wide, event_features)[:1], alone)


def test_dropout_of_event_features_trains_their_absence() -> None:
    encoder = EventFeatureEncoder(COLUMNS, dropout=0.5).train()
    torch.manual_seed(0)
    items = ITEMS.expand(400, -1)
    with torch.no_grad():
        for absent in encoder.absent:
            absent.fill_(7.0)
    many = {name: values.expand(400, *values.shape[1:]) for name, values in VALUES.items()}
    lost = encoder(many, items).unflatten(-1, (3, 8))[:, 0].eq(7.0).all(-1)  # [session, column]
    assert abs(lost.float().mean(0) - 0.75).max() < 0.08  # half with all others, and half of the rest alone
    assert 0.5 < lost.all(1).float().mean() < 0.7  # .5 + .5 * .125
    torch.testing.assert_close(encoder.eval()(many, items)[:1], encoder(VALUES, ITEMS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.kind)
def test_each_kind_tells_its_values_apart(column: EventColumn) -> None:
    rng = torch.Generator().manual_seed(4)
    classes = torch.randint(0, 3, (64, 1), generator=rng)
    values = {
        "event": classes + 3,
        "dwell": torch.tensor([1.0, 7.0, 40.0])[classes],
        "scene": torch.eye(3)[classes] + 0.1 * torch.rand(64, 1, 3, generator=rng),
    }
    torch.manual_seed(0)
    event_features = EventFeatures(EventFeatureEncoder([column]), 3)
    optimizer = torch.optim.Adam(event_features.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(event_features(values, classes).flatten(0, 1), classes.flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert (event_features(values, classes).argmax(-1) == classes).all()


def test_statistics_come_from_training() -> None:
    values = {
        "event": np.array([3, 5, 4, 3], np.int32),
        "dwell": np.array([0.0, 3.0, 8.0, 1000.0], np.float32),
        "scene": np.array([[3, 4, 0], [0, 0, 0], [0, 0, 5], [6, 8, 0]], np.float32),
    }
    raw = tuple(dataclasses.replace(column, size=0, log=False, mean=0.0, std=1.0) for column in COLUMNS)
    event, dwell, scene = fit_event_columns(raw, Sessions(np.arange(3, 7), np.array([0, 2, 4]), values))
    assert event.size == 6
    logs = np.log1p(values["dwell"])
    assert (dwell.log, dwell.mean, dwell.std) == (True, pytest.approx(logs.mean()), pytest.approx(logs.std()))
    assert scene.size == 3
    assert scene.std == pytest.approx(np.sqrt((25 + 25 + 100) / 3))  # lengths 5, 5 and 10; zeros are no vector


def test_serving_moves_event_features_with_their_items() -> None:
    rows = np.array([[3, 2, 4, 0, 5], [1, 0, 0, 0, 0]])
    event_features = {"event": np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 9]]), "scene": np.arange(10.0).reshape(2, 5, 1)}
    moved = compact_event_features(event_features, rows, 2)
    assert moved["event"].tolist() == [[3, 5], [0, 0]]
    assert moved["scene"][..., 0].tolist() == [[2.0, 4.0], [0.0, 0.0]]
