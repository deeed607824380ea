"""Prometheus metrics of the ranker, on the same page as Triton's own: properties of requests and responses.

Prometheus sums counters over models, versions and instances; every rate is one counter divided by another, so it is
valid over any time span. docs/howto/operate.md lists them with the questions that they answer.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.bundle.manifest import MANIFEST_FILE
from missrec_t4r.errors import MISSRecError
from missrec_t4r.schema import PADDING_ROW
from missrec_t4r.serving.triton.backend import (
    DEFAULT_TOP_K,
    FailedError,
    Observer,
    RankerBackend,
    Response,
    SessionsBackend,
)

REQUEST_COUNTERS = {
    "missrec_rejected_total": "Requests refused because of what they hold: mistakes of clients",
    "missrec_failed_total": "Requests that broke the code of the model: failures of the server",
}
"""Help text by name of the counters of both models."""
COUNTERS = REQUEST_COUNTERS | {
    "missrec_sessions_total": "Sessions answered",
    "missrec_session_items_total": "Item ids of answered sessions, the last max_sequence_length of each",
    "missrec_unknown_items_total": "Item ids among them that are unknown or missing",
    "missrec_fallbacks_total": "Sessions answered with the most popular items",
    "missrec_filtered_sessions_total": "Sessions with filters, an allow list or exclusions",
    "missrec_candidates_total": "Catalogue items times sessions: candidates without any filter",
    "missrec_candidates_passed_total": "Items that pass the filters, summed over sessions",
    "missrec_recommended_total": "Items recommended",
    "missrec_short_responses_total": "Sessions answered with fewer items than top_k",
    "missrec_widened_searches_total": "Searches that had to examine more than their first candidates to be exact",
}
"""Help text by name of the counters of the ranker."""
GAUGES = {
    "missrec_catalogue_items": "Items of the served catalogue",
    "missrec_catalogue_written_seconds": "Unix time at which this catalogue was written into the model repository",
    "missrec_loaded_seconds": "Unix time at which this model was loaded",
}
FLUSH_SECONDS = 0.05
"""Interval at which counts are passed to Triton: six calls into it take longer than a pass of a small model."""
COVERAGE = "missrec_modality_coverage"
_COVERAGE_HELP = "Share of the catalogue's items that have a modality"
_FILTERS = {"exclude", "allow", "rules"}
"""Inputs that rule items out."""
_LONGEST_REASON = 500
"""Characters of an error in the log."""
_LONGEST_TRACEBACK = 4000
"""Characters of a traceback in the log, its end."""


class RequestMetrics:
    """Refused and failed requests of one instance of a model, in counters and in the log.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    model, version : str
        Labels: the model's name, and the catalogue's version.
    """

    counters: Mapping[str, str] = REQUEST_COUNTERS

    def __init__(self, pb_utils: Any, model: str, version: str) -> None:
        self._labels = {"model": model, "catalogue": version}
        self._families: dict[str, Any] = {}  # kept: Triton drops what Python has garbage-collected
        self._metrics: list[Any] = []
        self._log = pb_utils.Logger
        self._counters = {name: self._metric(pb_utils, name, text, "COUNTER") for name, text in self.counters.items()}
        self._pending: dict[str, float] = defaultdict(float)
        self._lock, self._has_pending = threading.Lock(), threading.Event()
        threading.Thread(target=self._flush_forever, name="metrics", daemon=True).start()

    def observe(self, requests: Sequence[Response], responses: Sequence[Response]) -> None:
        """Count a batch of requests and their responses."""
        counts = self._counts(requests, responses)
        with self._lock:
            for name, value in counts.items():
                self._pending[name] += value
        self._has_pending.set()

    def _counts(self, requests: Sequence[Response], responses: Sequence[Response]) -> dict[str, float]:
        """Return what each counter grows by; write a line per error."""
        counts = dict.fromkeys(self.counters, 0.0)
        for response in responses:
            if isinstance(response, FailedError):
                counts["missrec_failed_total"] += 1
                trace = "".join(traceback.format_exception(response.__cause__))[-_LONGEST_TRACEBACK:]
                self._write(self._log.log_error, "failed", response, traceback=trace)
            elif isinstance(response, MISSRecError):
                counts["missrec_rejected_total"] += 1
                self._write(self._log.log_warn, "rejected", response)
        return counts

    def _write(self, log: Callable[[str], None], event: str, error: MISSRecError, **more: str) -> None:
        log(json.dumps({"event": event, **self._labels, "reason": str(error)[:_LONGEST_REASON], **more}))

    def flush(self) -> None:
        """Pass the pending counts to Triton."""
        with self._lock:
            pending, self._pending = self._pending, defaultdict(float)
        for name, value in pending.items():
            if value:
                self._counters[name].increment(value)

    def _flush_forever(self) -> None:
        while True:
            self._has_pending.wait()
            time.sleep(FLUSH_SECONDS)  # one flush, outside of any request, for all requests of the interval
            self._has_pending.clear()
            self.flush()

    def _metric(self, pb_utils: Any, name: str, text: str, kind: str, **labels: str) -> Any:
        """Return a new metric; several with one name differ in their labels."""
        if name not in self._families:
            kinds = pb_utils.MetricFamily
            self._families[name] = kinds(name=name, description=text, kind=getattr(kinds, kind))
        metric = self._families[name].Metric(labels=self._labels | labels)
        self._metrics.append(metric)
        return metric


class RankerMetrics(RequestMetrics):
    """Metrics of one instance of the ranker.

    Parameters
    ----------
    pb_utils : module
    args : mapping
        Arguments of Triton's ``initialize``.
    backend : RankerBackend
    bundle : Path
        The modification time of its manifest is the catalogue's.
    """

    counters = COUNTERS

    def __init__(self, pb_utils: Any, args: Mapping[str, str], backend: RankerBackend, bundle: Path) -> None:
        super().__init__(pb_utils, args["model_name"], backend.catalogue_version)
        self._ranker, self._last_widenings = backend.ranker, 0
        catalogue = backend.ranker.catalogue
        gauges = {
            "missrec_catalogue_items": float(catalogue.n_items),
            "missrec_catalogue_written_seconds": (bundle / MANIFEST_FILE).stat().st_mtime,
            "missrec_loaded_seconds": time.time(),
        }
        for name, value in gauges.items():
            self._metric(pb_utils, name, GAUGES[name], "GAUGE").set(value)
        coverage = {
            name: float(modality.present.sum()) / max(catalogue.n_items, 1)
            for name, modality in catalogue.modalities.items()
        }
        for name, share in coverage.items():
            self._metric(pb_utils, COVERAGE, _COVERAGE_HELP, "GAUGE", modality=name).set(share)
        self._log.log_info(json.dumps({"event": "loaded", **self._labels, **gauges, "coverage": coverage}))

    def _counts(self, requests: Sequence[Response], responses: Sequence[Response]) -> dict[str, float]:
        counts = super()._counts(requests, responses)
        for request, response in zip(requests, responses, strict=True):
            if not isinstance(request, MISSRecError) and not isinstance(response, MISSRecError):
                _count(counts, request, response, self._ranker.catalogue.n_items)
        widenings = self._ranker.search.widenings
        counts["missrec_widened_searches_total"] = widenings - self._last_widenings
        self._last_widenings = widenings
        return counts


def sessions_observer(pb_utils: Any, args: Mapping[str, str], backend: SessionsBackend) -> Observer:
    """Return a callback that counts the refused and failed requests of the request transform."""
    return RequestMetrics(pb_utils, args["model_name"], backend.catalogue_version).observe


def ranker_observer(pb_utils: Any, args: Mapping[str, str], backend: RankerBackend, bundle: Path) -> Observer:
    """Return a callback that counts a ranker's requests and responses; parameters as for `RankerMetrics`."""
    return RankerMetrics(pb_utils, args, backend, bundle).observe


def _count(counts: dict[str, float], request: Mapping[str, Any], response: Mapping[str, Any], n_items: int) -> None:
    sessions = len(request["rows"])
    counts["missrec_sessions_total"] += sessions
    counts["missrec_session_items_total"] += int(np.count_nonzero(request["rows"] != PADDING_ROW))
    counts["missrec_unknown_items_total"] += int(response["n_unknown"].sum())
    counts["missrec_fallbacks_total"] += int(response["fallback"].sum())
    counts["missrec_candidates_total"] += sessions * n_items
    counts["missrec_candidates_passed_total"] += int(response["n_passed"].sum())
    counts["missrec_recommended_total"] += int(response["n_items"].sum())
    counts["missrec_filtered_sessions_total"] += sessions if _FILTERS & request.keys() else 0
    top_k = request["top_k"].reshape(-1) if "top_k" in request else np.full(sessions, DEFAULT_TOP_K)
    counts["missrec_short_responses_total"] += int((response["n_items"].reshape(-1) < np.minimum(top_k, n_items)).sum())
