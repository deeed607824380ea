"""What identifies the content of a data folder: equal input through the same ETL, an equal digest at any time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_REPORT = "etl.json"
_TIMED = {"seconds"}
"""What the ETL's report says that differs from run to run."""
_LEFT_OUT = {"state", "versions.json", "workflow", "request_workflow", "nvtabular_workflow"}
"""What no reader of sessions and catalogue looks at."""


def digest_of(data: Path) -> str:
    """Return what identifies sessions, catalogue and the ETL's report, 64 hexadecimal digits.

    Reads every byte: about a second per gigabyte.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        place = file.relative_to(data)
        if place.parts[0] in _LEFT_OUT or place.parts[0].startswith("."):
            continue
        digest.update(f"{place}\n{_told(file) if str(place) == _REPORT else file_digest(file)}\n".encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 sum of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _told(report: Path) -> str:
    told = json.loads(report.read_text(encoding="utf-8"))
    return json.dumps({name: told[name] for name in sorted(set(told) - _TIMED)}, sort_keys=True)
