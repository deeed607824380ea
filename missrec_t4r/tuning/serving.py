"""``missrec tune serving``: instances, threads and batching of a model repository, chosen by measuring this machine.

Each setting is served by a real Triton for some seconds: latency of one session and of sixty-four, and how many
sessions per second clients get that send one each and wait. One kind of setting is varied after the other, the best of
the others held, until all are measured or the time is over. Chosen is the highest throughput among the settings whose
latency stays near the best one; a setting wins only by more than what two measurements of one setting differ by.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.config.checks import require_at_least, require_positive
from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.serving.client.transports import Arrays, TritonTransport
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.load import answers_per_second, latency, message
from missrec_t4r.serving.triton.deployment import bundle_of, current_version, is_deployment
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.model_config import configure, settings_of
from missrec_t4r.serving.triton.model_control import Control
from missrec_t4r.serving.triton.repository import (
    BUNDLE_IN_REPOSITORY,
    ENSEMBLE,
    RANKER,
    ServingSettings,
    described,
    fill_repository,
)

log = logging.getLogger(__name__)

INTERRUPT: Final = "interrupt"
_OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "fallback")
_SMALL, _LARGE = 1, 64
"""Sessions of a request whose latency is measured; Triton's batches are at least as large."""
_ITEMS = 10
"""Items of a session."""
_NEAR = 1.25
"""Without a limit: the latency of one session may be at most so many times the lowest measured one."""
_GAIN = 1.05
"""More sessions per second than this factor are a gain."""
_TIMEOUT = 60.0


class Measured(NamedTuple):
    """Latency and throughput of one setting."""

    settings: ServingSettings
    p50_1: float
    p99_1: float
    p50_64: float
    p99_64: float
    """Milliseconds of requests of one and of 64 sessions, one after the other."""
    sessions_per_s: float
    """All clients together."""


def tune_serving(
    repository: str | Path,
    *,
    minutes: float = 3.0,
    limit_ms: float = 0.0,
    clients: int = 16,
    seconds: float = 2.0,
    trials: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Measure instances, threads, batch sizes and queue delays on this machine and write the best to a repository.

    Parameters
    ----------
    repository : path
        Model repository of `missrec export --triton`, whose settings are changed in place (restart its server), or
        deployment folder of `missrec deploy`, which gets a new version with the same bundle.
    minutes : float
        No further setting is measured after this time.
    limit_ms : float
        Highest p50 of a request of one session; by default 1.25 times the lowest one measured.
    clients : int
        Clients that send one session each and wait, for sessions per second; as many as your service has at a time.
    seconds : float
        Of each of the three measurements of a setting.
    trials : int
        At most this many settings; 0 for no limit.
    dry_run : bool
        Measure and print, change nothing.

    Returns
    -------
    dict
        Every measured setting, the chosen one, why it was chosen, and what was written.

    Raises
    ------
    ConfigError
        The folder holds nothing that can be served, or a number is too small.
    ServingError
        The present settings cannot be served on this machine.
    """
    require_positive(minutes=minutes, clients=clients, seconds=seconds)
    require_at_least(0, limit_ms=limit_ms, trials=trials)
    folder = Path(repository).absolute()
    bundle, present = _served(folder)
    if is_deployment(folder) and Control.find(folder) is not None:
        log.warning(f"a server of {folder} is running: its traffic slows what is measured here")
    with tempfile.TemporaryDirectory(prefix="missrec-tune-") as temporary:
        trial = Path(temporary) / "models"
        trial.mkdir()
        fill_repository(trial, bundle, present, linked=True)
        search = _Search(trial, _requests(bundle, present), clients, seconds)
        stopped_by = search.run(present, 60 * minutes, trials, limit_ms)
    chosen, why = choose(search.measured, limit_ms)
    written = {} if dry_run or stopped_by == INTERRUPT else _write(folder, present, chosen.settings)
    return {
        "repository": str(folder),
        "stopped_by": stopped_by,
        "tried": [_row(result, result is chosen) for result in search.measured],
        "refused": search.refused,
        "chosen": chosen.settings._asdict(),
        "why": why,
        "changed": bool(written),
        **written,
    }


def choose(measured: Sequence[Measured], limit_ms: float = 0.0) -> tuple[Measured, str]:
    """Return the best of the measured settings and why; the first of them is the present one.

    Examples
    --------
    >>> one, two = ServingSettings(), ServingSettings(instances=2)
    >>> best, why = choose([Measured(one, 2.0, 3.0, 9.0, 9.9, 500.0), Measured(two, 2.2, 4.0, 9.5, 9.9, 800.0)])
    >>> best.settings.instances, why
    (2, '1.60 times the sessions/s of the present settings, p50 of one session 2.20 ms (limit 2.50 ms)')
    """
    present = measured[0]
    limit = limit_ms or _NEAR * min(result.p50_1 for result in measured)
    allowed = [result for result in measured if result.p50_1 <= limit]
    if not allowed:
        best = min(measured, key=lambda result: result.p50_1)
        return best, f"no setting reaches {limit:.2f} ms for one session; this one has the lowest p50"
    best = allowed[0]
    for result in allowed[1:]:
        if result.sessions_per_s > _GAIN * best.sessions_per_s:
            best = result
    if len(measured) == 1:
        return best, "no other setting was measured; give more --minutes or --trials"
    if best is present:
        return best, f"no other setting within the limit of {limit:.2f} ms has {_GAIN:.2f} times its sessions/s"
    if allowed[0] is not present:
        words = f"the most sessions/s with p50 of one session up to {limit:.2f} ms, which the present settings exceed"
    else:
        words = f"{best.sessions_per_s / present.sessions_per_s:.2f} times the sessions/s of the present settings, "
        words += f"p50 of one session {best.p50_1:.2f} ms (limit {limit:.2f} ms)"
    return best, words


def kinds(present: ServingSettings, cores: int) -> Iterator[list[dict[str, Any]]]:
    """Yield what is varied, one kind of setting after the other; ``max_batch_size`` is never lowered.

    Examples
    --------
    >>> [len(kind) for kind in kinds(ServingSettings(), 4)]
    [3, 3, 4, 3]
    """
    counts = [n for n in (1, 2, 4, 8) if n <= cores]
    yield [{"instances": n} for n in counts]
    yield [{"threads": n} for n in counts]
    yield [
        {"queue_delay_us": delay, "preferred_batch_size": preferred}
        for delay, preferred in ((0, 0), (200, 0), (1000, 0), (1000, 16))
    ]
    yield [{"max_batch_size": factor * present.max_batch_size} for factor in (1, 2, 4)]


class _Search:
    """Measurements of one repository under changing settings.

    Parameters
    ----------
    repository : Path
        A copy whose configurations may be changed.
    requests : mapping of int to sequence
        Requests by their number of sessions, one and many.
    clients : int
    seconds : float
        Of each measurement.
    """

    def __init__(self, repository: Path, requests: dict[int, list[Arrays]], clients: int, seconds: float) -> None:
        self.repository, self.requests, self.clients, self.seconds = repository, requests, clients, seconds
        self.measured: list[Measured] = []
        self.refused: list[str] = []
        """Settings that could not be served, with the reason."""

    def run(self, present: ServingSettings, seconds: float, trials: int, limit_ms: float) -> str:
        """Measure until everything is measured, the time is over or the user interrupts; return which of them."""
        started = time.monotonic()
        ends = started + seconds
        self.measured.append(self._measure(present))
        longest = time.monotonic() - started
        known = {present}
        try:
            for kind in kinds(present, len(os.sched_getaffinity(0))):
                best = choose(self.measured, limit_ms)[0].settings
                for change in kind:
                    settings = best._replace(**change)
                    if settings in known:
                        continue
                    if trials and len(known) >= trials:
                        return "trials"
                    if time.monotonic() + longest > ends:
                        return "minutes"
                    known.add(settings)
                    started = time.monotonic()
                    try:
                        self.measured.append(self._measure(settings))
                    except ServingError as error:  # such as a GPU without room for another instance
                        self.refused.append(f"{described(settings)}: {error}")
                        log.warning(f"{described(settings)} cannot be served: {error}")
                    longest = max(longest, time.monotonic() - started)
        except KeyboardInterrupt:
            return INTERRUPT
        return "settings"

    def _measure(self, settings: ServingSettings) -> Measured:
        configure(self.repository, settings)
        with LocalTriton(self.repository, http=False) as server:
            transport = TritonTransport(server.grpc_url, "grpc", _TIMEOUT)
            with closing(transport):
                small, large = (
                    latency(lambda request: transport.infer(ENSEMBLE, request, _OUTPUTS), requests, self.seconds)
                    for requests in self.requests.values()
                )
            messages = [message(ENSEMBLE, request, _OUTPUTS) for request in self.requests[_SMALL]]
            rate = answers_per_second(server.grpc_url, messages, self.clients, self.seconds)
        log.info(
            f"{described(settings)}: p50 of 1 session {small['p50']:.2f} ms, of 64 {large['p50']:.2f} ms; "
            f"{rate:,.0f} sessions/s"
        )
        return Measured(settings, small["p50"], small["p99"], large["p50"], large["p99"], rate)


def _served(folder: Path) -> tuple[Path, ServingSettings]:
    """Return the bundle of a model repository or deployment folder and its settings."""
    if is_deployment(folder):
        version = current_version(folder)
        if version is not None:
            return bundle_of(folder, version), settings_of(folder / f"{RANKER}_v{version}")
    elif (folder / BUNDLE_IN_REPOSITORY).is_dir():
        return folder / BUNDLE_IN_REPOSITORY, settings_of(folder / RANKER)
    raise ConfigError(
        f"{folder} holds no model that can be served",
        "a model repository, or a deployment folder with a version",
        "write one with `missrec export --triton`, or deploy a bundle with `missrec deploy`",
    )


def _requests(bundle: Path, present: ServingSettings) -> dict[int, list[Arrays]]:
    """Return random sessions of the bundle's items, by their number per request."""
    if present.max_batch_size < _LARGE:
        raise ConfigError(
            f"max_batch_size {present.max_batch_size}",
            f"at least {_LARGE}, whose latency is measured",
            "write the repository again, or deploy with --max-batch-size 64",
        )
    ids, rng = load_session_transform(bundle).wire_ids, np.random.default_rng(0)

    def request(size: int) -> Arrays:
        chosen = ids[rng.integers(0, len(ids), (size, _ITEMS))]
        return {"item_ids": chosen, "length": np.full((size, 1), _ITEMS, np.int32)}

    return {size: [request(size) for _ in range(n)] for size, n in ((_SMALL, 50), (_LARGE, 10))}


def _write(folder: Path, present: ServingSettings, chosen: ServingSettings) -> dict[str, Any]:
    """Write the chosen settings; nothing where they are the present ones.

    A deployment keeps the bundle that it serves by now: another one may have been deployed during the measurements.
    """
    if chosen == present:
        return {}
    if not is_deployment(folder):
        configure(folder, chosen)
        return {"next": f"restart the server of {folder}"}
    values = {name: value for name, value in chosen._asdict().items() if name != "kind"}
    return {"deployed": deploy(folder, bundle=_served(folder)[0], **values)}


def _row(result: Measured, is_chosen: bool) -> dict[str, Any]:
    figures = {name: value for name, value in result._asdict().items() if name != "settings"}
    return {"chosen": "chosen" if is_chosen else None, **result.settings._asdict(), **figures}
