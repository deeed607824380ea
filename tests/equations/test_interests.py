"""Interest discovery and the session's set of interests."""

import math

import numpy as np
import pytest
import torch

from missrec_t4r.model.clustering import density_peaks, kmeans
from missrec_t4r.model.interests import InterestVocabulary
from tests import shop
from tests.equations import reference as ref


@pytest.fixture
def points() -> torch.Tensor:
    """Thirty points around three places of the plane, in no order."""
    rng = np.random.default_rng(5)
    return torch.from_numpy(
        np.repeat([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], 10, 0)[rng.permutation(30)] + rng.normal(size=(30, 2))
    )


@pytest.mark.parametrize("passes", [0, 1, 5])
def test_kmeans_steps(points: torch.Tensor, passes: int) -> None:
    start = points[:3].clone()
    centroids, labels = kmeans(points, 3, seed=0, start=start, passes=passes)
    expected = start.numpy()
    for _ in range(passes + 1):
        nearest, expected = ref.kmeans_step(points.numpy(), expected)
    np.testing.assert_array_equal(labels.numpy(), nearest)
    np.testing.assert_allclose(centroids.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_clusters", [1, 3, 12])
def test_density_peaks(points: torch.Tensor, n_clusters: int) -> None:
    centroids, labels = density_peaks(points, n_clusters)
    expected = ref.dpc_knn(points.numpy(), n_clusters, n_neighbours=5)
    np.testing.assert_array_equal(labels.numpy(), expected.assignment)
    np.testing.assert_allclose(centroids.numpy(), expected.centroids, rtol=0, atol=1e-10)


def test_number_of_interests() -> None:
    # 12 items in 2 modalities are 24 tokens, 22 of them real; ceil(.3 * 24) = 8 published, ceil(.3 * 22) = 7 masked
    assert len(shop.model(shop.paper()).interests.centroids) - 1 == 8
    assert len(shop.model(shop.default()).interests.centroids) - 1 == 7


@pytest.mark.parametrize("algorithm", ["kmeans", "dpc_knn"])
@pytest.mark.parametrize("config", [shop.paper, shop.default])
def test_a_centroid_is_the_mean_of_its_tokens(config: type, algorithm: str) -> None:
    model = shop.model(config(interest_algorithm=algorithm))
    tokens, vocabulary = model.item_encoder.catalogue(), model.interests
    assert not vocabulary.assignment[~tokens.mask].any()
    assert (vocabulary.assignment[tokens.mask] > 0).all()
    for interest in range(1, len(vocabulary.centroids)):
        members = tokens.modality[vocabulary.assignment == interest]
        torch.testing.assert_close(vocabulary.centroids[interest], members.mean(0), rtol=0, atol=1e-6)


def test_published_discovery_clusters_missing_modalities_and_ours_does_not() -> None:
    missing = (1, shop.row("voucher"))
    assert shop.model(shop.paper()).interests.assignment[missing] > 0
    assert shop.model(shop.default()).interests.assignment[missing] == 0


@pytest.mark.parametrize("seed", range(5))
def test_sets_of_interests(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = InterestVocabulary(n_interests=6, n_modalities=3, n_rows=15, d_model=2)
    vocabulary.assignment[:, 3:] = torch.from_numpy(rng.integers(0, 7, (3, 12)))  # many share, some have none
    vocabulary.centroids[1:] = torch.arange(1.0, 7.0).unsqueeze(1)
    sessions = [rng.integers(3, 15, rng.integers(0, 8)).tolist() for _ in range(20)]
    rows = torch.tensor([session + [0] * (8 - len(session)) for session in sessions])
    tokens, mask, position, *_ = vocabulary(rows)
    for b, session in enumerate(sessions):
        expected = ref.session_interests(session, vocabulary.assignment.numpy())
        found = {math.floor(t[0]): int(p) for t, p in zip(tokens[b, mask[b]], position[b, mask[b]], strict=True)}
        assert found == expected
        assert int(mask[b].sum()) == len(expected)
        assert list(mask[b]) == sorted(mask[b], reverse=True), "real interests stand at the left"
        assert not tokens[b, ~mask[b]].any()


def test_an_interest_is_placed_where_it_is_first_seen() -> None:
    vocabulary = InterestVocabulary(n_interests=3, n_modalities=2, n_rows=6, d_model=1)
    vocabulary.assignment[:, 3:] = torch.tensor([[2, 3, 1], [2, 1, 0]])  # rows 3, 4, 5 in two modalities
    vocabulary.centroids[1:, 0] = torch.tensor([1.0, 2.0, 3.0])
    tokens, mask, position, chosen, centroids, *_ = vocabulary(torch.tensor([[5, 3, 4, 0], [4, 4, 5, 3]]))
    assert torch.equal(centroids[chosen], tokens)
    assert tokens[..., 0].tolist() == [[1, 2, 3], [3, 1, 2]]
    assert position.tolist() == [[0, 1, 2], [0, 0, 3]]
    assert mask.all()
