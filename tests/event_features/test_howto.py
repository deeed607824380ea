"""docs/howto/event_features.md: its commands and its script run as they are and do what the text says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.config import MISSRecConfig

pytest.importorskip("nvtabular", reason="the ETL needs the extra merlin")


def test_the_howto(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "docs" / "howto" / "event_features.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```(bash|python)\n(.*?)^```", text, re.S | re.M))
    monkeypatch.chdir(tmp_path)
    commands = blocks["bash"].splitlines()
    assert commands
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, (command, done.output)
    assert json.loads(done.stdout.strip().splitlines()[-1])["parity"]["equal"]

    used = {
        run: json.loads(Path("runs", run, "run.json").read_text())["event_features"] for run in ("shop", "items-alone")
    }
    found = {column["name"]: column for column in used["shop"]}
    assert set(found) == {"event_type", "dwell_seconds", "category", "gap"}
    assert set(found["event_type"]["values"]) == {"view", "cart", "purchase"}
    assert found["gap"]["log"] is True
    assert used["items-alone"] == []

    pytest.importorskip("transformers4rec", reason="the script needs the extra merlin")
    names: dict[str, Any] = {}
    exec(blocks["python"], names)
    assert set(names["columns"]) == set(found)
    settings = set(re.findall(r"^\| `model\.(\w+)`", text, re.M))
    assert settings == {name for name in vars(MISSRecConfig()) if name.startswith("event_feature")}
