"""Training speed of our recipes, the authors' release and Transformers4Rec's XLNet, in one run for fair ratios.

    python -m benchmarks.speed.train --data path/to/amazon_scientific --release path/to/MM23-MISSRec
    make bench-train DATA=path/to/amazon_scientific RELEASE=path/to/MM23-MISSRec

Published sizes (width 300, batches of 512 prefixes, sessions of up to 50). Every contestant runs in a new process,
with one thread and with all cores, round after round; a figure is the median over rounds. The headline is that of all
cores. Without ``--data`` a shop of the same size is generated; without ``--release`` its figures are null.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import gemm_rate, peak_mib, report, run_as_command

NEED_RELEASE = ("release", "release_unpadded")
NAMES = ("paper", "default", "default_fp32", *NEED_RELEASE, "t4r_xlnet")


def main() -> None:
    """Measure one contestant (``--measure``), or run all of them and write the result."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--data", type=Path, help="data folder; a generated shop of the same size without")
    options.add_argument("--release", type=Path, help="checkout of gimpong/MM23-MISSRec")
    options.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, _cores()}), help="threads to measure with"
    )
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="contestants")
    options.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.data, chosen.release)))
    else:
        compare(chosen)


def measure(name: str, data: Path | None, release: Path | None) -> dict[str, Any]:
    """Measure one contestant in this process."""
    from benchmarks import parity_data
    from benchmarks.speed.contestants import CONTESTANTS

    before = {dtype: gemm_rate(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    found = CONTESTANTS[name](*parity_data.load(data), release)
    dtype = torch.bfloat16 if found.get("precision") == "bf16" else torch.float32
    rate = (before[dtype] + gemm_rate(dtype=dtype)) / 2
    found |= {"peak_mib": peak_mib(), "gemm_gflops": rate, "threads": torch.get_num_threads()}
    if "flops_per_prefix" in found:
        found["gemm_share"] = found["flops_per_prefix"] * found["prefixes_per_s"] / 1e9 / found["gemm_gflops"]
    return found


def compare(options: argparse.Namespace) -> None:
    """Run every contestant, round after round, and write the result."""
    from benchmarks import parity_data
    from benchmarks.release.loading import require_release

    if options.data:
        parity_data.require(options.data)
    if options.release:
        require_release(options.release)
    names = [name for name in options.only if options.release or name not in NEED_RELEASE]
    runs: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for threads in options.threads:
            for name in names:
                found = _child(name, threads, options)
                runs.append({"round": number, "contestant": name, **found})
                print(f"{name:>16}  {threads} threads  {found['prefixes_per_s']:>8,.0f} prefixes/s", file=sys.stderr)
    by_threads = {str(threads): _medians(runs, names, threads) for threads in options.threads}
    best = by_threads[str(max(options.threads))]

    def of(name: str, key: str = "prefixes_per_s") -> float | None:
        return best.get(name, {}).get(key)

    report(
        "train-speed",
        {
            "data": options.data.name if options.data else "generated",
            "paper_prefixes_per_s": of("paper"),
            "prefixes_per_s": of("default"),
            "release_prefixes_per_s": of("release"),
            "release_unpadded_prefixes_per_s": of("release_unpadded"),
            "t4r_xlnet_prefixes_per_s": of("t4r_xlnet"),
            "gemm_share": of("default", "gemm_share"),
            "peak_mib": of("default", "peak_mib"),
            "paper_over_release": _ratio(of("paper"), of("release")),
            "paper_over_release_unpadded": _ratio(of("paper"), of("release_unpadded")),
            "default_over_release": _ratio(of("default"), of("release")),
            "default_fp32_over_release": _ratio(of("default_fp32"), of("release")),
            "default_over_t4r_xlnet": _ratio(of("default"), of("t4r_xlnet")),
            "per_cpu_second": {name: of(name, "prefixes_per_cpu_s") for name in names},
            "users_per_s": of("default", "users_per_s"),
            "paper_users_per_s": of("paper", "users_per_s"),
            "release_users_per_s": of("release", "users_per_s"),
            "threads": by_threads,
            "runs": runs,
        },
    )


def _child(name: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed.train", "--measure", name]
    for key in ("data", "release"):
        if getattr(options, key):
            command += [f"--{key}", str(getattr(options, key))]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    if completed.returncode:
        raise SystemExit(f"{name} failed:\n{completed.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(completed.stdout.strip().splitlines()[-1])
    return found


def _medians(runs: list[dict[str, Any]], names: list[str], threads: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in names:
        mine = [run for run in runs if run["contestant"] == name and run["threads"] == threads]
        keys = [key for key, value in mine[0].items() if isinstance(value, float)]
        found[name] = {key: statistics.median(run[key] for run in mine) for key in keys}
    return found


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    run_as_command(main)
