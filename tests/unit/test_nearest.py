"""Grouped nearest-centroid search: exact with all groups, approximate with some, and its effect on k-means."""

import pytest
import torch
from torch import Tensor

from missrec_t4r.model.clustering import kmeans, nearest_in_groups, nearest_of_all


def _shop(n_points: int, n_kinds: int) -> Tensor:
    """Points in clusters, like modality embeddings of products."""
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randn(n_kinds, 12, generator=draw)
    return kinds[torch.randint(n_kinds, (n_points,), generator=draw)] + 0.3 * torch.randn(n_points, 12, generator=draw)


def test_the_search_of_all_groups_is_exact() -> None:
    points = _shop(400, 30)
    centroids = points[:50]
    expected = torch.cdist(points, centroids).min(1)
    for labels, distance in (
        nearest_of_all(points, centroids),
        nearest_in_groups(points, centroids, probed=1000),
    ):
        assert torch.equal(labels, expected.indices)
        torch.testing.assert_close(distance, expected.values.square(), rtol=1e-4, atol=1e-4)


def test_the_search_of_some_groups_finds_most_and_returns_true_distances() -> None:
    points = _shop(3000, 60)
    centroids = points[:400]
    exact, _ = nearest_of_all(points, centroids)
    labels, distance = nearest_in_groups(points, centroids, probed=5)
    assert (labels == exact).float().mean() > 0.97
    torch.testing.assert_close(distance, (points - centroids[labels]).square().sum(1), rtol=1e-3, atol=1e-3)
    one, _ = nearest_in_groups(points, centroids, probed=1)
    assert (one == exact).float().mean() < 0.97  # it is a search, after all


def test_large_vocabularies_are_clustered_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    points = _shop(2000, 40)

    def spread() -> tuple[float, Tensor]:
        centroids, labels = kmeans(points, 200, seed=1)
        assert labels.bincount(minlength=200).min() > 0
        return float((points - centroids[labels]).square().sum()), labels

    exact, _ = spread()
    monkeypatch.setattr("missrec_t4r.model.clustering.COMPARED_AT_MOST", 100_000)
    near, labels = spread()
    assert near < 1.03 * exact
    assert torch.equal(labels, spread()[1])
