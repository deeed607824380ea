"""Before a version may answer: it is asked, as clients will ask, and its answers must be those of its bundle."""

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


def sample_sessions(bundle: Path, n: int = _SESSIONS) -> list[list[RawId]]:
    """Return sessions of popular items, of growing length, an empty one and one with an unknown item among them."""
    items = load_items(bundle)
    order = np.argsort(-items[TRAIN_COUNT].to_numpy(), kind="stable")
    ids: list[RawId] = vocabulary_of(items).take(order[: 4 * n]).to_pylist()
    sessions = [[ids[(7 * i + 3 * j) % len(ids)] for j in range(1 + i % 20)] for i in range(n)]
    return [[], [None, ids[0]], *sessions]


def warm_up(http_url: str, model: str, bundle: Path, top_k: int = 20) -> dict[str, Any]:
    """Ask a loaded model and compare it with its bundle.

    Parameters
    ----------
    http_url : str
        Of the server.
    model : str
        The version's own door.
    bundle : Path
        What it was made of.
    top_k : int

    Returns
    -------
    dict
        ``warmup_sessions``, ``max_abs_diff``, and the last request's ``warm_ms``.

    Raises
    ------
    ParityError
        An answer differs, beyond ties.
    """
    sessions = sample_sessions(bundle)
    with MISSRecClient.of_bundle(bundle) as offline:
        expected = offline.recommend(sessions, top_k)
    with MISSRecClient(http_url, "http", model=model, timeout=60) as client:
        answers = client.recommend(sessions, top_k)
        for _ in range(3):
            started = time.monotonic()
            client.recommend(sessions[-1:], top_k)
    wrong, largest = differences(answers, expected)
    if wrong or largest > TOLERANCE:
        raise ParityError(
            f"{model} answers {wrong} of {len(sessions)} sessions other than its bundle (scores by {largest:.2g})",
            f"the same items, and scores within {TOLERANCE}",
            "look into the server's log; the version before still answers",
        )
    warm = round((time.monotonic() - started) * 1e3, 2)
    return {"warmup_sessions": len(sessions), "max_abs_diff": largest, "warm_ms": warm}


def differences(answers: list[Recommendation], expected: list[Recommendation]) -> tuple[int, float]:
    """Return how many answers hold other items outside ties, and the largest difference of a score."""
    wrong, largest = 0, 0.0
    for answer, right in zip(answers, expected, strict=True):
        if len(answer.item_ids) != len(right.item_ids):
            wrong += 1
            continue
        gaps = np.abs(np.array(answer.scores) - np.array(right.scores))
        largest = max(largest, float(gaps.max(initial=0)))
        score_of = dict(zip(right.item_ids, right.scores, strict=True))
        strange = [
            item
            for item, other, score in zip(answer.item_ids, right.item_ids, right.scores, strict=True)
            if item != other and abs(score_of.get(item, right.scores[-1]) - score) > TOLERANCE
        ]
        wrong += bool(strange)
    return wrong, largest
