"""Malformed requests against a real Triton: each gets a clear error, the server stays up, valid requests are answered.

    python -m benchmarks.reliability.hostile --bundle work/bundle --repository work/models --requests 20000 --state FILE

Every kind is drawn at random, over gRPC and HTTP, to the ensemble and straight to its parts. Each named kind has an
expected outcome: an error with a readable message, or a response, since unusual requests can be valid. Beside them go
requests that `generator` draws over all inputs; they may get either. Meanwhile other clients send good requests without
a pause, so that Triton puts them into the same batches; each response is compared with the offline result.

After every block of requests the counts are appended to the state file, and a repeated command continues there.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import report, run_as_command
from benchmarks.reliability.generator import hostile_request
from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.in_process import InProcessTransport
from missrec_t4r.serving.client.retry import Retries
from missrec_t4r.serving.client.transports import Transport, TritonTransport, translate_errors
from missrec_t4r.serving.deploy.smoke_test import differences, sample_sessions
from missrec_t4r.serving.triton.local_server import LocalTriton

Tensors = dict[str, Any]
ERROR, ANSWER, EITHER = "error", "answer", "either"
GENERATED = 40
"""Requests from the generator per round of the named kinds, for the ensemble and for the ranker each."""
SENDERS = 4
"""Threads that send hostile requests."""
GOOD_CLIENTS = 2
_PAUSE = 0.02
"""Seconds between two good requests of a client, so that the hostile ones get their share of the server."""
BLOCK = 1000
"""Requests after which the state is written."""
INPUTS = {
    "missrec": ("item_ids", "length", "top_k", "exclude_seen", "exclude", "allow", "rules", "reasons", "side"),
    "missrec_ranker": ("rows", "seen", "top_k", "exclude_seen", "exclude", "allow", "rules", "reasons", "side"),
}


@dataclass(frozen=True)
class Hostile:
    """One request and its expected outcome."""

    kind: str
    expected: str
    tensors: Tensors
    model: str = "missrec"
    outputs: tuple[str, ...] = ("item_id",)


def int32(*rows: list[int]) -> Any:
    """Return rows as a tensor of 32-bit integers."""
    return np.array(rows, np.int32)


def kinds(good: Tensors, chance: random.Random, generated: int) -> Iterator[Hostile]:
    """Yield one request of every kind and generated ones; ``good`` is a valid request for one session."""
    ids = good["item_ids"]
    strings = ids.dtype == object
    one = ids[:, :1]

    def but(kind: str, expected: str = ERROR, **changed: Any) -> Hostile:
        return Hostile(kind, expected, {**good, **changed})

    yield but("ids of another type", item_ids=np.array([[3]], np.int64) if strings else np.array([[b"a"]], object))
    yield but("ids of floats", item_ids=np.array([[1.5]], np.float32))
    yield but("length of another type", length=np.array([[1]], np.int64))
    yield but("length of bools", length=np.array([[True]]))
    yield but("top_k of another type", top_k=np.array([[3]], np.int64))
    yield but("exclude_seen of integers", exclude_seen=int32([1]))
    yield but("one axis", item_ids=ids[0])
    yield but("three axes", item_ids=ids[None])
    yield but("another batch", length=int32([1], [1]))
    yield but("two lengths per session", length=int32([1, 1]))
    yield but("length beyond the width", length=int32([ids.shape[1] + chance.randint(1, 2**30)]))
    yield but("negative length", length=int32([-chance.randint(1, 2**31 - 1)]))
    yield but("top_k of 0", top_k=int32([0]))
    yield but("negative top_k", top_k=int32([-chance.randint(1, 2**31 - 1)]))
    yield but("top_k beyond the catalogue", ANSWER, top_k=int32([2**31 - 1]))
    yield but("empty batch", item_ids=ids[:0], length=int32([0])[:0])
    yield but("empty session", ANSWER, length=int32([0]))
    yield but("no width", ANSWER, item_ids=ids[:, :0], length=int32([0]))
    yield but("session of 10 MB", item_ids=np.repeat(one, 700_000, 1), length=int32([700_000]))
    yield but(
        "ids that are missing", ANSWER, item_ids=np.full_like(one, b"" if strings else -(2**63)), length=int32([1])
    )
    if strings:
        yield but("one id of 5 MB", ANSWER, item_ids=np.array([[b"x" * 5_000_000]], object), length=int32([1]))
        yield but("ids that are not UTF-8", ANSWER, item_ids=np.array([[b"\xff\xfe\x00"]], object), length=int32([1]))
        yield but("ids with zero bytes", ANSWER, item_ids=np.array([[b"a\0b"]], object), length=int32([1]))
    else:
        yield but("huge ids", ANSWER, item_ids=np.array([[2**63 - 1]], np.int64), length=int32([1]))
        yield but("negative ids", ANSWER, item_ids=np.array([[-chance.randint(1, 2**62)]], np.int64), length=int32([1]))
    yield but("1,000 excludes", ANSWER, exclude=np.repeat(one, 1000, 1))
    yield but("an allow list of unknown ids", ANSWER, allow=np.full_like(one, b"stranger" if strings else -7))
    yield but("excludes of another type", exclude=np.array([[1.0]], np.float64))
    for words, text in RULES.items():
        yield but(f"rules: {words}", rules=np.array([[text]], object))
    yield but("rules: none", ANSWER, rules=np.array([[b" "]], object))
    yield but("event features of nothing", side=np.array([[b'{"mood": [NaN]}']], object))
    yield but("event features nested without end", side=np.array([[b"[" * 30_000]], object))
    yield but("event features of 400 digits", side=np.array([[b'{"dwell": [1' + b"0" * 400 + b"]}"]], object))
    yield but("event features that are not JSON", side=np.array([[b"\xff{"]], object))
    yield but("event features of 3 MB", side=np.array([[b" " * 3_000_000]], object))
    yield but("100,000 excludes", exclude=np.repeat(one, 100_000, 1))
    yield but("a tensor that is no input", password=int32([1]))
    yield Hostile("no ids", ERROR, {"length": int32([1])})
    yield Hostile("no length", ERROR, {"item_ids": ids})
    yield Hostile("a model that is not there", ERROR, good, model=f"missrec_{chance.randint(0, 99)}")
    yield Hostile("an output that is not there", ERROR, good, outputs=("weights",))
    for words, row in (("negative", -1), ("huge", 2**62), ("one too many", 10**9)):
        rows = np.array([[row]], np.int64)
        for name in ("rows", "seen"):
            tensors = {"rows": np.array([[3]], np.int64), "seen": np.array([[3]], np.int64), name: rows}
            yield Hostile(f"{name} straight to the ranker: {words}", ERROR, tensors, model="missrec_ranker")
    yield Hostile(
        "ragged rows and seen", ERROR, {"rows": np.array([[3, 4]]), "seen": np.array([[3]])}, "missrec_ranker"
    )
    for model, inputs in INPUTS.items():
        base = good if model == "missrec" else {"rows": np.array([[3, 4]]), "seen": np.array([[3, 4]])}
        for _ in range(generated):
            tensors = hostile_request(chance, base, inputs, rich=chance.random() < 0.03)
            yield Hostile(f"generated for {model}", EITHER, tensors, model)


RULES = {
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "no object": b"[1, 2]",
    "nested without end": b'{"where": ' + b"[" * 30_000 + b"}",
    "too long": b'{"where": {"a": "' + b"x" * 70_000 + b'"}}',
    "an unknown column": b'{"where": {"__class__": "x"}}',
    "an unknown part": b'{"select": "*"}',
    "NaN": b'{"where": {"train_count": {"min": NaN}}}',
    "a cap of 0": b'{"at_most": {"train_count": 0}}',
    "a cap that is not a number": b'{"at_most": {"train_count": "many"}}',
    "a condition of another type": b'{"where": {"train_count": "many"}}',
    "a nested condition": b'{"where": {"train_count": {"min": {"min": 1}}}}',
}

RAW: dict[str, tuple[bytes, dict[str, str]]] = {
    "no JSON": (b"\x00\xff{", {}),
    "no inputs": (b"{}", {}),
    "inputs that are no list": (b'{"inputs": 3}', {}),
    "a shape that lies": (
        b'{"inputs": [{"name": "item_ids", "datatype": "BYTES", "shape": [1, 1000000000], "data": ["a"]}]}',
        {},
    ),
    "a negative shape": (b'{"inputs": [{"name": "item_ids", "datatype": "BYTES", "shape": [-1], "data": ["a"]}]}', {}),
    "a datatype that is none": (
        b'{"inputs": [{"name": "item_ids", "datatype": "PICKLE", "shape": [1], "data": []}]}',
        {},
    ),
    "a header beyond the body": (b'{"inputs": []}', {"Inference-Header-Content-Length": "99999"}),
    "a negative header": (b'{"inputs": []}', {"Inference-Header-Content-Length": "-3"}),
    "binary data that is not there": (
        b'{"inputs":[{"name":"length","datatype":"INT32","shape":[1,1],"parameters":{"binary_data_size":4}}]}',
        {"Inference-Header-Content-Length": "99"},
    ),
    "nulls": (b'{"inputs": [{"name": "item_ids", "datatype": "BYTES", "shape": [1, 1], "data": [null]}]}', {}),
    "nested 1,000 deep": (b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}", {}),
}


class Attack:
    """Sends malformed requests and counts the outcomes.

    Parameters
    ----------
    server : LocalTriton
    bundle : Path
        Of the served model: the good requests are compared with it.
    seed : int
    generated : int
        Requests from the generator per round, for each of the two models.
    """

    def __init__(self, server: LocalTriton, bundle: Path, seed: int = 0, generated: int = GENERATED) -> None:
        self.server, self.chance, self.generated = server, random.Random(seed), generated
        self.sessions = sample_sessions(bundle, 8)
        transport = InProcessTransport(bundle)
        columns = transport.ranker.event_features.columns.values()
        self.options: list[dict[str, Any]] = [
            {},
            {"exclude_seen": True, "reasons": True},
            {"rules": {"where": {"train_count": {"min": 1}}, "at_most": {"train_count": 3}}},
            {
                "side": [
                    {column.name: column.decode(column.encode([None] * len(one))) for column in columns} or None
                    for one in self.sessions
                ]
            },
        ]
        with MISSRecClient("offline", transport=transport) as offline:
            self.expected = [offline.recommend(self.sessions, 10, **options) for options in self.options]
            self.good: Tensors = next(iter(_requests(offline, self.sessions[2:3])))
        self.sent: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.good_answers = 0
        self._lock = threading.Lock()

    def run(self, requests: int) -> dict[str, Any]:
        """Send so many requests while other clients send good ones, and return the counts."""
        started, before = time.monotonic(), self.good_answers
        self.sent.clear()
        self.outcomes.clear()
        stop, queue = threading.Event(), self._drawn(requests)
        good = [threading.Thread(target=self._good_client, args=(stop, number)) for number in range(GOOD_CLIENTS)]
        senders = [threading.Thread(target=self._sender, args=(queue,)) for _ in range(SENDERS)]
        for thread in (*good, *senders):
            thread.start()
        for thread in senders:
            thread.join()
        stop.set()
        for thread in good:
            thread.join()
        self.server.check_alive()
        return {
            "requests": sum(self.sent.values()),
            "kinds": dict(self.sent),
            "outcomes": dict(self.outcomes),
            "good_requests_beside": self.good_answers - before,
            "wrong": self.wrong[:20],
            "seconds": round(time.monotonic() - started, 1),
        }

    def _drawn(self, requests: int) -> Iterator[tuple[Hostile | str, str]]:
        """Yield requests and the protocol of each."""
        while requests > 0:
            round_ = [*kinds(self.good, self.chance, self.generated), *RAW]
            self.chance.shuffle(round_)
            for hostile in round_[:requests]:
                yield hostile, self.chance.choice(("grpc", "http"))
            requests -= len(round_)

    def _sender(self, queue: Iterator[tuple[Hostile | str, str]]) -> None:
        """Send what is left in the queue."""
        transports = {
            "grpc": TritonTransport(self.server.grpc_url, "grpc", 60),
            "http": TritonTransport(self.server.http_url, "http", 60),
        }
        while True:
            with self._lock:
                hostile, protocol = next(queue, (None, ""))
            if isinstance(hostile, str):
                self._raw(hostile)
            elif hostile is not None:
                self._send(hostile, transports[protocol], protocol)
            else:
                break
        for transport in transports.values():
            transport.close()

    def _count(self, kind: str, outcome: str) -> None:
        with self._lock:
            self.sent[kind] += 1
            self.outcomes[outcome] += 1

    def _send(self, hostile: Hostile, transport: Transport, name: str) -> None:
        try:
            with translate_errors(name, hostile.model, 60):
                answer = transport.infer(hostile.model, hostile.tensors, hostile.outputs)
        except ServingError as error:
            outcome = "refused"
            if hostile.expected == ANSWER:
                self.wrong.append(f"{hostile.kind} over {name} was refused: {error}"[:300])
            elif len(str(error)) < 20 or "no answer from" in str(error) or "Traceback" in str(error):
                self.wrong.append(f"{hostile.kind} over {name} got no clear error: {str(error)[:300]}")
        except Exception as error:  # the client library's own refusal, before anything is sent
            outcome = "refused by the client library"
            if hostile.expected == ANSWER or isinstance(error, (OSError, EOFError)):
                self.wrong.append(f"{hostile.kind} over {name} broke the client: {error!r}"[:300])
        else:
            outcome = "answered"
            refused = answer.get(hostile.outputs[0]) is None
            if hostile.expected == ERROR and not refused:
                self.wrong.append(f"{hostile.kind} over {name} was answered")
        self._count(hostile.kind, outcome)

    def _raw(self, kind: str) -> None:
        body, headers = RAW[kind]
        connection = http.client.HTTPConnection(self.server.http_url, timeout=60)
        try:
            connection.request("POST", "/v2/models/missrec/infer", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status < 400 or not json.loads(text).get("error"):
                self.wrong.append(f"HTTP {kind}: {answer.status} {text[:200]!r}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.wrong.append(f"HTTP {kind}: no clear error ({error!r})")
        finally:
            connection.close()
            self._count(f"HTTP: {kind}", "refused")

    def _good_client(self, stop: threading.Event, number: int) -> None:
        """Send good requests, without a second attempt, and compare every response."""
        with MISSRecClient(self.server.grpc_url, timeout=60, retries=Retries(attempts=1)) as client:
            while True:
                which = (self.good_answers + number) % len(self.options)
                try:
                    answers = client.recommend(self.sessions, 10, **self.options[which])
                except Exception as error:  # every one counts
                    self.wrong.append(f"good request failed: {error!r}"[:300])
                else:
                    wrong, largest = differences(answers, self.expected[which])
                    if wrong or largest > 1e-5:
                        self.wrong.append(f"good request: {wrong} sessions wrong, scores by {largest}")
                with self._lock:
                    self.good_answers += 1
                if stop.wait(_PAUSE):
                    return


def _requests(client: MISSRecClient, sessions: Any) -> Any:
    from missrec_t4r.serving.client.protocol import requests_of

    return requests_of(sessions, 10, client.description)


def merged(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all blocks."""
    kinds_sent: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for block in blocks:
        kinds_sent.update(block["kinds"])
        outcomes.update(block["outcomes"])
    total: dict[str, Any] = {
        name: sum(block[name] for block in blocks) for name in ("requests", "good_requests_beside", "seconds")
    }
    return {
        **total,
        "kinds": len(kinds_sent),
        "generated": sum(count for kind, count in kinds_sent.items() if kind.startswith("generated")),
        "outcomes": dict(outcomes),
        "wrong": [one for block in blocks for one in block["wrong"]][:20],
        "resident_mib": {"first": blocks[0]["resident_mib"][0], "last": blocks[-1]["resident_mib"][1]},
        "servers": 1 + sum(block["restarted"] for block in blocks[1:]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Send malformed requests to the embedded server, write the result, and print it as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--state", type=Path, required=True, help="JSON lines, one per block of requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="send nothing more: write the result of what was done")
    chosen = parser.parse_args(arguments)
    lines = chosen.state.read_text().splitlines() if chosen.state.exists() else []
    blocks = [json.loads(line) for line in lines]
    if not chosen.report:
        _attack(chosen, blocks)
    if not blocks:
        raise ConfigError(
            f"{chosen.state} holds no block of requests", "a state file", "leave --report out to send some"
        )
    result = merged(blocks)
    report("reliability-hostile", result)
    return 1 if result["wrong"] else 0


def _attack(chosen: argparse.Namespace, blocks: list[dict[str, Any]]) -> None:
    """Send the blocks of requests that are missing."""
    verify_bundle(chosen.bundle, only=())  # before a server starts
    restarted = True
    with LocalTriton(chosen.repository) as server:
        while (done := sum(block["requests"] for block in blocks)) < chosen.requests:
            attack = Attack(server, chosen.bundle, chosen.seed + len(blocks), generated=200)
            before = _resident(server.pid)
            block = attack.run(min(BLOCK, chosen.requests - done))
            block |= {"resident_mib": [before, _resident(server.pid)], "restarted": restarted}
            blocks.append(block)
            with chosen.state.open("a") as file:
                file.write(json.dumps(block) + "\n")
            restarted = False


def _resident(group: int) -> float:
    """Return the memory of the server and its models, MiB."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                total += int((entry / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return round(total * 4096 / 2**20, 1)


if __name__ == "__main__":
    run_as_command(main)
