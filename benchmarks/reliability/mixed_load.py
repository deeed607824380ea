"""Load test of one server during deployments and rollbacks; every response is compared with the offline result.

    python -m benchmarks.reliability.mixed_load --bundle work/demo/shop/bundle --seconds 600

Two versions are deployed in turn: the bundle, and the same model with another catalogue version, in which some
items are retired. A response must be equal, in ids outside ties and in scores within 1e-5, to the offline result of the
catalogue version that it names. Ends with one JSON line: requests, wrong and failed responses, latency, memory.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import run_as_command
from benchmarks.reliability.hostile import _resident
from missrec_t4r.bundle.item_table import load_items, vocabulary_of
from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.bundle.update_catalogue import update_catalogue
from missrec_t4r.errors import MISSRecError, UnavailableError
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.protocol import Recommendation
from missrec_t4r.serving.deploy.blue_green import deploy, rollback
from missrec_t4r.serving.deploy.smoke_test import differences, sample_sessions
from missrec_t4r.serving.triton.local_server import LocalTriton

_TOP_K = 10


class Load:
    """Clients that send requests without pause and compare the responses.

    Parameters
    ----------
    url : str
        gRPC address.
    sessions : list of sessions
    expected : mapping
        Catalogue version -> the right answers to the sessions.
    """

    def __init__(self, url: str, sessions: list[Any], expected: dict[str, list[Recommendation]]) -> None:
        self.url, self.sessions, self.expected = url, sessions, expected
        self.milliseconds: list[float] = []
        self.problems: list[str] = []
        self.versions: dict[str, int] = {}
        self.stop = threading.Event()

    def client(self, seed: int) -> None:
        """Send requests until the end."""
        chance = random.Random(seed)
        with MISSRecClient(self.url, timeout=60) as client:
            while not self.stop.is_set():
                chosen = chance.sample(range(len(self.sessions)), chance.choice((1, 1, 1, 4, 16)))
                started = time.perf_counter()
                try:
                    answers = client.recommend([self.sessions[index] for index in chosen], _TOP_K)
                except Exception as error:  # every one counts
                    self.problems.append(f"failed: {error!r}"[:300])
                    continue
                self.milliseconds.append((time.perf_counter() - started) * 1e3)
                self._compare(chosen, answers)

    def _compare(self, chosen: list[int], answers: list[Recommendation]) -> None:
        named = {answer.catalogue_version for answer in answers}
        if len(named) != 1 or not named <= set(self.expected):
            self.problems.append(f"one request answered by catalogues {sorted(named)}")
            return
        (version,) = named
        self.versions[version] = self.versions.get(version, 0) + 1
        right = [self.expected[version][index] for index in chosen]
        wrong, largest = differences(answers, right)
        if wrong or largest > 1e-5:
            self.problems.append(f"catalogue {version}: {wrong} answers differ, scores by {largest:.2g}")


def run(bundle: Path, work: Path, *, seconds: float, clients: int, pause: float) -> dict[str, Any]:
    """Run the load and the changes; return the figures."""
    first, second = work / "first", work / "second"
    shutil.copytree(bundle, first)
    shutil.copytree(bundle, second)
    ids = vocabulary_of(load_items(second)).slice(0, 3)
    update_catalogue(second, pa.table({ITEM_ID: ids, "retired": [True] * len(ids)}))
    sessions, expected = sample_sessions(first, 62), {}
    for one in (first, second):
        with MISSRecClient.of_bundle(one) as offline:
            answers = offline.recommend(sessions, _TOP_K)
            expected[answers[0].catalogue_version] = answers
    assert len(expected) == 2, "the two catalogues must differ"
    live, changes, memory = work / "live", 0, []
    deploy(live, bundle=first)
    with LocalTriton(live) as server:
        load = Load(server.grpc_url, sessions, expected)
        threads = [threading.Thread(target=load.client, args=(seed,)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                try:
                    if changes % 3 == 2:
                        rollback(live)
                    else:
                        deploy(live, bundle=second if changes % 3 == 0 else first)
                    server.check_alive()
                except MISSRecError as error:
                    load.problems.append(f"change {changes}: {error}"[:300])
                    if isinstance(error, UnavailableError):  # the server has ended
                        break
                changes += 1
                memory.append(_resident(server.pid))
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        finally:
            load.stop.set()
            for thread in threads:
                thread.join()
    return {
        "seconds": seconds,
        "clients": clients,
        "requests": len(load.milliseconds),
        "changes": changes,
        "requests_by_catalogue": load.versions,
        "problems": len(load.problems),
        "first_problems": load.problems[:10],
        "ms": {f"p{q}": round(float(np.percentile(load.milliseconds, q)), 2) for q in (50, 95, 99, 99.9)},
        "resident_mib": {"first": memory[0], "last": memory[-1], "max": max(memory)} if memory else {},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run it on the embedded server and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=5, help="seconds between two changes")
    chosen = parser.parse_args(arguments)
    verify_bundle(chosen.bundle, only=())
    with tempfile.TemporaryDirectory() as work:
        result = run(chosen.bundle, Path(work), seconds=chosen.seconds, clients=chosen.clients, pause=chosen.pause)
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    run_as_command(main)
