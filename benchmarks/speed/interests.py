"""Interest discovery for large catalogues: time, peak memory, and error of the grouped nearest-centroid search.

    python -m benchmarks.speed.interests                                       # 1M embeddings x 300 into 100k interests
    python -m benchmarks.speed.interests --tokens 100000 --clusters 10000      # a tenth of each
    python -m benchmarks.speed.interests --latent 0                            # the hardest: no direction matters

Synthetic embeddings resemble real ones: many kinds of items in a few shared directions, and noise, so that an embedding
has near neighbours. The first discovery starts from random embeddings, later ones from the previous centroids. For some
embeddings the result is compared with the true nearest centroids.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import gemm_rate, peak_mib, report, reset_peak
from missrec_t4r.model.clustering import COMPARED_AT_MOST, PROBED_GROUPS, kmeans, nearest_in_groups, nearest_of_all

_ROWS_AT_ONCE = 1 << 16
_SEED = 2020


def main() -> None:
    """Discover interests, repeat after a small change, and measure the error of the search."""
    options = _options()
    tokens = make_tokens(options.tokens, options.dim, options.latent, options.kinds)
    held, started, spent = reset_peak(), time.perf_counter(), time.process_time()
    centroids, labels = kmeans(tokens, options.clusters, seed=_SEED, passes=options.passes)
    first, first_cpu = time.perf_counter() - started, time.process_time() - spent
    tokens += 0.02 * torch.randn(options.dim)  # as after an epoch: near to what was clustered
    started, spent = time.perf_counter(), time.process_time()
    centroids, labels = kmeans(tokens, options.clusters, seed=_SEED, start=centroids, passes=options.passes)
    warm, warm_cpu = time.perf_counter() - started, time.process_time() - spent
    peak = peak_mib()
    compared = options.tokens * options.clusters
    payload = {
        "tokens": options.tokens,
        "dim": options.dim,
        "clusters": options.clusters,
        "latent": options.latent,
        "kinds": options.kinds,
        "passes": options.passes,
        "search": "all" if compared <= COMPARED_AT_MOST else f"{PROBED_GROUPS} groups",
        "first_s": round(first, 1),
        "warm_s": round(warm, 1),
        "first_cpu_s": round(first_cpu, 1),  # what counts on a machine that others use
        "warm_cpu_s": round(warm_cpu, 1),
        "before_mib": round(held),
        "peak_mib": round(peak),
        "square_matrix_mib": round(options.tokens**2 * 4 / 2**20),
        "empty_clusters": int((labels.bincount(minlength=options.clusters) == 0).sum()),
        "gemm_gflop_s": round(gemm_rate(), 1),
        "judged": judged(tokens, centroids, options.judged),
    }
    report(f"interests-{options.tokens}" + ("" if options.latent else "-isotropic"), payload, options.out)


def judged(tokens: Tensor, centroids: Tensor, n_judged: int) -> dict[str, Any]:
    """Return recall of the true nearest centroid and relative distance of the grouped search, for some embeddings."""
    some = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:n_judged]]
    started = time.perf_counter()
    exact, distance = nearest_of_all(some, centroids)
    seconds = time.perf_counter() - started
    found, near = nearest_in_groups(some, centroids)
    return {
        "tokens": len(some),
        "found": round(float((exact == found).float().mean()), 4),
        "squared_distance_ratio": round(float(near.sum() / distance.sum()), 5),
        "exact_s_per_pass": round(seconds * len(tokens) / len(some), 1),
    }


def make_tokens(n_tokens: int, dim: int, latent: int, kinds: int) -> Tensor:
    """Return [token, dim]: ``kinds`` of items in ``latent`` shared directions, with noise; 0: noise alone."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.empty(n_tokens, dim)
    directions = torch.randn(max(latent, 1), dim, generator=draw) / max(latent, 1) ** 0.5
    centres = torch.randn(kinds, max(latent, 1), generator=draw)
    for start in range(0, n_tokens, _ROWS_AT_ONCE):
        rows = tokens[start : start + _ROWS_AT_ONCE]
        rows.normal_(generator=draw)
        if latent:
            kind = centres[torch.randint(kinds, (len(rows),), generator=draw)]
            place = kind + 0.5 * torch.randn(len(rows), latent, generator=draw)
            rows.mul_(0.1).addmm_(place, directions)
    return tokens


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Interest discovery for large catalogues.")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=300)
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--latent", type=int, default=32, help="directions in which tokens differ; 0 for all alike")
    parser.add_argument("--kinds", type=int, default=2_000)
    parser.add_argument("--passes", type=int, default=5, help="as published")
    parser.add_argument("--judged", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
