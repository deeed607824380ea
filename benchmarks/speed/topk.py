"""Exact top-50 of large catalogues: int8-bounded search from a mapped file against full scan and HNSW; memory.

    python -m benchmarks.speed.topk --rows 100000 --bundle bundle/        embeddings as in large_tokens
    python -m benchmarks.speed.topk --rows 1000000 --bundle bundle/ --isotropic --hnsw

The index is written to a file and mapped by new processes, as by instances of a server: their peak memory is that of
serving. Without ``--bundle`` the embeddings are those of an untrained model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import peak_mib, reset_peak, run_as_command
from benchmarks.speed.large_tokens import enlarged, isotropic, sessions_near
from benchmarks.speed.serving_shop import bundle_of
from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from missrec_t4r.retrieval.index_file import RetrievalIndex, write_tables
from missrec_t4r.retrieval.packed_scores import PackedItems, pack_items
from missrec_t4r.retrieval.topk import Query, scan_bounds, search

K = 50
PHI = 2.0
LINKS, CONSTRUCTION = 16, 40
"""Of HNSW: small enough to build a million items in minutes on one core."""
_SESSIONS, _ROUNDS = 20, 3


def measure(file: Path, sessions: Path, threads: int, scan: bool) -> dict[str, Any]:
    """Search a mapped file and return milliseconds (p50), items scored exactly, and the process's peak memory."""
    torch.set_num_threads(threads)
    vectors = torch.from_numpy(np.load(sessions))
    result: dict[str, Any] = {}
    with torch.inference_mode():
        table, quantised = RetrievalIndex.load(file)
        added, allowed = torch.zeros(1, table.n_rows), torch.ones(1, table.n_rows, dtype=torch.bool)
        queries = [Query(one[None], added, allowed) for one in vectors]
        times, scored, found = [], [], []
        for round_ in range(_ROUNDS + 1):  # the first one reads the file
            for query in queries:
                started = time.perf_counter()
                (best,) = search(table, query, quantised.bounds(table, query, threads), K)
                if round_:
                    times.append(time.perf_counter() - started)
                    scored.append(best.scored)
                    found.append(best)
        result |= {"ms": round(1e3 * float(np.median(times)), 2), "scored": int(np.median(scored))}
        result["peak_mib"] = round(peak_mib())
        result["anonymous_mib"] = _anonymous_mib()
        result["directions"] = int(quantised.codes.shape[1])
        if scan:
            times, equal = [], True
            for query, best in zip(queries[:5], found[:5], strict=True):
                started = time.perf_counter()
                (exact,) = search(table, query, scan_bounds(table, query), K)
                times.append(time.perf_counter() - started)
                equal &= torch.equal(exact.rows, best.rows) and torch.equal(exact.scores, best.scores)
            result |= {"scan_ms": round(1e3 * float(np.median(times)), 2), "equal_to_scan": equal}
    return result


def _anonymous_mib() -> int:
    """Return the anonymous memory of this process in MiB: pages that belong to no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("Pss_Anon:"))


def write(candidates: CandidateEmbeddings, file: Path) -> None:
    """Write the retrieval index of given embeddings under dynamic fusion."""
    fusion = CandidateFusion("dynamic_shared", candidates.mask.shape[1])
    assert fusion.phi is not None
    with torch.inference_mode():
        fusion.phi.fill_(PHI)
        hollow = candidates._replace(modality=candidates.modality[..., :0])

        def part(rows: Tensor) -> PackedItems:
            own = candidates._replace(modality=candidates.modality[:, rows], mask=candidates.mask[:, rows])
            return pack_items(fusion, own, rows)

        write_tables(file, pack_items(fusion, hollow), part)


def hnsw(candidates: CandidateEmbeddings, vectors: Tensor, exact: Sequence[Tensor], threads: int) -> dict[str, Any]:
    """Index the mean of the modalities with faiss' HNSW; its neighbours, re-scored, against the exact result."""
    import faiss

    faiss.omp_set_num_threads(threads)
    mean = candidates.modality.mean(0).numpy()
    before = reset_peak()
    index = faiss.IndexHNSWFlat(mean.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = CONSTRUCTION
    started, busy = time.perf_counter(), time.process_time()
    index.add(mean)
    build, busy = time.perf_counter() - started, time.process_time() - busy
    result: dict[str, Any] = {"links": LINKS, "ef_construction": CONSTRUCTION, "build_s": round(build, 1)}
    result |= {"build_cpu_s": round(busy, 1), "index_mib": round(peak_mib() - before)}
    for width in (64, 256, 1024):
        index.hnsw.efSearch = width
        times, recalls = [], []
        for vector, wanted in zip(vectors.numpy(), exact, strict=True):
            started = time.perf_counter()
            _, near = index.search(vector[None], min(4 * K, width))
            times.append(time.perf_counter() - started)
            votes = torch.einsum("d,mnd->mn", torch.from_numpy(vector), candidates.modality[:, near[0]])
            fused = (torch.softmax(PHI * votes, 0) * votes).sum(0)
            best = near[0][fused.topk(K).indices.numpy()]
            recalls.append(len(set(best.tolist()) & set(wanted.tolist())) / K)
        result[f"ef_{width}"] = {
            "ms": round(1e3 * float(np.median(times)), 2),
            "recall": round(float(np.mean(recalls)), 4),
        }
    return result


def run(
    rows: int, bundle: Path | None, *, threads: int = 2, directionless: bool = False, with_hnsw: bool = False
) -> dict[str, Any]:
    """Build a catalogue of ``rows``, search it in its own process, and return the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if directionless:
            candidates = isotropic(2, rows, 300)
        else:
            real = load_bundle(bundle or bundle_of(work / "bundle", 2000)).model
            with torch.inference_mode():
                candidates = enlarged(real.candidates(), rows)
        vectors = sessions_near(candidates, _SESSIONS)
        np.save(work / "sessions.npy", vectors.numpy())
        started = time.perf_counter()
        write(candidates, work / "tables.safetensors")
        built = round(time.perf_counter() - started, 1)
        exact = []
        if with_hnsw:
            table, quantised = RetrievalIndex.load(work / "tables.safetensors")
            added, allowed = torch.zeros(1, rows), torch.ones(1, rows, dtype=torch.bool)
            with torch.inference_mode():
                for one in vectors:
                    query = Query(one[None], added, allowed)
                    exact.append(search(table, query, quantised.bounds(table, query, threads), K)[0].rows)
        command = [sys.executable, "-m", "benchmarks.speed.topk", "--threads", str(threads), "--measure", str(work)]
        reports = []
        for scan in (False, True):  # the scan reads everything: memory is measured without it
            done = subprocess.run([*command, *(["--scan"] if scan else [])], capture_output=True, text=True, check=True)
            reports.append(json.loads(done.stdout.splitlines()[-1]))
        kept = {name: reports[1][name] for name in ("scan_ms", "equal_to_scan")}
        near = {"hnsw": hnsw(candidates, vectors, exact, threads)} if with_hnsw else {}
        return (
            {"rows": rows, "tokens": "isotropic" if directionless else "real", "build_s": built}
            | reports[0]
            | kept
            | near
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isotropic", action="store_true")
    parser.add_argument("--hnsw", action="store_true", help="needs faiss-cpu (requirements/bench.txt)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scan", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        tables, sessions = chosen.measure / "tables.safetensors", chosen.measure / "sessions.npy"
        print(json.dumps(measure(tables, sessions, chosen.threads, chosen.scan)))
    else:
        options = {"threads": chosen.threads, "directionless": chosen.isotropic, "with_hnsw": chosen.hnsw}
        print(json.dumps(run(chosen.rows, chosen.bundle, **options)))
    return 0


if __name__ == "__main__":
    run_as_command(main)
