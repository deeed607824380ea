"""Prometheus metrics of the ranker, on the same page as Triton's own: properties of requests and responses.

Prometheus sums counters over models, versions and instances; every rate is one counter divided by another, so it is
valid over any time span. docs/howto/operate.md lists them with the questions that they answer.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.bundle.manifest import MANIFEST_FILE
from missrec_t4r.errors import MISSRecError
from missrec_t4r.schema import PADDING_ROW
from missrec_t4r.serving.triton.backend import DEFAULT_TOP_K, Arrays, Observer, RankerBackend, Response

COUNTERS = {
    "missrec_sessions_total": "Sessions answered",
    "missrec_items_asked_total": "Item ids of answered sessions, the last max_sequence_length of each",
    "missrec_unknown_items_total": "Item ids among them that are unknown or missing",
    "missrec_fallbacks_total": "Sessions answered with the most popular items",
    "missrec_rejected_total": "Requests refused with an error",
    "missrec_ruled_sessions_total": "Sessions with filters, an allow list or exclusions",
    "missrec_candidates_total": "Catalogue items times sessions: candidates without any filter",
    "missrec_passed_total": "Items that pass the filters, summed over sessions",
    "missrec_recommended_total": "Items recommended",
    "missrec_short_answers_total": "Sessions answered with fewer items than top_k",
    "missrec_widenings_total": "Searches that had to examine more than their first candidates to be exact",
}
"""Help text by name of the counter."""
GAUGES = {
    "missrec_catalogue_items": "Items of the served catalogue",
    "missrec_catalogue_written_seconds": "Unix time at which this catalogue was written into the model repository",
    "missrec_loaded_seconds": "Unix time at which this model was loaded",
}
FLUSH_SECONDS = 0.05
"""Interval at which counts are passed to Triton: six calls into it take longer than a pass of a small model."""
COVERAGE = "missrec_modality_coverage"
_COVERAGE_HELP = "Share of the catalogue's items that have a modality"
_LONGEST_REASON = 500
"""Characters of an error in the log."""


class RankerMetrics:
    """Metrics of one instance of the ranker.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    model, version : str
        Labels: the model's name, and the catalogue's version.
    gauges : mapping of str to float
        Values by name of the gauge.
    coverage : mapping of str to float
        Share of items by modality.
    """

    def __init__(
        self, pb_utils: Any, model: str, version: str, gauges: Mapping[str, float], coverage: Mapping[str, float]
    ) -> None:
        self._labels = {"model": model, "catalogue": version}
        self._families = []  # Triton drops a family that Python has garbage-collected
        self._log = pb_utils.Logger
        self._counters = {name: self._metric(pb_utils, name, text, "COUNTER") for name, text in COUNTERS.items()}
        for name, value in gauges.items():
            self._metric(pb_utils, name, GAUGES[name], "GAUGE").set(value)
        family = self._family(pb_utils, COVERAGE, _COVERAGE_HELP, "GAUGE")
        for name, share in coverage.items():
            metric = family.Metric(labels={**self._labels, "modality": name})
            self._families.append(metric)
            metric.set(share)
        self._last_widenings = 0
        self._pending: dict[str, float] = defaultdict(float)
        self._lock, self._has_pending = threading.Lock(), threading.Event()
        threading.Thread(target=self._flush_forever, name="metrics", daemon=True).start()
        self._log.log_info(json.dumps({"event": "loaded", **self._labels, **gauges, "coverage": dict(coverage)}))

    def observe(self, requests: Sequence[Arrays], responses: Sequence[Response], widenings: int, n_items: int) -> None:
        """Count the properties of a batch of requests and their responses.

        Parameters
        ----------
        requests : sequence of mappings of arrays
        responses : sequence of mappings of arrays, or MISSRecError
        widenings : int
            Total of the ranker since it was loaded.
        n_items : int
            Items of the catalogue.
        """
        counts = dict.fromkeys(COUNTERS, 0.0)
        for request, response in zip(requests, responses, strict=True):
            if isinstance(response, MISSRecError):
                counts["missrec_rejected_total"] += 1
                reason = str(response)[:_LONGEST_REASON]
                self._log.log_warn(json.dumps({"event": "rejected", **self._labels, "reason": reason}))
            else:
                _count(counts, request, response, n_items)
        counts["missrec_widenings_total"] = widenings - self._last_widenings
        self._last_widenings = widenings
        with self._lock:
            for name, value in counts.items():
                self._pending[name] += value
        self._has_pending.set()

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

    def _metric(self, pb_utils: Any, name: str, text: str, kind: str) -> Any:
        metric = self._family(pb_utils, name, text, kind).Metric(labels=self._labels)
        self._families.append(metric)
        return metric

    def _family(self, pb_utils: Any, name: str, text: str, kind: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        return family


def ranker_observer(pb_utils: Any, args: Mapping[str, str], backend: RankerBackend, bundle: Path) -> Observer:
    """Return a callback that counts a ranker's requests and responses.

    Parameters
    ----------
    pb_utils : module
    args : mapping
        Arguments of Triton's ``initialize``.
    backend : RankerBackend
    bundle : Path
        The modification time of its manifest is the catalogue's.
    """
    catalogue = backend.ranker.catalogue
    coverage = {
        name: float(modality.present.sum()) / max(catalogue.n_items, 1)
        for name, modality in catalogue.modalities.items()
    }
    gauges = {
        "missrec_catalogue_items": float(catalogue.n_items),
        "missrec_catalogue_written_seconds": (bundle / MANIFEST_FILE).stat().st_mtime,
        "missrec_loaded_seconds": time.time(),
    }
    metrics = RankerMetrics(pb_utils, args["model_name"], backend.catalogue_version, gauges, coverage)

    def observe(requests: Sequence[Arrays], responses: Sequence[Response]) -> None:
        metrics.observe(requests, responses, backend.ranker.widenings, catalogue.n_items)

    return observe


def _count(counts: dict[str, float], request: Mapping[str, Any], response: Mapping[str, Any], n_items: int) -> None:
    sessions = len(request["rows"])
    counts["missrec_sessions_total"] += sessions
    counts["missrec_items_asked_total"] += int(np.count_nonzero(request["rows"] != PADDING_ROW))
    counts["missrec_unknown_items_total"] += int(response["n_unknown"].sum())
    counts["missrec_fallbacks_total"] += int(response["fallback"].sum())
    counts["missrec_candidates_total"] += sessions * n_items
    counts["missrec_passed_total"] += int(response["n_passed"].sum())
    counts["missrec_recommended_total"] += int(response["n_items"].sum())
    counts["missrec_ruled_sessions_total"] += sessions if _has_filters(request.keys()) else 0
    top_k = request["top_k"].reshape(-1) if "top_k" in request else np.full(sessions, DEFAULT_TOP_K)
    counts["missrec_short_answers_total"] += int((response["n_items"].reshape(-1) < np.minimum(top_k, n_items)).sum())


def _has_filters(names: Iterable[str]) -> bool:
    return not {"exclude", "allow", "rules"}.isdisjoint(names)
