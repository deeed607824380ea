"""Latency, throughput, start and memory of the served ensemble, of an empty model and of three Merlin configurations.

    make bench-serving                       an untrained model of d = 300 on 4,385 items, everything in one run
    make bench-serving BUNDLE=bundle/        a trained one; its embeddings also make the large catalogues

One machine, one Triton each, measured in turns: ours, an empty Python model (what any Python model costs), and the
classic Merlin Systems ensemble with T4R's XLNet in three configurations. Requests come from this process over gRPC.
Times are medians over all rounds; *times faster* is the median of the rounds' own ratios, so that what else the machine
does for some seconds changes neither.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.measure import report, run_as_command
from benchmarks.speed.large_server import run as serve_large
from benchmarks.speed.serving_shop import bundle_of
from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import ITEMS_FILE, verify_bundle
from missrec_t4r.progress import track
from missrec_t4r.serving.client.transports import Arrays, TritonTransport
from missrec_t4r.serving.load import answers_per_second, latency, message, percentiles, response_times
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


class Served(NamedTuple):
    """A model of a running server, and the requests that it gets."""

    url: str
    model: str
    outputs: Sequence[str]
    requests: Mapping[str, Sequence[Arrays]]
    """Requests by their number of sessions."""


class Times(NamedTuple):
    """What was measured of a model, round by round."""

    ms: dict[str, list[list[float]]]
    """Milliseconds of the responses, by the number of sessions."""
    rates: list[float]
    """Sessions per second."""

    def p50(self, size: str) -> npt.NDArray[np.float64]:
        """Return the median of each round, in milliseconds [round]."""
        return np.array([np.median(times) for times in self.ms[size]])

    def summary(self) -> dict[str, Any]:
        """Return the figures over all rounds."""
        all_rounds = {size: percentiles(np.concatenate(rounds)) for size, rounds in self.ms.items()}
        found = {f"{name}_ms": {size: one[name] for size, one in all_rounds.items()} for name in ("p50", "p99")}
        return found | ({"throughput": round(statistics.median(self.rates), 1)} if self.rates else {})


def in_turns(served: Mapping[str, Served], seconds: float, rounds: int) -> dict[str, Times]:
    """Measure models, one after the other, again and again: what else the machine does then meets them alike."""
    found = {name: Times({size: [] for size in one.requests}, []) for name, one in served.items()}
    for _ in track(range(rounds), "serving"):
        for name, one in served.items():
            with connected(one.url, one.model, one.outputs) as call:
                for size, requests in one.requests.items():
                    found[name].ms[size].append(response_times(call, requests, seconds / rounds))
            if "64" in one.requests:  # the empty model has no batch
                rate = throughput(one.url, one.model, one.outputs, one.requests["1"], seconds / rounds)
                found[name].rates.append(rate)
    return found


@contextlib.contextmanager
def started(repository: Path) -> Iterator[tuple[LocalTriton, float]]:
    """Serve a repository; return the server and the seconds until it was ready."""
    began = time.perf_counter()
    with LocalTriton(repository) as server:
        yield server, round(time.perf_counter() - began, 2)


def ours(bundle: Path) -> dict[str, list[Arrays]]:
    """Return requests for our ensemble: sessions of random items."""
    ids = [str(one).encode() for one in pq.read_table(bundle / ITEMS_FILE, columns=["item_id"])["item_id"].to_pylist()]
    rng = np.random.default_rng(0)

    def request(batch: int) -> Arrays:
        chosen = np.array(ids, object)[rng.integers(0, len(ids), (batch, _LENGTH))]
        return {"item_ids": chosen, "length": np.full((batch, 1), _LENGTH, np.int32)}

    return {"1": [request(1) for _ in range(50)], "64": [request(64) for _ in range(10)]}


def floor(work: Path) -> Path:
    """Write the repository of an empty model: its latency is Triton's own."""
    folder = work / "floor" / "floor"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(_FLOOR_CONFIG)
    (folder / "1" / "model.py").write_text(_FLOOR_MODEL)
    return folder.parent


def merlin(work: Path, n_items: int, content: int) -> dict[str, tuple[Path, str, dict[str, list[Arrays]]]]:
    """Write three configurations of the classic ensemble, items with a vector of width ``content`` or ids alone.

    Returns
    -------
    dict
        Repository, model and requests of each.
    """
    os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")  # before Merlin is imported
    from benchmarks.speed.merlin_peer import CONFIGURATIONS, build, request

    rng = np.random.default_rng(0)

    def sessions(n: int) -> Arrays:
        return request([rng.integers(1, n_items + 1, _LENGTH).tolist() for _ in range(n)])

    requests = {str(n): [sessions(n) for _ in range(10)] for n in (1, 64)}
    repositories = build(work / f"peers-{content}", n_items, top_k=_TOP_K, content=content)
    return {name: (repository, CONFIGURATIONS[name], requests) for name, repository in repositories.items()}


def beside(own: Times, peers: Mapping[str, Times], cold_start: Mapping[str, float]) -> dict[str, Any]:
    """Return the peers' figures, the fastest of each measure, and how many times faster ours is (median of rounds)."""
    fastest = {size: min(one.summary()["p50_ms"][size] for one in peers.values()) for size in own.ms}
    times = {
        size: float(np.median(np.min([one.p50(size) for one in peers.values()], 0) / own.p50(size))) for size in own.ms
    }
    ratios = np.array(own.rates) / np.max([one.rates for one in peers.values()], 0)
    return {
        "merlin_p50_ms": fastest,
        "merlin_throughput": max(one.summary()["throughput"] for one in peers.values()),
        "times_faster": round(times["1"], 2),
        "times_faster_64": round(times["64"], 2),
        "times_throughput": round(float(np.median(ratios)), 2),
        "merlin": {name: one.summary() | {"cold_start_s": cold_start[name]} for name, one in peers.items()},
    }


def served(bundle: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure our ensemble, an empty model and the peers in turns, all of them running."""
    from benchmarks.speed.merlin_peer import OUTPUTS as MERLIN_OUTPUTS

    write_repository(bundle, work / "ours", threads=options.threads)
    peers = (
        {}
        if options.without_merlin
        else {
            f"{kind}/{name}": one
            for kind, content in (("merlin", _CONTENT), ("ids_alone", 0))
            for name, one in merlin(work, options.items, content).items()
        }
    )
    models: dict[str, Served] = {}
    cold_start: dict[str, float] = {}
    with contextlib.ExitStack() as servers:

        def start(name: str, repository: Path, model: str, outputs: Sequence[str], requests: Any) -> LocalTriton:
            server, cold_start[name] = servers.enter_context(started(repository))
            models[name] = Served(server.grpc_url, model, outputs, requests)
            return server

        own = start("ours", work / "ours", "missrec", OUTPUTS, ours(bundle))
        start("floor", floor(work), "floor", ("y",), {"1": [{"x": np.zeros((1, 10), np.float32)}]})
        for name, (repository, model, requests) in peers.items():
            start(name, repository, model, MERLIN_OUTPUTS, requests)
        times = in_turns(models, options.seconds, options.rounds)
        peak = round(_group_peak(own.pid))
    found = times["ours"].summary() | {"cold_start_s": cold_start["ours"], "peak_mib": peak}
    found["floor_p50_ms"] = times["floor"].summary()["p50_ms"]["1"]
    for kind in ("merlin", "ids_alone") if peers else ():
        of = {name.partition("/")[2]: one for name, one in times.items() if name.startswith(f"{kind}/")}
        starts = {name.partition("/")[2]: cold_start[name] for name in cold_start}
        result = beside(times["ours"], of, starts)
        found |= result if kind == "merlin" else {kind: result}
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
    parser.add_argument("--rounds", type=int, default=4, help="in which each measurement is divided")
    parser.add_argument("--threads", type=int, default=1, help="of the ranker")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="sizes for the top-50")
    parser.add_argument("--hnsw", action="store_true", help="HNSW beside the top-50: needs faiss-cpu")
    parser.add_argument("--without-merlin", action="store_true")
    parser.add_argument(
        "--large", type=Path, help="of large_bundle: served by two instances, start and memory reported"
    )
    chosen = parser.parse_args(arguments)
    for bundle in filter(None, (chosen.bundle, chosen.large)):
        verify_bundle(bundle, only=())  # now, not after the measurements before it
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bundle = chosen.bundle or bundle_of(work / "bundle", chosen.items)
        found = served(bundle, work, chosen)
        found["transform_ms"] = transform_ms(bundle, min(chosen.seconds, 2.0))
        if not chosen.without_merlin:
            found["nvtabular_transform_ms"] = nvtabular_ms(work, min(chosen.seconds, 4.0))
        if chosen.large:
            found["large_server"] = serve_large(chosen.large, instances=2, threads=1, clients=4)
        large = top_k(chosen.rows, chosen.bundle, 2, with_hnsw=chosen.hnsw)
        found["topk_ms"] = {str(one["rows"]): one["ms"] for one in large if one["tokens"] == "real"}
        report("serving", found | {"topk": large, "threads": chosen.threads, "trained": chosen.bundle is not None})
    return 0


if __name__ == "__main__":
    run_as_command(main)
