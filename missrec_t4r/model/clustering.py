"""Clustering for interest discovery (E3): k-means and density peaks, in chunks so that no square matrix is stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PLUS_PLUS_LIMIT = 1 << 25
"""Distances (points x clusters) up to which k-means++ draws the first centroids; beyond, a uniform sample."""
_NEIGHBOURS = 5
"""k of the density-peaks estimate, the default of the authors' function."""
_GROUP_PASSES = 3
"""Passes that group the centroids of very large vocabularies."""


def kmeans(
    points: Tensor, n_clusters: int, *, seed: int, start: Tensor | None = None, passes: int = 5
) -> tuple[Tensor, Tensor]:
    """Cluster by Lloyd's algorithm, from given centroids where there are some (E3).

    Parameters
    ----------
    points : Tensor [point, dim]
    n_clusters : int
        If there are no more points than clusters, every point is a cluster of its own.
    seed : int
        Draws the first centroids.
    start : Tensor [cluster, dim], optional
        Centroids of an earlier run; k-means++ otherwise.
    passes : int
        Passes over the points (paper: 5).

    Returns
    -------
    centroids : Tensor [cluster, dim]
    labels : Tensor [point], int64
        No cluster is empty if there are enough points: empty ones move to the points farthest from their centroid.
    """
    if len(points) <= n_clusters:
        centroids = points.new_zeros(n_clusters, points.shape[1])
        centroids[: len(points)] = points
        return centroids, torch.arange(len(points), device=points.device)
    centroids = _first_centroids(points, n_clusters, seed) if start is None else start.clone()
    labels, distance = _assign(points, centroids)
    for _ in range(passes):
        centroids, labels = _update(points, centroids, labels, distance)
        labels, distance = _assign(points, centroids)
    return _update(points, centroids, labels, distance)  # means of the final labels, none of them empty


def density_peaks(points: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks with k nearest neighbours, DPC-KNN (E3b; Du, Ding and Jia, 2016).

    Quadratic in time, so for small catalogues; linear in memory.

    Parameters
    ----------
    points : Tensor [point, dim]
    n_clusters : int

    Returns
    -------
    centroids : Tensor [cluster, dim]
        Means of the clusters.
    labels : Tensor [point], int64
    """
    if len(points) <= n_clusters:
        return kmeans(points, n_clusters, seed=0)
    k = min(_NEIGHBOURS, len(points))
    scale = points.shape[1] ** -0.5
    pieces = chunks(len(points), len(points))
    nearest = torch.cat([(torch.cdist(points[c], points) * scale).topk(k, largest=False).values for c in pieces])
    density = torch.exp(-(nearest**2).mean(1))  # [point]
    rank = torch.empty_like(density, dtype=torch.int64)
    rank[density.argsort(descending=True, stable=True)] = torch.arange(len(points), device=points.device)
    gap = torch.cat([_gap_to_denser(torch.cdist(points[c], points) * scale, rank[c], rank) for c in pieces])
    centres = (density * gap).topk(n_clusters).indices
    labels, _ = _assign(points, points[centres])
    labels[centres] = torch.arange(n_clusters, device=points.device)
    return _means(points, labels, points[centres]), labels


def _gap_to_denser(distances: Tensor, rank: Tensor, all_ranks: Tensor) -> Tensor:
    """Distance to the nearest denser point; the densest point gets its largest distance."""
    denser = all_ranks.unsqueeze(0) < rank.unsqueeze(1)
    nearest = distances.masked_fill(~denser, torch.inf).amin(1)
    return torch.where(torch.isinf(nearest), distances.amax(1), nearest)


def _first_centroids(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(points) * n_clusters > _PLUS_PLUS_LIMIT:
        return points[torch.randperm(len(points), generator=generator)[:n_clusters].to(points.device)]
    draws = torch.rand(n_clusters, generator=generator, dtype=torch.float64).to(points.device)
    chosen = torch.zeros(n_clusters, dtype=torch.int64, device=points.device)
    chosen[0] = (draws[0] * len(points)).long()
    norms = points.square().sum(1)
    distance = torch.full((len(points),), torch.inf, device=points.device, dtype=points.dtype)
    for index in range(1, n_clusters):  # k-means++: far points are likelier; each draw depends on the last
        latest = chosen[index - 1]
        to_latest = (norms - 2 * (points @ points[latest]) + norms[latest]).clamp_min(0)
        distance = torch.minimum(distance, to_latest)
        distance[latest] = 0
        weight = distance.double().cumsum(0)
        chosen[index] = torch.searchsorted(weight, draws[index] * weight[-1]).clamp_max(len(points) - 1)
    return points[chosen]


def _update(points: Tensor, centroids: Tensor, labels: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of the clusters and the labels, by which none is empty."""
    labels = _fill_empty(len(centroids), labels, distance)
    return _means(points, labels, centroids), labels


def _fill_empty(n_clusters: int, labels: Tensor, distance: Tensor) -> Tensor:
    """Give each empty cluster the point that is farthest from its centroid and not alone in its cluster."""
    counts = torch.bincount(labels, minlength=n_clusters)
    empty = (counts == 0).nonzero().flatten()
    if not len(empty):
        return labels
    order = distance.argsort(descending=True, stable=True)
    by_cluster, inverse = labels[order].sort(stable=True)
    start = torch.searchsorted(by_cluster, by_cluster)
    rank = torch.arange(len(labels), device=labels.device) - start  # 0: the farthest point of its cluster
    spare = torch.zeros_like(labels, dtype=torch.bool)
    spare[inverse] = rank < counts[by_cluster] - 1  # the nearest point of every cluster stays
    moved = order[spare][: len(empty)]
    labels = labels.clone()
    labels[moved] = empty[: len(moved)]
    return labels


def _means(points: Tensor, labels: Tensor, fallback: Tensor) -> Tensor:
    counts = torch.bincount(labels, minlength=len(fallback)).unsqueeze(1)
    sums = torch.zeros_like(fallback).index_add_(0, labels, points)
    return torch.where(counts > 0, sums / counts.clamp_min(1), fallback)


def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of every point (a near one beyond `COMPARED_AT_MOST`) and its squared distance."""
    if len(points) * len(centroids) <= COMPARED_AT_MOST:
        return nearest_of_all(points, centroids)
    return nearest_in_groups(points, centroids)


# Nearest centroid of every point: all compared, or in groups where the comparisons would take minutes

COMPARED_AT_MOST = 1 << 31
"""Comparisons (points x centroids) up to which all are made: about twenty seconds on a core."""
PROBED_GROUPS = 16
"""Groups whose centroids a point is compared with."""
_CHUNK_ELEMENTS = 1 << 24
"""Entries of one block of comparisons: 64 MiB in float32."""


def nearest_of_all(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of every point, int64, and the squared distance to it.

    Parameters
    ----------
    points : Tensor [point, dim]
    centroids : Tensor [cluster, dim]
    """
    half_norms = centroids.square().sum(1) / 2
    labels = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distance = torch.empty(len(points), dtype=points.dtype, device=points.device)
    for chunk in chunks(len(points), len(centroids)):
        best = (points[chunk] @ centroids.T - half_norms).max(1)
        labels[chunk] = best.indices
        distance[chunk] = (points[chunk].square().sum(1) - 2 * best.values).clamp_min(0)
    return labels, distance


def nearest_in_groups(points: Tensor, centroids: Tensor, probed: int = PROBED_GROUPS) -> tuple[Tensor, Tensor]:
    """Return a near centroid of every point, mostly the nearest, and the squared distance to it.

    Parameters
    ----------
    points : Tensor [point, dim]
    centroids : Tensor [cluster, dim]
    probed : int
        Groups whose centroids a point is compared with; with all of them the result is exact.
    """
    centres, group = kmeans(centroids, math.isqrt(len(centroids) - 1) + 1, seed=0, passes=_GROUP_PASSES)
    probed, half = min(probed, len(centres)), centres.square().sum(1) / 2
    pieces = [points[chunk] for chunk in chunks(len(points), len(centres))]
    near = torch.cat([(piece @ centres.T - half).topk(probed, dim=1).indices for piece in pieces])  # [point, group]
    by_group = near.flatten().argsort(stable=True)
    points_of_group = torch.div(by_group, probed, rounding_mode="floor").split(_sizes(near, len(centres)))
    members = group.argsort(stable=True).split(_sizes(group, len(centres)))
    half_norms = centroids.square().sum(1) / 2
    labels = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    value = torch.full((len(points),), -torch.inf, dtype=points.dtype, device=points.device)
    for own, compared in zip(members, points_of_group):
        if not len(own):
            continue
        in_group, half = centroids[own], half_norms[own]
        for chunk in chunks(len(compared), max(len(own), points.shape[1])):
            rows = compared[chunk]
            best = (points[rows] @ in_group.T - half).max(1)
            nearer = best.values > value[rows]
            labels[rows] = torch.where(nearer, own[best.indices], labels[rows])
            value[rows] = torch.where(nearer, best.values, value[rows])
    return labels, (points.square().sum(1) - 2 * value).clamp_min(0)


def _sizes(labels: Tensor, n_groups: int) -> list[int]:
    sizes: list[int] = torch.bincount(labels.flatten(), minlength=n_groups).tolist()
    return sizes


def chunks(n_rows: int, n_columns: int) -> list[slice]:
    """Return slices of rows whose comparisons with all columns fit into 64 MiB."""
    step = max(_CHUNK_ELEMENTS // max(n_columns, 1), 1)
    return [slice(begin, begin + step) for begin in range(0, n_rows, step)]
