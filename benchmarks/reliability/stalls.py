"""What happens when a model's process gets no time on the processor for a while, as on a machine busy elsewhere?

    python -m benchmarks.reliability.stalls --bundle work/demo/shop/bundle --trials 10

In each trial a new server loads a version, then the ranker's process is stopped for two seconds (``SIGSTOP``) and goes
on: in half of the trials the one of a second version, at a random moment of its first one and a half seconds, and in
half of them the one that serves, with a request under way. Then ten requests are sent, and every response is compared.
``--as-before`` takes away what `missrec_t4r.serving.triton.stubs` does. The bundle is the demo's or any other.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measure import report, run_as_command
from benchmarks.reliability.starts import Subject, ensembles
from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.errors import MISSRecError
from missrec_t4r.serving.triton import local_server, model_control, stubs
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.model_control import SilentError

STOPPED_SECONDS = 2.0
LATEST_SECONDS = 1.5
HUNG_SECONDS = 30.0
"""A load that has not answered by then is counted as one that never does; it takes a few seconds otherwise."""
REQUESTS = 10


def stop_for_a_while(server: int, model: str, delay: float) -> None:
    """Stop the process of a model once it is there for ``delay`` seconds, and let it go on."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for stub in stubs.stubs_of(server).values():
            if stub.model.startswith(model):
                time.sleep(delay)
                os.kill(stub.pid, signal.SIGSTOP)
                time.sleep(STOPPED_SECONDS)
                with suppress(ProcessLookupError):  # it was ended meanwhile
                    os.kill(stub.pid, signal.SIGCONT)
                return
        time.sleep(0.02)


def outcome(action: Callable[[], object]) -> str:
    """Return in a word what became of a load or request."""
    try:
        return "right" if action() is not False else "wrong"
    except SilentError:
        return "hung"
    except Exception as error:
        return "gave up" if stubs.UNHEALTHY in str(error) else "failed"


def trial(subject: Subject, what: str, chance: random.Random) -> dict[str, Any]:
    """Stop a process while ``what``, ``load`` or ``request``, is under way; return what became of it and the server."""
    with LocalTriton(subject.repository, arguments=("--model-control-mode=explicit",)) as server:
        server.control.load(subject.first)
        model = (subject.second if what == "load" else subject.first).replace("missrec", "missrec_ranker")
        delay = chance.uniform(0, LATEST_SECONDS) if what == "load" else 0.0
        stopper = threading.Thread(target=stop_for_a_while, args=(server.pid, model, delay))
        with subject.connect(server.grpc_url) as send:
            send(chance)
            stopper.start()
            if what == "load":
                met = outcome(lambda: server.control.load(subject.second))
            else:
                time.sleep(0.5)
                met = outcome(lambda: send(chance))
            stopper.join()
            after = collections.Counter(outcome(lambda: send(chance)) for _ in range(REQUESTS))
        try:
            server.check_alive()
        except MISSRecError as error:
            return {"what": what, "delay": round(delay, 2), "met": met, "after": after, "ended": str(error)[:300]}
    return {"what": what, "delay": round(delay, 2), "met": met, "after": after}


def summary(seen: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Return the counts of one kind of trial."""
    own = [one for one in seen if one["what"] == what]
    return {
        "trials": len(own),
        "met": dict(collections.Counter(one["met"] for one in own)),
        "servers_ended": sum("ended" in one for one in own),
        "requests_after": dict(sum((collections.Counter(one["after"]) for one in own), collections.Counter())),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10, help="of each kind")
    parser.add_argument("--as-before", action="store_true", help="no process is ended, and no load repeated")
    chosen = parser.parse_args(arguments)
    verify_bundle(chosen.bundle, only=())
    chance, seen = random.Random(0), []
    before = (
        mock.patch.multiple(model_control, _LOADS=1) if chosen.as_before else nullcontext(),
        mock.patch.object(local_server, "StubWatch") if chosen.as_before else nullcontext(),
        mock.patch.multiple(model_control, _LOAD_SECONDS=HUNG_SECONDS),
    )
    with tempfile.TemporaryDirectory() as work, before[0], before[1], before[2]:
        subject = ensembles(chosen.bundle, Path(work))
        for number in range(2 * chosen.trials):
            seen.append(trial(subject, ("load", "request")[number % 2], chance))
            print(json.dumps(seen[-1]), flush=True)
    name = "reliability-stalls-before" if chosen.as_before else "reliability-stalls"
    report(name, {"stopped_seconds": STOPPED_SECONDS, **{what: summary(seen, what) for what in ("load", "request")}})
    return 0


if __name__ == "__main__":
    run_as_command(main)
