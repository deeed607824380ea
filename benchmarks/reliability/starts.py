"""Does Triton's Python backend crash in a model's first traffic? Models are loaded and unloaded under load.

    python -m benchmarks.reliability.starts --bundle work/demo/shop/bundle --state work/starts.jsonl --starts 200

A start loads a model, sends it requests of very different sizes from eight clients at once, and loads a second model in
that same moment, as `missrec deploy` does; then both are unloaded. The server is a new one after every ten starts and
after every crash. Tens alternate between an initial shared memory of 1 MiB (Triton's default) and of 16 MiB (ours), so
that both see the same machine. By default the models are two copies of the request transform: the backend's own code is
what is tested, and a model without torch starts faster. ``--whole`` takes two versions of the whole ensemble.

What each start saw is appended to the state file, and a repeated command continues there. The result is written when
all starts are done, or with ``--report`` from what the file holds.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import report, run_as_command
from missrec_t4r.bundle.id_encoder import SessionTransform
from missrec_t4r.bundle.item_table import load_items, load_session_transform, vocabulary_of
from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.bundle.update_catalogue import update_catalogue
from missrec_t4r.errors import MISSRecError
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.protocol import pad_sessions
from missrec_t4r.serving.client.transports import TritonTransport
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.deploy.smoke_test import differences, sample_sessions
from missrec_t4r.serving.triton import local_server
from missrec_t4r.serving.triton.deployment import DEPLOYMENT_FILE, ensemble_of
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.repository import write_repository

SHARED_MIB = (1, 16)
"""Initial shared memory of a model, MiB."""
CLIENTS = 8
STARTS_PER_SERVER = 10
LONGEST = 1000
"""Ids of the longest session: its batches are larger than 1 MiB, so that the smaller region has to grow."""

Send = Callable[[random.Random], bool]
"""Sends a request; returns whether the response is right."""


@dataclass(frozen=True)
class Subject:
    """What is loaded and asked."""

    repository: Path
    first: str
    """Model that gets the requests."""
    second: str
    """Model that is loaded meanwhile."""
    connect: Callable[[str], AbstractContextManager[Send]]
    """Opens a client of a gRPC address."""


def transforms(bundle: Path, work: Path) -> Subject:
    """Return two copies of the request transform, without the ranker."""
    repository = work / "models"
    write_repository(bundle, repository)
    for name in ("first", "second"):
        shutil.copytree(repository / "missrec_sessions", repository / name)
        file = repository / name / "config.pbtxt"
        file.write_text(file.read_text().replace('name: "missrec_sessions"', f'name: "{name}"'))
    transform = load_session_transform(bundle)
    requests = [_request(transform, batch, longest) for batch in (1, 4, 60) for longest in (5, 50, 50, LONGEST)]

    class Client:
        def __init__(self, url: str) -> None:
            self._transport = TritonTransport(url, "grpc", 30)

        def __enter__(self) -> Send:
            return self._send

        def __exit__(self, *error: object) -> None:
            self._transport.close()

        def _send(self, chance: random.Random) -> bool:
            tensors, expected = chance.choice(requests)
            answer = self._transport.infer("first", tensors, ("rows", "seen"))
            return all(np.array_equal(answer[name], right) for name, right in expected.items())

    return Subject(repository, "first", "second", Client)


def _request(transform: SessionTransform, batch: int, longest: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a request of the transform, and of its response."""
    rng = np.random.default_rng(batch * longest)
    sessions = [rng.choice(transform.wire_ids, rng.integers(0, longest + 1)) for _ in range(batch)]
    item_ids, length = pad_sessions(sessions, transform.settings.id_type)
    rows, seen = transform.padded(item_ids, length)
    return {"item_ids": item_ids, "length": length}, {"rows": rows, "seen": seen}


def ensembles(bundle: Path, work: Path) -> Subject:
    """Return two versions of the whole ensemble."""
    live, served = work / "live", work / "bundle"
    shutil.copytree(bundle, served)
    retired = vocabulary_of(load_items(served)).slice(0, 3)
    update_catalogue(served, pa.table({ITEM_ID: retired, "retired": [True] * len(retired)}))
    deploy(live, bundle=bundle)
    deploy(live, bundle=served)
    (live / DEPLOYMENT_FILE).unlink()  # a plain repository: nothing is loaded at the start
    sessions = sample_sessions(bundle, 62)
    with MISSRecClient.of_bundle(served) as offline:
        expected = offline.recommend(sessions, 10)

    class Client:
        def __init__(self, url: str) -> None:
            self._client = MISSRecClient(url, model=ensemble_of(2), timeout=30)

        def __enter__(self) -> Send:
            return self._send

        def __exit__(self, *error: object) -> None:
            self._client.close()

        def _send(self, chance: random.Random) -> bool:
            chosen = chance.sample(range(len(sessions)), chance.choice((1, 1, 4, 60)))
            answers = self._client.recommend([sessions[index] for index in chosen], 10)
            wrong, largest = differences(answers, [expected[index] for index in chosen])
            return not wrong and largest <= 1e-5

    return Subject(live, ensemble_of(2), ensemble_of(1), Client)


def one_start(subject: Subject, server: LocalTriton, seed: int) -> dict[str, Any]:
    """Load a model, send it requests while another one is loaded, and return what happened."""
    counts: collections.Counter[str] = collections.Counter()
    messages: list[str] = []
    stop, started = threading.Event(), time.monotonic()

    def client(number: int) -> None:
        chance = random.Random(seed * CLIENTS + number)
        with subject.connect(server.grpc_url) as send:
            while not stop.is_set():
                try:
                    counts["right" if send(chance) else "wrong"] += 1
                except Exception as error:  # every one counts
                    counts["failed"] += 1
                    messages.append(repr(error)[:300])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    ended = None
    try:
        server.control.load(subject.first)
        for thread in threads:
            thread.start()
        server.control.load(subject.second)
        stop.set()
        for thread in threads:
            thread.join()
        for model in (subject.second, subject.first):
            server.control.unload(model)
        server.check_alive()
    except MISSRecError as error:
        ended = str(error)[:500]
    finally:
        stop.set()
    return {"ended": ended, **counts, "messages": messages[:3], "seconds": round(time.monotonic() - started, 1)}


def run(subject: Subject, state: Path, done: int, starts: int) -> Iterator[dict[str, Any]]:
    """Yield what each start from number ``done`` on saw, after it was appended to the state file."""
    while done < starts:
        shared_mib = SHARED_MIB[done // STARTS_PER_SERVER % 2]
        local_server.SHARED_BYTES = shared_mib << 20
        with LocalTriton(subject.repository, arguments=("--model-control-mode=explicit",)) as server:
            while done < starts:
                one = {"shared_mib": shared_mib, **one_start(subject, server, done)}
                if one["ended"]:
                    one["log"] = server.log_file.read_text(errors="replace")[-2000:]
                with state.open("a") as file:
                    file.write(json.dumps(one) + "\n")
                yield one
                done += 1
                if one["ended"] or done % STARTS_PER_SERVER == 0:
                    break


def summary(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return starts, ended servers and responses by shared memory, with a 95 % upper bound of the rate."""
    result = {}
    for shared_mib in SHARED_MIB:
        own = [one for one in seen if one["shared_mib"] == shared_mib]
        ended = [one["ended"] for one in own if one["ended"]]
        result[f"shared_{shared_mib}_mib"] = {
            "starts": len(own),
            "servers_ended": len(ended),
            "rate_upper_bound_95": round(upper_bound(len(ended), len(own)), 4) if own else None,
            "requests": {name: sum(one.get(name, 0) for one in own) for name in ("right", "wrong", "failed")},
            "starts_with_wrong_or_failed": sum(bool(one.get("wrong") or one.get("failed")) for one in own),
            "reasons": ended[:5],
            "messages": [message for one in own for message in one["messages"]][:5],
        }
    return result


def upper_bound(events: int, trials: int) -> float:
    """Return the largest rate at which so few events in so many trials still have a probability of 5 % (none: 3 / n).

    Examples
    --------
    >>> upper_bound(0, 200), round(upper_bound(2, 23), 2)
    (0.015, 0.25)
    """
    if not events:
        return min(1.0, 3 / trials)
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        at_most = sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))
        low, high = (rate, high) if at_most > 0.05 else (low, rate)
    return high


def main(arguments: list[str] | None = None) -> int:
    """Run the starts that the state file lacks, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="JSON lines, one per start")
    parser.add_argument("--starts", type=int, default=200, help="per amount of shared memory")
    parser.add_argument("--whole", action="store_true", help="the whole ensemble in place of the request transform")
    parser.add_argument("--report", action="store_true", help="start nothing more: write the result of what was done")
    chosen = parser.parse_args(arguments)
    seen = [json.loads(line) for line in chosen.state.read_text().splitlines()] if chosen.state.exists() else []
    if not chosen.report:
        verify_bundle(chosen.bundle, only=())
        with tempfile.TemporaryDirectory() as work:
            subject = (ensembles if chosen.whole else transforms)(chosen.bundle, Path(work))
            seen += run(subject, chosen.state, len(seen), 2 * chosen.starts)
    name = "reliability-starts-whole" if chosen.whole else "reliability-starts"
    report(name, {"clients": CLIENTS, "longest_session": LONGEST, **summary(seen)})
    return 1 if any(one["ended"] for one in seen) else 0


if __name__ == "__main__":
    run_as_command(main)
