"""Our own Prometheus metrics, beside Triton's on the same page: what requests asked for and how they were answered.

Counters are summed by Prometheus over models, versions and instances; a rate is always one counter over another, so
it holds over any span of time. docs/howto/operate.md lists them with the questions that they answer.
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
from missrec_t4r.serving.triton.backend import DEFAULT_TOP_K, Answer, Arrays, Observer, RankerBackend

COUNTERS = {
    "missrec_sessions_total": "Sessions answered",
    "missrec_items_asked_total": "Item ids of answered sessions that the model could look at",
    "missrec_unknown_items_total": "Item ids among them that are unknown or missing",
    "missrec_fallbacks_total": "Sessions answered with the most popular items",
    "missrec_rejected_total": "Requests refused with a reason",
    "missrec_ruled_sessions_total": "Sessions with filters, an allow list or exclusions",
    "missrec_candidates_total": "Catalogue items times sessions: what could have been recommended without rules",
    "missrec_passed_total": "Items that the rules let through, summed over sessions",
    "missrec_recommended_total": "Items recommended",
    "missrec_short_answers_total": "Sessions answered with fewer items than asked for",
    "missrec_widenings_total": "Searches that had to look beyond their first candidates to be certain",
}
GAUGES = {
    "missrec_catalogue_items": "Items of the catalogue that answers",
    "missrec_catalogue_written_seconds": "Unix time at which this catalogue was written into the model repository",
    "missrec_loaded_seconds": "Unix time at which this model was loaded",
}
GATHERED = 0.05
"""Seconds for which counts are gathered before Triton is told: six calls into it take longer than a small model."""
COVERAGE = "missrec_modality_coverage"
"""Share of the catalogue's items that have a modality; labelled by it."""


class RankerMetrics:
    """The metrics of one instance of the ranker's model.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    model, version : str
        Labels: the model's name, and the catalogue's version.
    facts : mapping of str to float
        Values of the gauges.
    coverage : mapping of str to float
        Share of items by modality.
    """

    def __init__(
        self, pb_utils: Any, model: str, version: str, facts: Mapping[str, float], coverage: Mapping[str, float]
    ) -> None:
        self._labels = {"model": model, "catalogue": version}
        self._families = []  # Triton forgets a family that nobody holds
        self._log = pb_utils.Logger
        self._counters = {name: self._metric(pb_utils, name, words, "COUNTER") for name, words in COUNTERS.items()}
        for name, value in facts.items():
            self._metric(pb_utils, name, GAUGES[name], "GAUGE").set(value)
        family = self._family(pb_utils, COVERAGE, "Share of the catalogue's items that have a modality", "GAUGE")
        for name, share in coverage.items():
            metric = family.Metric(labels={**self._labels, "modality": name})
            self._families.append(metric)
            metric.set(share)
        self._widened = 0
        self._waiting: dict[str, float] = defaultdict(float)
        self._lock, self._news = threading.Lock(), threading.Event()
        threading.Thread(target=self._tell_for_ever, name="metrics", daemon=True).start()
        self._log.log_info(json.dumps({"event": "loaded", **self._labels, **facts, "coverage": dict(coverage)}))

    def observe(self, requests: Sequence[Arrays], answers: Sequence[Answer], widenings: int, n_items: int) -> None:
        """Count what a batch of requests asked for and got.

        Parameters
        ----------
        requests : sequence of mappings of arrays
        answers : sequence of mappings of arrays, or MISSRecError
        widenings : int
            Of the ranker since it was loaded.
        n_items : int
            Of the catalogue.
        """
        counts = dict.fromkeys(COUNTERS, 0.0)
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, MISSRecError):
                counts["missrec_rejected_total"] += 1
                self._log.log_warn(json.dumps({"event": "rejected", **self._labels, "reason": str(answer)[:500]}))
            else:
                _count(counts, request, answer, n_items)
        counts["missrec_widenings_total"], self._widened = widenings - self._widened, widenings
        with self._lock:
            for name, value in counts.items():
                self._waiting[name] += value
        self._news.set()

    def tell(self) -> None:
        """Hand what was counted to Triton now."""
        with self._lock:
            waiting, self._waiting = self._waiting, defaultdict(float)
        for name, value in waiting.items():
            if value:
                self._counters[name].increment(value)

    def _tell_for_ever(self) -> None:
        while True:
            self._news.wait()
            time.sleep(GATHERED)  # outside the requests' time, and once for all that come meanwhile
            self._news.clear()
            self.tell()

    def _metric(self, pb_utils: Any, name: str, words: str, kind: str) -> Any:
        metric = self._family(pb_utils, name, words, kind).Metric(labels=self._labels)
        self._families.append(metric)
        return metric

    def _family(self, pb_utils: Any, name: str, words: str, kind: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=words, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        return family


def ranker_observer(pb_utils: Any, args: Mapping[str, str], backend: RankerBackend, bundle: Path) -> Observer:
    """Return what counts a ranker's requests and answers.

    Parameters
    ----------
    pb_utils : module
    args : mapping
        Of Triton's ``initialize``.
    backend : RankerBackend
    bundle : Path
        Its manifest's time is the catalogue's.
    """
    catalogue = backend.ranker.catalogue
    coverage = {
        name: float(modality.present.sum()) / max(catalogue.n_items, 1)
        for name, modality in catalogue.modalities.items()
    }
    facts = {
        "missrec_catalogue_items": float(catalogue.n_items),
        "missrec_catalogue_written_seconds": (bundle / MANIFEST_FILE).stat().st_mtime,
        "missrec_loaded_seconds": time.time(),
    }
    metrics = RankerMetrics(pb_utils, args["model_name"], backend.catalogue_version, facts, coverage)

    def observe(requests: Sequence[Arrays], answers: Sequence[Answer]) -> None:
        metrics.observe(requests, answers, backend.ranker.widenings, catalogue.n_items)

    return observe


def _count(counts: dict[str, float], request: Mapping[str, Any], answer: Mapping[str, Any], n_items: int) -> None:
    sessions = len(request["rows"])
    counts["missrec_sessions_total"] += sessions
    counts["missrec_items_asked_total"] += int(np.count_nonzero(request["rows"] != PADDING_ROW))
    counts["missrec_unknown_items_total"] += int(answer["n_unknown"].sum())
    counts["missrec_fallbacks_total"] += int(answer["fallback"].sum())
    counts["missrec_candidates_total"] += sessions * n_items
    counts["missrec_passed_total"] += int(answer["n_passed"].sum())
    counts["missrec_recommended_total"] += int(answer["n_items"].sum())
    counts["missrec_ruled_sessions_total"] += sessions if _ruled(request.keys()) else 0
    wanted = request["top_k"].reshape(-1) if "top_k" in request else np.full(sessions, DEFAULT_TOP_K)
    counts["missrec_short_answers_total"] += int((answer["n_items"].reshape(-1) < np.minimum(wanted, n_items)).sum())


def _ruled(names: Iterable[str]) -> bool:
    return not {"exclude", "allow", "rules"}.isdisjoint(names)
