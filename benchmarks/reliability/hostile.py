"""Malformed requests against a real Triton: each gets a clear error, the server stays up, valid requests are answered.

    python -m benchmarks.reliability.hostile --bundle work/bundle --repository work/models --requests 10000

Every kind is drawn at random, over gRPC and HTTP, to the ensemble and straight to its parts. Each kind has an expected
outcome: an error with a readable message, or a response, since unusual requests can be valid.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.transports import Transport, open_transport, translate_errors
from missrec_t4r.serving.deploy.smoke_test import differences, sample_sessions
from missrec_t4r.serving.triton.local_server import LocalTriton

Tensors = dict[str, Any]
ERROR, ANSWER = "error", "answer"


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


def kinds(good: Tensors, chance: random.Random) -> Iterator[Hostile]:
    """Yield one request of every kind; ``good`` is a valid request for one session."""
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
        yield but("ids that are no UTF-8", ANSWER, item_ids=np.array([[b"\xff\xfe\x00"]], object), length=int32([1]))
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
    yield but("side features of nothing", side=np.array([[b'{"mood": [NaN]}']], object))
    yield but("side features nested without end", side=np.array([[b"[" * 30_000]], object))
    yield but("side features of 400 digits", side=np.array([[b'{"dwell": [1' + b"0" * 400 + b"]}"]], object))
    yield but("side features that are no JSON", side=np.array([[b"\xff{"]], object))
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
    "a cap that is no number": b'{"at_most": {"train_count": "many"}}',
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
    """

    def __init__(self, server: LocalTriton, bundle: Path, seed: int = 0) -> None:
        self.server, self.chance = server, random.Random(seed)
        self.transports: dict[str, Transport] = {
            "grpc": open_transport(server.grpc_url, "grpc", 60),
            "http": open_transport(server.http_url, "http", 60),
        }
        self.client = MISSRecClient(server.grpc_url, timeout=60)
        self.sessions = sample_sessions(bundle, 8)
        with MISSRecClient.of_bundle(bundle) as offline:
            self.expected = offline.recommend(self.sessions, 10)
            request = next(iter(_requests(offline, self.sessions[2:3])))
        self.good = request
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, requests: int, every: int = 20) -> dict[str, Any]:
        """Send so many requests, with a valid one after ``every`` of them, and return the counts."""
        started, done, good = time.monotonic(), 0, 0
        while done < requests:
            round_ = [*kinds(self.good, self.chance), *RAW]
            self.chance.shuffle(round_)
            for hostile in round_[: requests - done]:
                self._raw(hostile) if isinstance(hostile, str) else self._send(hostile)
                done += 1
                if done % every == 0:
                    good += self._good_request(f"after {done} requests")
            self.server.check_alive()
        good += self._good_request("at the end")
        return {
            "requests": done,
            "kinds": len(self.sent),
            "good_requests_between": good,
            "wrong": self.wrong[:20],
            "seconds": round(time.monotonic() - started, 1),
        }

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        for transport in self.transports.values():
            transport.close()

    def _send(self, hostile: Hostile) -> None:
        self.sent[hostile.kind] += 1
        name = self.chance.choice(("grpc", "http"))
        try:
            with translate_errors(name, hostile.model, 60):
                answer = self.transports[name].infer(hostile.model, hostile.tensors, hostile.outputs)
        except ServingError as error:
            if hostile.expected == ANSWER:
                self.wrong.append(f"{hostile.kind} over {name} was refused: {error}")
            elif len(str(error)) < 20 or "no answer from" in str(error) or "Traceback" in str(error):
                self.wrong.append(f"{hostile.kind} over {name} got no clear error: {str(error)[:300]}")
        except Exception as error:  # the client library's own refusal, before anything is sent
            if hostile.expected == ANSWER or isinstance(error, (OSError, EOFError)):
                self.wrong.append(f"{hostile.kind} over {name} broke the client: {error!r}")
        else:
            refused = answer.get(hostile.outputs[0]) is None
            if hostile.expected == ERROR and not refused:
                self.wrong.append(f"{hostile.kind} over {name} was answered")

    def _raw(self, kind: str) -> None:
        self.sent[f"HTTP: {kind}"] += 1
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

    def _good_request(self, when: str) -> int:
        answers = self.client.recommend(self.sessions, 10)
        wrong, largest = differences(answers, self.expected)
        if wrong or largest > 1e-5:
            self.wrong.append(f"good request {when}: {wrong} sessions wrong, scores by {largest}")
        return 1


def _requests(client: MISSRecClient, sessions: Any) -> Any:
    from missrec_t4r.serving.client.protocol import requests_of

    return requests_of(sessions, 10, client.description)


def main(arguments: list[str] | None = None) -> int:
    """Send malformed requests to the embedded server and print the counts as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    with LocalTriton(chosen.repository) as server:
        attack = Attack(server, chosen.bundle, chosen.seed)
        before = _resident(server.pid)
        result = attack.run(chosen.requests)
        result["resident_mib"] = {"before": before, "after": _resident(server.pid)}
        attack.close()
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


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
    _run: Callable[[], int] = main
    sys.exit(_run())
