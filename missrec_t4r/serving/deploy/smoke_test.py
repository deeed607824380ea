"""Smoke test: a loaded version must reproduce its bundle's recommendations before traffic is switched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.bundle.id_encoder import RawId
from missrec_t4r.bundle.item_table import load_items, vocabulary_of
from missrec_t4r.errors import ParityError
from missrec_t4r.schema import TRAIN_COUNT
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.protocol import Recommendation

TOLERANCE = 1e-5
"""Largest accepted difference of a score; scores closer than this are a tie."""
_SESSIONS = 32
_LONGEST = 20
_WARM_REQUESTS = 3
"""Requests that are repeated; the last one's latency is reported."""


def sample_sessions(bundle: Path, n: int = _SESSIONS) -> list[list[RawId]]:
    """Return sessions of popular items with 1 to 20 ids, and before them an empty one and one with a missing id."""
    items = load_items(bundle)
    order = np.argsort(-items[TRAIN_COUNT].to_numpy(), kind="stable")
    ids: list[RawId] = vocabulary_of(items).take(order[: 4 * n]).to_pylist()
    sessions = [[ids[(7 * i + 3 * j) % len(ids)] for j in range(1 + i % _LONGEST)] for i in range(n)]
    return [[], [None, ids[0]], *sessions]


def smoke_test(url: str, model: str, bundle: Path, top_k: int = 20) -> dict[str, Any]:
    """Compare a loaded model's recommendations with those of its bundle in this process.

    Parameters
    ----------
    url : str
        gRPC address of the server.
    model : str
        Ensemble of the version, such as ``missrec_v3``.
    bundle : Path
        Bundle that the version was written from.
    top_k : int

    Returns
    -------
    dict
        ``warmup_sessions``, ``max_abs_diff``, and ``warm_ms``, the latency of the last request.

    Raises
    ------
    ParityError
        A recommendation differs, outside ties.
    """
    sessions = sample_sessions(bundle)
    with MISSRecClient.of_bundle(bundle, threads=1) as in_process:
        expected = in_process.recommend(sessions, top_k)
    with MISSRecClient(url, model=model, timeout=60) as client:
        served = client.recommend(sessions, top_k)
        for _ in range(_WARM_REQUESTS):
            started = time.monotonic()
            client.recommend(sessions[-1:], top_k)
        warm_ms = round((time.monotonic() - started) * 1e3, 2)
    wrong, largest = differences(served, expected)
    if wrong or largest > TOLERANCE:
        raise ParityError(
            f"for {wrong} of {len(sessions)} sessions {model} recommends other items than its bundle "
            f"(largest difference of a score: {largest:.2g})",
            f"the same items, and scores within {TOLERANCE}",
            "look into the server's log; the previous version still serves the traffic",
        )
    return {"warmup_sessions": len(sessions), "max_abs_diff": largest, "warm_ms": warm_ms}


def differences(served: list[Recommendation], expected: list[Recommendation]) -> tuple[int, float]:
    """Return the number of sessions with other items outside ties, and the largest difference of a score."""
    wrong, largest = 0, 0.0
    for answer, reference in zip(served, expected, strict=True):
        if len(answer.item_ids) != len(reference.item_ids):
            wrong += 1
            continue
        largest = max(largest, float(np.abs(np.array(answer.scores) - np.array(reference.scores)).max(initial=0)))
        expected_score = dict(zip(reference.item_ids, reference.scores, strict=True))
        # Another item at a rank is a tie if its expected score equals that of the rank. An item that is not among the
        # expected ones can only tie with the last rank, where the list is cut.
        wrong += any(
            item != expected_item and abs(expected_score.get(item, reference.scores[-1]) - score) > TOLERANCE
            for item, expected_item, score in zip(answer.item_ids, reference.item_ids, reference.scores, strict=True)
        )
    return wrong, largest
