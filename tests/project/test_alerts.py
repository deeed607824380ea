"""The alert rules of Prometheus fire when they should: its own unit tests of rules (`alerts.yml`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool: apt-get install prometheus")
def test_alerts_fire_when_they_should() -> None:
    assert PROMTOOL is not None
    ran = subprocess.run(
        [PROMTOOL, "test", "rules", Path(__file__).with_name("alerts.yml")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
