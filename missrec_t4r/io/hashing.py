"""Content hashes: of a file, and of a data folder independent of when it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REPORT = "etl.json"
_TIMINGS = {"seconds"}
"""Fields of the ETL's report that differ from run to run."""
_IGNORED = {"state", "versions.json", "workflow", "request_workflow", "nvtabular_workflow"}
"""Files and folders that no reader of sessions and catalogue opens."""


def data_digest(data: Path) -> str:
    """Return the SHA-256 of a data folder's sessions, catalogue and ETL report (without timings), in hexadecimal.

    Equal inputs through the same ETL give equal digests. Reads every byte: about a second per gigabyte.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        name = file.relative_to(data)
        if name.parts[0] in _IGNORED or name.parts[0].startswith("."):
            continue
        content = _without_timings(file) if str(name) == _REPORT else file_digest(file)
        digest.update(f"{name}\n{content}\n".encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON-able mapping in hexadecimal, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_timings(report: Path) -> str:
    content = json.loads(report.read_text(encoding="utf-8"))
    return json.dumps({name: content[name] for name in sorted(set(content) - _TIMINGS)}, sort_keys=True)
