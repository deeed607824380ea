"""The item-kNN term (E18) against the reference, and what it may not do."""

import numpy as np
import pytest
import torch

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings, ItemKNNTerm
from tests import shop
from tests.equations.reference import FIRST_ITEM
from tests.equations.reference_item_knn import item_knn_term

TRAINING = [shop.rows([*session, target]) for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)]
N_ROWS = FIRST_ITEM + len(shop.ITEMS)
SETTINGS = ItemKNNSettings(weight=0.5, decay=0.8, power=0.3)
"""Powers of the decay are taken in single precision, hence 1e-6 below."""


def fitted(n_neighbours: int, window: int, *, directed: bool = False) -> ItemKNNTerm:
    term = ItemKNNTerm(N_ROWS, n_neighbours).double()
    term.fit(Sessions.from_lists(TRAINING), window, directed=directed)
    return term


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("n_neighbours", [1, 3, 20])
def test_item_knn_term(n_neighbours: int, window: int, directed: bool) -> None:
    fit = fitted(n_neighbours, window, directed=directed)
    fit.choose(SETTINGS)
    found = fit(shop.batch(padding=1)).numpy()
    parts = {"window": window, "directed": directed, "n_neighbours": n_neighbours, **SETTINGS._asdict()}
    expected = [item_knn_term(shop.rows(session), TRAINING, N_ROWS, **parts) for session in shop.SESSIONS]
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-6)
    assert (found > 0).any(1).sum() >= 5


def test_item_knn_term_by_hand() -> None:
    # mug kettle teapot mug pan: one pair; kettle kettle teapot: two pairs; together C = 3
    [kettle, teapot] = shop.rows(["kettle", "teapot"])
    fit = fitted(20, 2)
    fit.choose(ItemKNNSettings(weight=1.0, decay=1.0, power=0.5))
    found = fit(torch.tensor([[kettle]]))[0]
    # kettle occurs 4 times, teapot 2 times
    assert found[teapot].item() == pytest.approx(3 / ((4 + 5) * (2 + 5)) ** 0.5)


def test_the_term_ranks_and_never_trains() -> None:
    net = shop.model(shop.default(n_neighbours=4))
    terms_of(net).item_knn.fit(Sessions.from_lists(TRAINING), 50)
    session, item_ids = net(shop.batch()).detach(), shop.batch()
    plain = net.score(session, net.candidates(), item_ids)
    candidates = net.candidates()
    trained = net.train().score(session, candidates, item_ids)
    net.eval()
    terms_of(net).item_knn.choose(SETTINGS)
    parts = {"window": 50, "directed": False, "n_neighbours": 4, **terms_of(net).item_knn.chosen._asdict()}
    expected = [item_knn_term(shop.rows(session), TRAINING, N_ROWS, **parts) for session in shop.SESSIONS]
    change = net.score(session, net.candidates(), item_ids) - plain
    np.testing.assert_allclose(change[:, 3:].detach().numpy(), np.stack(expected)[:, 3:], rtol=0, atol=1e-6)
    assert torch.equal(net.train().score(session, candidates, item_ids), trained)


@pytest.mark.gpu
def test_a_term_on_a_gpu_is_fitted_as_on_the_cpu() -> None:
    here, there = ItemKNNTerm(N_ROWS, 3), ItemKNNTerm(N_ROWS, 3).cuda()
    for term in (here, there):
        term.fit(Sessions.from_lists(TRAINING), 50)
    for name, buffer in here.named_buffers():
        assert torch.equal(buffer, there.get_buffer(name).cpu()), name
