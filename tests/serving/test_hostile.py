"""Malformed requests: each gets a clear error, the server stays up, good requests beside them are answered as alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reliability.hostile import GENERATED, Attack
from missrec_t4r.serving.triton.local_server import LocalTriton


@pytest.mark.triton
def test_hostile_requests_get_words_and_harm_nobody(server: LocalTriton, bundle: Path) -> None:
    result = Attack(server, bundle).run(160)  # one round: every named kind once
    assert result["wrong"] == [], "\n".join(result["wrong"])
    named = [kind for kind in result["kinds"] if not kind.startswith("generated")]
    assert len(named) > 55
    assert result["kinds"]["generated for missrec_ranker"] > GENERATED / 2
    assert result["good_requests_beside"] >= 2
