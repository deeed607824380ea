"""Malformed requests: each gets a clear error, the server stays up, good requests beside them are answered as alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reliability.hostile import GENERATED, Attack
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests import processes


@pytest.mark.triton
def test_hostile_requests_get_words_and_harm_nobody(server: LocalTriton, bundle: Path) -> None:
    result = Attack(server, bundle).run(160)  # one round: every named kind once
    assert result["wrong"] == [], "\n".join(result["wrong"])
    named = [kind for kind in result["kinds"] if not kind.startswith("generated")]
    assert len(named) > 55
    assert result["kinds"]["generated for missrec_ranker"] > GENERATED / 2
    assert result["good_requests_beside"] >= 2


@pytest.mark.parametrize("name", ["hostile", "mixed_load", "monitoring", "starts"])
def test_a_wrong_bundle_ends_a_benchmark_with_a_message(name: str, tmp_path: Path, repository: Path) -> None:
    words = ["-m", f"benchmarks.reliability.{name}", "--bundle", str(tmp_path / "nowhere")]
    words += ["--repository", str(tmp_path)] if name == "hostile" else []
    words += ["--state", str(tmp_path / "state")] if name in ("hostile", "starts") else []
    ended = processes.run(words, cwd=repository)
    assert ended.returncode == 2
    assert ended.stderr.startswith("BundleError: ")
    assert "nowhere holds no manifest.json; expected: a bundle folder" in ended.stderr
