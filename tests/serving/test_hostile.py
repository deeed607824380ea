"""Malformed requests: each gets a clear error, the server stays up, the next valid request is answered correctly."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reliability.hostile import Attack
from missrec_t4r.serving.triton.local_server import LocalTriton


@pytest.mark.triton
def test_hostile_requests_get_words_and_harm_nobody(server: LocalTriton, bundle: Path) -> None:
    attack = Attack(server, bundle)
    try:
        result = attack.run(140)
    finally:
        attack.close()
    assert result["wrong"] == [], "\n".join(result["wrong"])
    assert result["kinds"] > 55
    assert result["good_requests_between"] == 8
