"""What rare items gain (E21), against a reference in plain Python, and what it may not do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.rare_items import RareItemTerm
from missrec_t4r.runs.extend import load_strictly
from missrec_t4r.runs.run_folder import load_tensors, save_tensors
from tests import shop
from tests.equations.reference import FIRST_ITEM, Array

TRAINING = [shop.rows([*session, target]) for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)]
SETTINGS = torch.tensor([[0.5, 0.3, 0.2], [0.1, -0.2, 0.05]])  # content weights and offsets; cold, 1 or 2, 3 or 4


def counts() -> Array:
    return np.bincount(np.concatenate(TRAINING), minlength=len(shop.ITEMS) + FIRST_ITEM)


def net(modalities: tuple[float, float] = (1.0, 1.0), *, cold: bool = True, itself: bool = False) -> MISSRec:
    model = shop.model(shop.default(n_neighbours=6, n_similar_items=0, history_bias=False)).double().eval()
    item_knn = terms_of(model).item_knn
    item_knn.fit(Sessions.from_lists(TRAINING), 50)
    term = RareItemTerm(model.item_encoder, item_knn, cold=cold, itself=itself).double()
    term.fit()
    term.choose(SETTINGS, modalities)
    model.terms["rare_items"] = term
    return model


def added(model: MISSRec, sessions: torch.Tensor) -> Array:
    return model.terms(torch.zeros(len(sessions), model.item_encoder.n_rows).double(), sessions).detach().numpy()


def reference(session: list[int], row: int, modalities: tuple[float, float], *, itself: bool) -> float:
    content, count = shop.catalogue().modalities, int(counts()[row])
    if count >= 5 or (row in session and not itself):
        return 0.0
    group, cosines = (0, 1, 1, 2, 2)[count], []
    for name, chosen in zip(content, modalities, strict=True):
        if not chosen or not content[name].present[row]:
            continue
        vectors, here = content[name].vectors.astype(np.float64), content[name].present
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        around = vectors - vectors[(counts() > 0) & here].mean(0)
        unit = around / np.linalg.norm(around, axis=1, keepdims=True) * here[:, None]
        mean = sum(0.7**age * unit[item] for age, item in enumerate(reversed(session)))
        if np.any(mean):
            cosines.append(mean @ unit[row] / np.linalg.norm(mean))
    return float(SETTINGS[0, group]) * float(np.mean(cosines or [0.0])) + float(SETTINGS[1, group])


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("modalities", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_rare_items(modalities: tuple[float, float], itself: bool) -> None:
    sessions = shop.batch(padding=1)
    found = added(net(modalities, itself=itself), sessions)[:, FIRST_ITEM:]
    rows = range(FIRST_ITEM, FIRST_ITEM + len(shop.ITEMS))
    expected = [
        [reference(shop.rows(session), row, modalities, itself=itself) for row in rows] for session in shop.SESSIONS
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert {int(count) for count in counts()[FIRST_ITEM:]} >= {0, 1, 3, 5}, "every group, and an item without the term"


def test_cold_items_are_left_to_the_cold_start_term() -> None:
    plate = shop.row("plate")
    assert added(net(), shop.batch())[:, plate].all()
    assert not added(net(cold=False), shop.batch())[:, plate].any()


def test_an_added_item_changes_no_other_score() -> None:
    """The centres are kept: the same term over a catalogue whose cold item has other content."""
    model, sessions = net(), shop.batch()
    before, plate = added(model, sessions), shop.row("plate")
    model.item_encoder.vectors.get_buffer("text")[plate] *= -3.0
    model.terms.refresh()
    after = added(model, sessions)
    others = np.arange(before.shape[1]) != plate
    assert np.array_equal(before[:, others], after[:, others])
    assert (before[:, plate] != after[:, plate]).any()


def test_settings_are_kept_with_the_weights_and_earlier_weights_load(tmp_path: Path) -> None:
    config = shop.default(n_neighbours=6, n_similar_items=0, rare_item_cost=0.01)
    model, sessions = shop.model(config).double().eval(), shop.batch()
    terms_of(model).item_knn.fit(Sessions.from_lists(TRAINING), 50)
    terms_of(model).rare_items.fit()
    terms_of(model).rare_items.choose(SETTINGS, (1.0, 0.0))
    save_tensors(tmp_path / "weights", model.state_dict())
    weights = load_tensors(tmp_path / "weights")
    again = shop.model(config).double().eval()
    load_strictly(again, weights, "here")
    assert np.array_equal(added(again, sessions), added(model, sessions))
    earlier = {name: tensor for name, tensor in weights.items() if "rare_items" not in name}
    fresh = shop.model(config).double().eval()
    load_strictly(fresh, earlier, "an earlier version's")
    assert not terms_of(fresh).rare_items.active
