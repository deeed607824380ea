"""Interests: deterministic, none empty, none of missing tokens; their order means nothing, their content does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from missrec_t4r.model.clustering import density_peaks, kmeans
from missrec_t4r.model.interests import InterestTokens
from tests import shop
from tests.properties.cases import CONFIGS, batches, close, model, pad, quick, scores

clusterable = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=4, max_size=30)


@pytest.mark.parametrize("name", CONFIGS)
@quick
@given(chosen=batches, order=st.randoms(use_true_random=False))
def test_the_order_of_interest_tokens_does_not_matter(name: str, chosen: list[list[int]], order: object) -> None:
    net, item_ids = model(name), pad(chosen)
    interests = net.interests(item_ids)
    places = list(range(interests.mask.shape[1]))
    order.shuffle(places)  # type: ignore[attr-defined]
    shuffled = InterestTokens(*(part[:, places] for part in interests[:4]), interests.centroids)
    with torch.no_grad():
        items, item_mask = net.item_encoder(item_ids), item_ids > 2
        found, expected = (net.decoder(items, item_mask, net.encoder(i), i) for i in (shuffled, interests))
    for vectors, right, session in zip(found, expected, chosen, strict=True):
        close(vectors[: len(session)], right[: len(session)])


@pytest.mark.parametrize("algorithm", ["kmeans", "dpc_knn"])
def test_discovery_is_deterministic_and_leaves_the_global_generator_alone(algorithm: str) -> None:
    nets = [shop.model(shop.default(interest_algorithm=algorithm)) for _ in range(2)]
    assert torch.equal(nets[0].interests.assignment, nets[1].interests.assignment)
    assert torch.equal(nets[0].interests.centroids, nets[1].interests.centroids)
    state = torch.get_rng_state()
    nets[0].discover_interests(seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_draws_the_first_centroids() -> None:
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 4)))
    found = [kmeans(points, 20, seed=seed, passes=0)[1] for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@settings(quick, max_examples=50)
@given(points=clusterable, n_clusters=st.integers(1, 30), seed=st.integers(0, 5), warm=st.booleans())
def test_no_cluster_is_empty(points: list[tuple[int, int]], n_clusters: int, seed: int, warm: bool) -> None:
    cloud = torch.tensor(points, dtype=torch.float64)  # a small grid: many points coincide
    n_clusters = min(n_clusters, len(points))
    start = torch.full((n_clusters, 2), 100.0, dtype=torch.float64) if warm else None  # one far place for all
    for centroids, labels in (kmeans(cloud, n_clusters, seed=seed, start=start), density_peaks(cloud, n_clusters)):
        assert sorted(set(labels.tolist())) == list(range(n_clusters))
        for cluster in range(n_clusters):
            close(centroids[cluster], cloud[labels == cluster].mean(0))


@quick
@given(points=clusterable, n_clusters=st.integers(1, 8))
def test_more_passes_never_raise_the_distance_to_the_centroids(points: list[tuple[int, int]], n_clusters: int) -> None:
    cloud = torch.tensor(points, dtype=torch.float64)
    start, costs = cloud[:1].repeat(n_clusters, 1), []
    for passes in (0, 1, 5):
        centroids, labels = kmeans(cloud, n_clusters, seed=0, start=start, passes=passes)
        costs.append(float((cloud - centroids[labels]).square().sum()))
    assert costs[0] + 1e-9 >= costs[1]
    assert costs[1] + 1e-9 >= costs[2]


def test_discovery_starts_from_the_last_centroids() -> None:
    net = shop.model(shop.default())
    before = net.interests.assignment.clone()
    net.discover_interests(seed=99)  # unchanged adapters and a converged start: the seed has nothing to draw
    assert torch.equal(net.interests.assignment, before)


def test_missing_tokens_are_never_clustered() -> None:
    text, image = model("default").interests.assignment
    assert text[shop.row("rug")] == 0
    assert image[shop.row("voucher")] == 0
    assert not text[:3].any()
    assert not image[:3].any()
    assert int((text > 0).sum() + (image > 0).sum()) == 2 * len(shop.ITEMS) - 2


def test_no_gradient_reaches_the_centroids() -> None:
    vocabulary = model("paper").interests
    assert not list(vocabulary.parameters())
    assert not vocabulary(pad([[3, 4]])).tokens.requires_grad


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.has_interests])
def test_shuffling_the_assignments_changes_predictions(name: str) -> None:
    net, item_ids = shop.model(CONFIGS[name]), shop.batch()
    before = scores(net, item_ids)
    real = net.interests.assignment > 0
    generator = torch.Generator().manual_seed(4)
    shuffled = net.interests.assignment[real][torch.randperm(int(real.sum()), generator=generator)]
    net.interests.assignment[real] = shuffled
    change = (scores(net, item_ids) - before)[:, 3:].abs().amax(1)
    assert (change > 1e-3).sum() >= 4, "at least four of six sessions see it"
