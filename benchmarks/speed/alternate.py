"""Two checkouts of this package, alternating on one machine: processor time of the ranker, latency of the server.

    python -m benchmarks.speed.alternate --before ../earlier --bundle bundle/
    python -m benchmarks.speed.alternate --before ../earlier --bundle long/ --length 20 165 --ranker-only --name deep

Both rank the same sessions of random items, from the same bundle; results are compared. On a busy machine only the
ratios of one run count, and of them those of the processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_SIZES = (1, 16, 64)
"""Sessions per request."""
_REQUESTS, _WARM = 10, 3
_ROOT = Path(__file__).parents[2]
_OUTPUTS = ("item_id", "score", "n_items")


def requests_of(vocabulary: np.ndarray[Any, Any], size: int, length: int) -> list[dict[str, Any]]:
    """Return requests of ``size`` sessions with ``length`` items each, the same in every process."""
    rng = np.random.default_rng((size, length))
    return [
        {"item_ids": rng.choice(vocabulary, (size, length)), "length": np.full((size, 1), length, np.int32)}
        for _ in range(_REQUESTS)
    ]


def work(bundle: Path) -> None:
    """Answer lines of sessions, items and number of a request with its time in ms and its lists, until the end."""
    from missrec_t4r.serving.triton.backend import RankerBackend, SessionsBackend

    sessions, ranker = SessionsBackend(bundle), RankerBackend(bundle, threads=1)
    rows: dict[tuple[int, int], list[Any]] = {}
    for line in sys.stdin:
        size, length, number = map(int, line.split())
        if (size, length) not in rows:
            requests = requests_of(sessions.transform.wire_ids, size, length)
            rows[size, length] = [_valid(sessions.infer([one])) for one in requests]
        started = time.process_time_ns()
        responses = ranker.infer([rows[size, length][number]])
        spent = (time.process_time_ns() - started) / 1e6
        answer = _valid(responses)
        lists = {"items": answer["item_id"].astype(str).tolist(), "scores": answer["score"].tolist()}
        print(json.dumps({"ms": spent, **lists}), flush=True)


def processor_time(checkouts: Sequence[Path], bundle: Path, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the processor time of one request, before and after, by sessions and items per session."""
    command = [sys.executable, __file__, "--worker", "--bundle", str(bundle)]
    workers = [
        subprocess.Popen(command, env=_environment(one), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for one in checkouts
    ]
    found: dict[str, Any] = {}
    try:
        for length, size in itertools.product(lengths, _SIZES):
            times: list[list[float]] = [[], []]
            differing, apart = 0, 0.0
            for turn in range(-_WARM, rounds):
                pair = [_asked(worker, f"{size} {length} {turn % _REQUESTS}") for worker in workers]
                if turn >= 0:
                    for of, answer in zip(times, pair, strict=True):
                        of.append(answer["ms"])
                    differing += sum(a != b for a, b in zip(*(one["items"] for one in pair), strict=True))
                    apart = max(apart, float(np.abs(np.subtract(*(one["scores"] for one in pair))).max()))
            found[f"{size} x {length}"] = _compared(times) | {
                "lists_that_differ": differing,
                "largest_score_difference": apart,
            }
    finally:
        for worker in workers:
            worker.kill()
    return found


def latency(checkouts: Sequence[Path], bundle: Path, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the latency of one request through two servers that run at the same time, as `processor_time` does."""
    from missrec_t4r.bundle.item_table import load_session_transform
    from missrec_t4r.serving.client.transports import TritonTransport
    from missrec_t4r.serving.triton.local_server import LocalTriton
    from missrec_t4r.serving.triton.repository import write_repository

    found: dict[str, Any] = {}
    vocabulary = load_session_transform(bundle).wire_ids
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_repository(bundle, Path(folder) / "models", threads=1)
        transports = []
        for one in checkouts:
            with _python_path(one):
                server = stack.enter_context(LocalTriton(Path(folder) / "models"))
            transports.append(TritonTransport(server.grpc_url, "grpc", 60.0))
            stack.callback(transports[-1].close)
        for length, size in itertools.product(lengths, _SIZES):
            requests = requests_of(vocabulary, size, length)
            times: list[list[float]] = [[], []]
            for turn in range(-_WARM, rounds):
                for of, transport in zip(times, transports, strict=True):
                    started = time.perf_counter()
                    transport.infer("missrec", requests[turn % _REQUESTS], _OUTPUTS)
                    if turn >= 0:
                        of.append((time.perf_counter() - started) * 1e3)
            found[f"{size} x {length}"] = _compared(times)
    return found


def _valid(responses: Sequence[Any]) -> Any:
    (response,) = responses
    if isinstance(response, Exception):
        raise response
    return response


def _compared(times: Sequence[Sequence[float]]) -> dict[str, Any]:
    before, after = (np.array(of) for of in times)
    numbers = {
        name: {"median_ms": round(float(np.median(of)), 3), "least_ms": round(float(of.min()), 3)}
        for name, of in (("before", before), ("after", after))
    }
    return numbers | {
        "ratio_of_medians": round(float(np.median(after) / np.median(before)), 3),
        "ratio_of_least": round(float(after.min() / before.min()), 3),
        "pairs": len(before),
    }


def _asked(worker: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()
    answer: dict[str, Any] = json.loads(worker.stdout.readline())
    return answer


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout)}


@contextlib.contextmanager
def _python_path(checkout: Path) -> Iterator[None]:
    """Let the processes that are started meanwhile import the package of ``checkout``."""
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(checkout)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if kept is not None:
            os.environ["PYTHONPATH"] = kept


def _checkout(before: Path | None) -> Path:
    """Return the folder of the earlier version; one without the package would be measured as the later version."""
    from missrec_t4r.errors import ConfigError, DataError

    cure = "name one with --before, made for example with `git worktree add ../earlier COMMIT`"
    if before is None:
        raise ConfigError("no --before", "a checkout of the earlier version", cure)
    if not ((before / ".git").exists() and (before / "missrec_t4r").is_dir()):
        raise DataError(f"--before {before} is no checkout of this package", "one of the earlier version", cure)
    return before.resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the result, and print it as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier version; this one is the later")
    parser.add_argument("--bundle", type=Path, required=True, nargs="+", help="both versions must be able to load them")
    parser.add_argument("--length", type=int, nargs="+", default=[10], help="items per session")
    parser.add_argument(
        "--ranker-only", action="store_true", help="without servers, whose latency needs a quiet machine"
    )
    parser.add_argument("--name", default="serving-before-after", help="of the result file")
    parser.add_argument("--rounds", type=int, default=60, help="requests of each size to each version")
    parser.add_argument("--worker", action="store_true", help="used by this script itself")
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        work(chosen.bundle[0])
        return 0
    from benchmarks.measure import report
    from missrec_t4r.bundle.manifest import verify_bundle

    checkouts = [_checkout(chosen.before), _ROOT]
    for bundle in chosen.bundle:
        verify_bundle(bundle, only=())
    command = ["git", "-C", str(checkouts[0]), "rev-parse", "--short", "HEAD"]
    before = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    found: dict[str, Any] = {"before": before}
    for bundle in chosen.bundle:
        measured = checkouts, bundle, chosen.length, chosen.rounds
        found[bundle.name] = {"ranker_processor_time": processor_time(*measured)}
        if not chosen.ranker_only:
            found[bundle.name]["served_latency"] = latency(*measured)
    report(chosen.name, found)
    return 0


if __name__ == "__main__":
    if "--worker" in sys.argv:  # imports the package of its own checkout alone
        sys.exit(main())
    from benchmarks.measure import run_as_command

    run_as_command(main)
