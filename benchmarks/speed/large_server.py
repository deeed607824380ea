"""Serve a large catalogue: start time, latency, memory of several instances with shared pages, equality of results.

    python -m benchmarks.speed.large_bundle --bundle work/demo/shop/bundle --items 1000000 --out work/large
    python -m benchmarks.speed.large_server --bundle work/large --instances 2

Memory is that of the ranker's processes: PSS counts a shared page once over all of them, `private` is the memory of one
process alone. Responses are compared with those of scoring all items, ids and order included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.measure import report, require_files, run_as_command
from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.retrieval.topk import scan_bounds, search
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.repository import write_repository

K = 50
_SESSIONS, _LENGTH, _COMPARED = 200, 10, 10


def memory_of(group: int) -> list[dict[str, int]]:
    """Return the memory in MiB of the ranker's processes in a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                continue
            if "stub" not in words[0] or not any("missrec_ranker" in word for word in words):
                continue
            lines = [line.split() for line in (entry / "smaps_rollup").read_text().splitlines()[1:]]
            sizes = {line[0].rstrip(":"): int(line[1]) // 1024 for line in lines}
            status = (entry / "status").read_text().splitlines()
            peak = next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM:"))
        except (OSError, ValueError, IndexError, StopIteration):
            continue
        kept = {"pss": sizes["Pss"], "pss_file": sizes["Pss_File"], "pss_anonymous": sizes["Pss_Anon"]}
        found.append(kept | {"rss": sizes["Rss"], "rss_peak": peak})
    return found


def run(bundle: Path, *, instances: int, threads: int, clients: int) -> dict[str, Any]:
    """Serve the bundle, send requests, and return the measurements."""
    ids = load_ids(bundle)
    rng = np.random.default_rng(0)
    sessions = [[ids[i] for i in rng.integers(0, len(ids), _LENGTH)] for _ in range(_SESSIONS)]
    result: dict[str, Any] = {"items": len(ids), "instances": instances, "threads": threads}
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        repository = Path(folder) / "models"
        with mock.patch("shutil.copyfile", os.link):  # gigabytes: the repository gets the bundle's own files
            write_repository(bundle, repository, threads=threads, instances=instances)
        started = time.perf_counter()
        with LocalTriton(repository, timeout=600) as server, MISSRecClient(server.grpc_url, timeout=60) as client:
            result["start_s"] = round(time.perf_counter() - started, 2)
            result["memory_at_start_mib"] = memory_of(server.pid)
            times = []
            answers = []
            for session in sessions:
                started = time.perf_counter()
                answers += client.recommend([session], K)
                times.append(1e3 * (time.perf_counter() - started))
            later = times[_SESSIONS // 4 :]
            result["ms"] = {f"p{q}": round(float(np.percentile(later, q)), 2) for q in (50, 95, 99)}
            result["per_second"] = _rate(server.grpc_url, sessions, clients)
            result["clients"] = clients
            result["memory_mib"] = memory_of(server.pid)
            result["pss_mib"] = sum(one["pss"] for one in result["memory_mib"])
    result["equal_to_scan"] = _equal(bundle, sessions[:_COMPARED], answers[:_COMPARED])
    return result


def load_ids(bundle: Path) -> list[Any]:
    """Return the raw ids of a bundle's items."""
    from missrec_t4r.bundle.item_table import load_items, vocabulary_of

    ids: list[Any] = vocabulary_of(load_items(bundle)).to_pylist()
    return ids


def _rate(url: str, sessions: Sequence[list[Any]], clients: int, seconds: float = 8.0) -> float:
    counts, until = [0] * clients, time.perf_counter() + seconds

    def send_requests(number: int) -> None:
        with MISSRecClient(url, timeout=60) as client:
            while time.perf_counter() < until:
                client.recommend([sessions[(7 * number + counts[number]) % len(sessions)]], K)
                counts[number] += 1

    threads = [threading.Thread(target=send_requests, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(sum(counts) / seconds, 1)


def _equal(bundle: Path, sessions: Sequence[list[Any]], answers: Sequence[Any]) -> bool:
    """Return whether the responses equal those of scoring the whole catalogue, in ids and order."""
    loaded = load_bundle(bundle)
    ranker = Ranker(loaded.model, loaded.catalogue, tables=loaded.tables)
    with torch.inference_mode():
        for session, answer in zip(sessions, answers, strict=True):
            query = ranker.query(np.array([loaded.catalogue.rows_of(session)]), {})
            (found,) = search(ranker.table, query, scan_bounds(ranker.table, query), K)
            if loaded.catalogue.ids_of(found.rows.numpy()) != list(answer.item_ids):
                return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--built", type=Path, help="JSON line of large_bundle, to be reported along")
    parser.add_argument("--name", default="large-server")
    chosen = parser.parse_args(arguments)
    verify_bundle(chosen.bundle, only=())
    if chosen.built:
        require_files(chosen.built.parent, [chosen.built.name], "the output of large_bundle", "see --built")
    built = json.loads(chosen.built.read_text().splitlines()[0]) if chosen.built else {}
    found = run(chosen.bundle, instances=chosen.instances, threads=chosen.threads, clients=chosen.clients)
    report(chosen.name, found | built)
    return 0


if __name__ == "__main__":
    run_as_command(main)
