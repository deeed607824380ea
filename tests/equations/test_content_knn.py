"""The content-kNN term (E19) against a reference in plain Python, and what it may not do."""

import numpy as np
import pytest
import torch

from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings, ContentKNNTerm
from tests.equations.reference import FIRST_ITEM, Array

N_ROWS = FIRST_ITEM + 9
SETTINGS = ContentKNNSettings(weight=0.5, decay=0.8)
SESSIONS = [[4, 7, 4, 9], [11, 3], [6]]


def catalogue(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    presence = torch.ones(2, N_ROWS, dtype=torch.bool)
    presence[:, :FIRST_ITEM] = False
    presence[1, [4, 5, 10]] = False
    presence[0, 5] = False  # an item without any content
    presence[0, 6] = False
    tables = {"text": torch.rand(N_ROWS, 6, generator=generator), "image": torch.rand(N_ROWS, 4, generator=generator)}
    return {name: table * presence[m].unsqueeze(1) for m, (name, table) in enumerate(tables.items())}, presence


def fitted(n_alike: int) -> ContentKNNTerm:
    content_knn = ContentKNNTerm(N_ROWS, n_alike).double()
    vectors, presence = catalogue()
    content_knn.fit({name: table.double() for name, table in vectors.items()}, presence)
    content_knn.choose(SETTINGS)
    return content_knn


def reference(session: list[int], n_alike: int) -> Array:
    vectors, presence = catalogue()
    tables, here = [table.double().numpy() for table in vectors.values()], presence.numpy()
    centred = [table - table[mask].mean(0) for table, mask in zip(tables, here, strict=True)]

    def similarity(j: int, i: int) -> float | None:
        shared = [m for m in range(len(tables)) if here[m, i] and here[m, j]]
        cosines = [
            centred[m][i] @ centred[m][j] / (np.linalg.norm(centred[m][i]) * np.linalg.norm(centred[m][j]))
            for m in shared
        ]
        return float(np.mean(cosines)) if cosines else None

    term = np.zeros(N_ROWS)
    for j in range(FIRST_ITEM, N_ROWS):
        alike = {i: similarity(j, i) for i in range(FIRST_ITEM, N_ROWS) if i != j}
        nearest = sorted(((s, i) for i, s in alike.items() if s is not None), reverse=True)[:n_alike]
        total = sum(np.exp(5 * s) for s, _ in nearest)
        for s, i in nearest:
            for age, item in enumerate(reversed(session)):
                term[j] += (item == i) * SETTINGS.weight * SETTINGS.decay**age * np.exp(5 * s) / total
    return term


@pytest.mark.parametrize("n_alike", [1, 3, 6])
def test_similar_items(n_alike: int) -> None:
    item_ids = torch.tensor([session + [0] * (5 - len(session)) for session in SESSIONS])
    found = fitted(n_alike)(item_ids).numpy()
    expected = np.stack([reference(session, n_alike) for session in SESSIONS])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (found[0] > 0).any()


def test_the_lists_are_found_again_after_loading() -> None:
    first, second = fitted(3), ContentKNNTerm(N_ROWS, 3).double()
    second.load_state_dict(first.state_dict())
    item_ids = torch.tensor(SESSIONS[:1])
    assert torch.equal(first(item_ids), second(item_ids))


def test_a_new_item_leaves_all_other_scores_alone() -> None:
    old = fitted(3)
    larger = ContentKNNTerm(N_ROWS + 1, 3).double()
    larger.alike[:N_ROWS], larger.likeness[:N_ROWS] = old.alike, old.likeness
    larger.alike[N_ROWS, 0], larger.likeness[N_ROWS, 0] = 7, 1.0
    larger.index()
    larger.choose(SETTINGS)
    item_ids = torch.tensor(SESSIONS[:1])
    torch.testing.assert_close(larger(item_ids)[:, :N_ROWS], old(item_ids), rtol=0, atol=1e-12)
    assert larger(item_ids)[0, N_ROWS].item() == pytest.approx(SETTINGS.weight * SETTINGS.decay**2)
