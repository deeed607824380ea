"""Nearest centroid of every point: all compared, or in groups where the comparisons would take minutes.

A million points against a hundred thousand centroids in 300 dimensions are 6e13 operations, a quarter of an hour on a
processor core. In groups the centroids are clustered themselves, into about the root of their number; a point looks
into the few groups whose centres are nearest. That is an approximation: a nearest centroid in a group farther off is
missed (how often, on which data: benchmarks/speed/interests.py). The distances returned are those to the centroid
found, always exact. The idea is the inverted file of nearest-neighbour search (Jegou et al., 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

COMPARED_AT_MOST = 1 << 31
"""Comparisons (points x centroids) up to which all are made: about twenty seconds on a core."""
PROBED_GROUPS = 16
"""Groups that a point looks into."""
_CHUNK_ELEMENTS = 1 << 24
"""Entries of one block of comparisons: 64 MiB in float32."""

Cluster = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Points [point, dim] and a number -> that many centroids and every point's label."""


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


def nearest_in_groups(
    points: Tensor, centroids: Tensor, cluster: Cluster, probed: int = PROBED_GROUPS
) -> tuple[Tensor, Tensor]:
    """Return a near centroid of every point, mostly the nearest, and the squared distance to it.

    Parameters
    ----------
    points : Tensor [point, dim]
    centroids : Tensor [cluster, dim]
    cluster : function
        Makes the groups of centroids.
    probed : int
        Groups that a point looks into; with all of them nothing is missed.
    """
    centres, group = cluster(centroids, math.isqrt(len(centroids) - 1) + 1)
    probed = min(probed, len(centres))
    near = torch.cat([_nearest_groups(points[chunk], centres, probed) for chunk in chunks(len(points), len(centres))])
    by_group = near.flatten().argsort(stable=True)
    visitors = torch.div(by_group, probed, rounding_mode="floor").split(_sizes(near, len(centres)))
    members = group.argsort(stable=True).split(_sizes(group, len(centres)))
    half_norms = centroids.square().sum(1) / 2
    labels = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    value = torch.full((len(points),), -torch.inf, dtype=points.dtype, device=points.device)
    for own, guests in zip(members, visitors):
        if len(own):
            for chunk in chunks(len(guests), max(len(own), points.shape[1])):
                _improve(points, centroids[own], half_norms[own], own, guests[chunk], labels, value)
    return labels, (points.square().sum(1) - 2 * value).clamp_min(0)


def _improve(
    points: Tensor, centroids: Tensor, half_norms: Tensor, own: Tensor, guests: Tensor, labels: Tensor, value: Tensor
) -> None:
    """Compare some points with a group's centroids, and note which come nearer than what they had."""
    best = (points[guests] @ centroids.T - half_norms).max(1)
    nearer = best.values > value[guests]
    labels[guests] = torch.where(nearer, own[best.indices], labels[guests])
    value[guests] = torch.where(nearer, best.values, value[guests])


def _nearest_groups(points: Tensor, centres: Tensor, probed: int) -> Tensor:
    return (points @ centres.T - centres.square().sum(1) / 2).topk(probed, dim=1).indices


def _sizes(labels: Tensor, n_groups: int) -> list[int]:
    sizes: list[int] = torch.bincount(labels.flatten(), minlength=n_groups).tolist()
    return sizes


def chunks(n_rows: int, n_columns: int) -> list[slice]:
    """Return stretches of rows whose comparisons with all columns fit into 64 MiB."""
    step = max(_CHUNK_ELEMENTS // max(n_columns, 1), 1)
    return [slice(begin, begin + step) for begin in range(0, n_rows, step)]
