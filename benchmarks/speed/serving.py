"""Latency, throughput, start and memory of the served ensemble, of an empty model and of three Merlin configurations.

    make bench-serving                       an untrained model of d = 300 on 4,385 items, everything in one run
    make bench-serving BUNDLE=bundle/        a trained one; its embeddings also make the large catalogues

One machine, one Triton, one after the other: ours, an empty Python model (what any Python model costs), and the classic
Merlin Systems ensemble with T4R's XLNet in three configurations. Requests come from this process over gRPC.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measure import report
from benchmarks.speed.large_server import run as serve_large
from benchmarks.speed.serving_shop import bundle_of
from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import ITEMS_FILE
from missrec_t4r.serving.client.transports import TritonTransport
from missrec_t4r.serving.load import Arrays, answers_per_second, latency, message
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.repository import write_repository

OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "fallback")
_LENGTH, _TOP_K = 10, 10
_CLIENTS = 16
_CONTENT = 32
"""Width of the content vector that an item of the peer has; it is also measured without, ids alone."""
_FLOOR_CONFIG = """name: "floor" backend: "python" max_batch_size: 64
input [ { name: "x" data_type: TYPE_FP32 dims: [ 10 ] } ] output [ { name: "y" data_type: TYPE_FP32 dims: [ 10 ] } ]
dynamic_batching { } instance_group [ { count: 1 kind: KIND_CPU } ]
"""
_FLOOR_MODEL = """import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        tensors = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", tensor)]) for tensor in tensors]
"""


@contextlib.contextmanager
def connected(url: str, model: str, outputs: Sequence[str]) -> Iterator[Callable[[Arrays], Any]]:
    """Return a function that sends one request."""
    transport = TritonTransport(url, "grpc", 60.0)
    try:
        yield lambda arrays: transport.infer(model, arrays, outputs)
    finally:
        transport.close()


def throughput(url: str, model: str, outputs: Sequence[str], requests: Sequence[Arrays], seconds: float) -> float:
    """Return sessions per second for sixteen clients that each wait for every response."""
    return answers_per_second(url, [message(model, one, outputs) for one in requests], _CLIENTS, seconds)


def ours(bundle: Path, work: Path, seconds: float, threads: int) -> dict[str, Any]:
    """Measure our ensemble: latency, throughput, start and memory."""
    ids = [str(one).encode() for one in pq.read_table(bundle / ITEMS_FILE, columns=["item_id"])["item_id"].to_pylist()]
    rng = np.random.default_rng(0)

    def request(batch: int) -> Arrays:
        chosen = np.array(ids, object)[rng.integers(0, len(ids), (batch, _LENGTH))]
        return {"item_ids": chosen, "length": np.full((batch, 1), _LENGTH, np.int32)}

    write_repository(bundle, work / "ours", threads=threads)
    started = time.perf_counter()
    with LocalTriton(work / "ours") as server:
        result: dict[str, Any] = {"cold_start_s": round(time.perf_counter() - started, 2)}
        with connected(server.grpc_url, "missrec", OUTPUTS) as call:
            batches = {"1": [request(1) for _ in range(50)], "64": [request(64) for _ in range(10)]}
            times = {size: latency(call, requests, seconds) for size, requests in batches.items()}
        result["p50_ms"] = {size: one["p50"] for size, one in times.items()}
        result["p99_ms"] = {size: one["p99"] for size, one in times.items()}
        result["throughput"] = throughput(server.grpc_url, "missrec", OUTPUTS, batches["1"], seconds)
        result["peak_mib"] = round(_group_peak(server.pid))
    return result


def _beside(own: Mapping[str, Any], peers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fastest of the peers for each measure, and how many times faster ours is."""
    fastest = {size: min(one["p50_ms"][size] for one in peers.values()) for size in ("1", "64")}
    throughput = max(one["throughput"] for one in peers.values())
    return {
        "merlin_p50_ms": fastest,
        "merlin_throughput": throughput,
        "times_faster": round(fastest["1"] / own["p50_ms"]["1"], 2),
        "times_throughput": round(own["throughput"] / throughput, 2),
    }


def floor(work: Path, seconds: float) -> float:
    """Return the p50 of an empty model: Triton's own latency."""
    folder = work / "floor" / "floor"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(_FLOOR_CONFIG)
    (folder / "1" / "model.py").write_text(_FLOOR_MODEL)
    with LocalTriton(work / "floor") as server, connected(server.grpc_url, "floor", ("y",)) as call:
        return latency(call, [{"x": np.zeros((1, 10), np.float32)}], seconds)["p50"]


def merlin(work: Path, n_items: int, seconds: float, content: int) -> dict[str, Any]:
    """Measure three configurations of the classic ensemble, items with a vector of width ``content`` or ids alone."""
    os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")  # before Merlin is imported
    from benchmarks.speed.merlin_peer import CONFIGURATIONS, OUTPUTS, build, request

    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, repository in build(work / "peers", n_items, top_k=_TOP_K, content=content).items():
        sizes = {"1": 1, "64": 64}
        requests = {
            size: [request([rng.integers(1, n_items + 1, _LENGTH).tolist() for _ in range(n)]) for _ in range(10)]
            for size, n in sizes.items()
        }
        started = time.perf_counter()
        with LocalTriton(repository) as server:
            ready = round(time.perf_counter() - started, 2)
            with connected(server.grpc_url, CONFIGURATIONS[name], OUTPUTS) as call:
                times = {size: latency(call, requests[size], seconds)["p50"] for size in sizes}
            rate = throughput(server.grpc_url, CONFIGURATIONS[name], OUTPUTS, requests["1"], seconds)
        found[name] = {"p50_ms": times, "throughput": rate, "cold_start_s": ready}
    return found


def transform_ms(bundle: Path, seconds: float) -> float:
    """Return the p50 of transforming one session of twenty ids."""
    transform = load_session_transform(bundle)
    session = transform.wire_ids[:20][None]
    length = np.array([[20]], np.int32)
    return latency(lambda _: transform.padded(session, length), [{}], seconds)["p50"]


def nvtabular_ms(work: Path, seconds: float) -> float:
    """Return the p50 of the same by NVTabular's executor, on a frame that is there already."""
    import pandas as pd
    from merlin.dag.executors import LocalExecutor

    from benchmarks.speed.merlin_peer import _workflow

    workflow = _workflow(work / "workflow", 4000)
    frame = pd.DataFrame({"item_id": [list(range(1, 21))]})
    executor = LocalExecutor()
    return latency(lambda _: executor.transform(frame, [workflow.output_node]), [{}], seconds)["p50"]


def top_k(rows: Sequence[int], bundle: Path | None, threads: int, *, with_hnsw: bool) -> list[dict[str, Any]]:
    """Search large catalogues, each kind of embeddings in its own process."""
    reports = []
    for n in rows:
        for extra in ([], ["--isotropic"]):
            command = [
                sys.executable,
                "-m",
                "benchmarks.speed.topk",
                "--rows",
                str(n),
                "--threads",
                str(threads),
                *extra,
            ]
            command += ["--bundle", str(bundle)] if bundle else []
            command += ["--hnsw"] if with_hnsw and not extra else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            reports.append(json.loads(done.stdout.splitlines()[-1]))
    return reports


def _group_peak(pid: int) -> float:
    """Return the sum of the peaks of a server's processes, in MiB; pages they share count in each."""
    total = 0.0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == pid:
                lines = (entry / "status").read_text().splitlines()
                total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, ProcessLookupError):
            continue
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the result, and print it as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of a trained run; an untrained shop by default")
    parser.add_argument("--items", type=int, default=4385, help="items of the untrained shop and of the peers")
    parser.add_argument("--seconds", type=float, default=8.0, help="per measurement")
    parser.add_argument("--threads", type=int, default=1, help="of the ranker")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="sizes for the top-50")
    parser.add_argument("--hnsw", action="store_true", help="HNSW beside the top-50: needs faiss-cpu")
    parser.add_argument("--without-merlin", action="store_true")
    parser.add_argument(
        "--large", type=Path, help="of large_bundle: served by two instances, start and memory reported"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bundle = chosen.bundle or bundle_of(work / "bundle", chosen.items)
        found = ours(bundle, work, chosen.seconds, chosen.threads) | {"floor_p50_ms": floor(work, chosen.seconds)}
        found["transform_ms"] = transform_ms(bundle, min(chosen.seconds, 2.0))
        if not chosen.without_merlin:
            peers = merlin(work, chosen.items, chosen.seconds, _CONTENT)
            found |= _beside(found, peers) | {"merlin": peers}
            lean = merlin(work, chosen.items, chosen.seconds, 0)
            found["ids_alone"] = _beside(found, lean) | {"merlin": lean}
            found["nvtabular_transform_ms"] = nvtabular_ms(work, min(chosen.seconds, 4.0))
        if chosen.large:
            found["large_server"] = serve_large(chosen.large, instances=2, threads=1, clients=4)
        large = top_k(chosen.rows, chosen.bundle, 2, with_hnsw=chosen.hnsw)
        found["topk_ms"] = {str(one["rows"]): one["ms"] for one in large if one["tokens"] == "real"}
        report("serving", found | {"topk": large, "threads": chosen.threads, "trained": chosen.bundle is not None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
