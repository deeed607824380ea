"""What the commands of `missrec catalogue` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from missrec_t4r.progress import Progress, quiet


def adopt(workflow: Path, out: Path, *, progress: Progress = quiet, **options: Any) -> dict[str, Any]:
    """Build a data folder on another workflow's rows; options as in `missrec_t4r.workflows.adopt.adopt`."""
    from missrec_t4r.workflows.adopt import adopt as build

    return build(workflow, out, progress=progress, **options)
