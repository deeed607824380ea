"""Apply every mutant to a copy of the checkout, run the tests that should notice, and print the survivors.

    python -m tests.mutants.run [--jobs 2] [--only 'training/*']

The named tests run without a mutant first, and must pass. Outcomes are kept in ``work/mutants`` for the tree that they
belong to, so that an interrupted run goes on where it was. A whole run writes its result to ``benchmarks/results/``, as
``<date>-mutants.json``. Exit code 1 if a mutant survived.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from missrec_t4r.io.json_files import write_json
from tests.mutants.patches import ROOT, Mutant, apply, mutants

KEPT = ROOT / "work" / "mutants" / "outcomes.json"
SURVIVED, KILLED, TIMED_OUT, BROKEN = "survived", "killed", "timed out", "broken"
"""Broken: the patch does not apply, or its tests fail without it or cannot be collected: it says nothing about them."""
_SECONDS, _FACTOR = 300.0, 20.0
"""A mutant may take so long, plus so many times as long as its tests without it."""

Outcome = dict[str, Any]


class Runner:
    """Runs test files in copies of the checkout.

    Parameters
    ----------
    folder : Path
        An empty one, for the copies.
    jobs : int
        Test processes at once.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.base, self.jobs = folder, folder / "unmutated", jobs
        files = _files()
        for file in files:
            (self.base / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, self.base / file)
        self.tree = _digest(files)
        self.kept: dict[str, Outcome] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
        self.lock = threading.Lock()
        self.workers: queue.Queue[Worker] = queue.Queue()
        for number in range(jobs):
            self.workers.put(Worker(jobs, folder / f"worker-{number}.txt"))

    def run(self, chosen: Sequence[Mutant]) -> dict[str, Outcome]:
        """Return the outcome of every mutant by name; one whose tests fail without it is broken."""
        suites: dict[str, set[str]] = {}
        for test in sorted({test for mutant in chosen for test in mutant.tests}):
            suites.setdefault(test.partition("::")[0], set()).add(test)
        unmutated = _all("unmutated", list(suites), lambda file: self.unmutated(file, suites[file]), self.jobs)
        failing = {file for file, outcome in unmutated.items() if outcome["outcome"] != SURVIVED}
        seconds = {file: outcome["seconds"] for file, outcome in unmutated.items()}
        sound, broken = dict[str, Mutant](), dict[str, Outcome]()
        for mutant in chosen:
            if found := failing & {test.partition("::")[0] for test in mutant.tests}:
                broken[mutant.name] = _outcome(BROKEN, f"fails without a mutant: {' '.join(sorted(found))}", 0.0)
            else:
                sound[mutant.name] = mutant
        return broken | _all("mutants", list(sound), lambda name: self.mutated(sound[name], seconds), self.jobs)

    def unmutated(self, file: str, named: set[str]) -> Outcome:
        """Run the named tests of a file, or all of it, without a mutant."""
        tests = [file] if file in named else sorted(named)
        return self._kept_or(" ".join(tests), lambda: self._pytest(self.base, tests))

    def mutated(self, mutant: Mutant, seconds: dict[str, float]) -> Outcome:
        """Run the tests of a mutant; ``seconds`` is what the named tests of a file take without it."""

        def work() -> Outcome:
            copy = self.folder / mutant.name.replace("/", "-")
            shutil.copytree(self.base, copy)
            complaint = apply(mutant, copy)
            limit = _SECONDS + _FACTOR * sum(seconds[test.partition("::")[0]] for test in mutant.tests)
            outcome = _outcome(BROKEN, complaint, 0.0) if complaint else self._pytest(copy, mutant.tests, limit)
            shutil.rmtree(copy)
            return outcome

        return self._kept_or(f"{mutant.name} {hashlib.sha256(mutant.file.read_bytes()).hexdigest()[:16]}", work)

    def _pytest(self, tree: Path, tests: Iterable[str], limit: float | None = None) -> Outcome:
        worker = self.workers.get()
        try:
            return worker(tree, tests, limit)
        finally:
            self.workers.put(worker)

    def close(self) -> None:
        """End the workers."""
        while not self.workers.empty():
            self.workers.get().process.communicate()

    def _kept_or(self, key: str, work: Callable[[], Outcome]) -> Outcome:
        key = f"{self.tree} {key}"
        if key not in self.kept:
            outcome = work()
            with self.lock:
                self.kept[key] = outcome
                write_json(KEPT, self.kept)
        return self.kept[key]


def _all(title: str, names: Sequence[str], work: Callable[[str], Outcome], jobs: int) -> dict[str, Outcome]:
    """Run pieces of work side by side and print each outcome, with the rate and the time left."""
    started, done = time.monotonic(), dict[str, Outcome]()
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(work, name): name for name in names}
        for future in as_completed(running):
            name = running[future]
            outcome = done[name] = future.result()
            rate = len(done) / max(time.monotonic() - started, 1e-3)
            minutes = (len(names) - len(done)) / rate / 60
            said = "passed" if title == "unmutated" and outcome["outcome"] == SURVIVED else outcome["outcome"]
            pace = f"{len(done)}/{len(names)}, {60 * rate:.1f} a minute, {minutes:.0f} min left"
            print(f"{title} {pace}: {name} {said} {outcome['by']} ({outcome['seconds']:.0f} s)", flush=True)
    return {name: done[name] for name in names}


class Worker:
    """A process that has imported the libraries and runs tests in forks of itself (`tests.mutants.worker`)."""

    def __init__(self, jobs: int, output: Path) -> None:
        self.output = output
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, str(Path(__file__).parent / "worker.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, tree: Path, tests: Iterable[str], limit: float | None = None) -> Outcome:
        """Run test files in a tree until the first failure."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        started = time.monotonic()
        asked = {"tree": str(tree), "tests": list(tests), "output": str(self.output), "seconds": limit}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        seconds = time.monotonic() - started
        if code is None:
            return _outcome(TIMED_OUT, "", seconds)
        printed = self.output.read_text(errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
        outcome = {0: SURVIVED, 1: KILLED}.get(code, BROKEN)
        return _outcome(outcome, found[1] if found else printed[-500:] if outcome == BROKEN else "", seconds)


def _outcome(outcome: str, by: str, seconds: float) -> Outcome:
    return {"outcome": outcome, "by": by, "seconds": round(seconds, 1)}


def _files() -> list[str]:
    """Return the checkout's files but the patches."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in names if not name.endswith(".patch") and (ROOT / name).is_file()})


def _digest(files: Iterable[str]) -> str:
    """Return a hash of the code and of the tests that run."""
    digest = hashlib.sha256()
    for name in files:
        if name.startswith(("missrec_t4r/", "triton_models/", "tests/")) and not name.startswith("tests/mutants/"):
            digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="test processes at once")
    parser.add_argument("--only", default="", help="mutants whose package/name holds this or matches it: 'training/*'")
    options = parser.parse_args()
    chosen = [m for m in mutants() if options.only in m.name or fnmatch.fnmatch(m.name, options.only)]
    if not chosen:
        raise SystemExit(f"no mutant is called {options.only}")
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), options.jobs)
        try:
            outcomes = runner.run(chosen)
        finally:
            runner.close()
    counts = Counter(outcome["outcome"] for outcome in outcomes.values())
    left = {m.name: m.behaviour for m in chosen if outcomes[m.name]["outcome"] != KILLED}
    summary = {
        "mutants": len(chosen),
        **{name.replace(" ", "_"): counts[name] for name in (KILLED, SURVIVED, TIMED_OUT, BROKEN)},
        "survivors_share": round(counts[SURVIVED] / len(chosen), 4),
        "survivors": [name for name in left if outcomes[name]["outcome"] == SURVIVED],
    }
    for name, behaviour in left.items():
        print(f"{outcomes[name]['outcome']}: {name}: {behaviour} {outcomes[name]['by']}")
    if not options.only:
        each = {m.name: {"behaviour": m.behaviour, **outcomes[m.name]} for m in chosen}
        summary["result"] = write_result("mutants", {**summary, "packages": _by_package(outcomes), "each": each}).name
    print(json.dumps(summary))
    if left:
        raise SystemExit(1)


def _by_package(outcomes: dict[str, Outcome]) -> dict[str, dict[str, int]]:
    packages: dict[str, Counter[str]] = {}
    for name, outcome in outcomes.items():
        packages.setdefault(name.split("/")[0], Counter())[outcome["outcome"]] += 1
    return {name: dict(counter) for name, counter in packages.items()}


if __name__ == "__main__":
    main()
