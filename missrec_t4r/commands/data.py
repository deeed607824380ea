"""What `missrec generate`, `etl`, `features` and `report` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from missrec_t4r.progress import Progress, quiet


def generate(
    out: Path, *, seed: int = 7, users: int = 3000, items: int = 1200, progress: Progress = quiet
) -> dict[str, Any]:
    """Generate a shop; see `missrec_t4r.workflows.sources.generator`."""
    from missrec_t4r.workflows.sources.generator import generate_shop

    return generate_shop(out, seed=seed, users=users, items=items, progress=progress)


def etl(
    interactions: str | Path | Sequence[str | Path],
    items: Path,
    out: Path,
    *,
    split: Literal["leave_one_out", "time"] = "leave_one_out",
    modality: Mapping[str, Path] | None = None,
    progress: Progress = quiet,
    **options: Any,
) -> dict[str, Any]:
    """Build a data folder; every option is documented in `missrec_t4r.workflows.etl.etl`."""
    from missrec_t4r.workflows.etl import etl as build

    return build(interactions, items, out, split=split, modality=modality, progress=progress, **options)


def features(
    data: Path, *, text_columns: Sequence[str] = (), progress: Progress = quiet, **options: Any
) -> dict[str, Any]:
    """Add modality vectors to a catalogue; every option is documented in `missrec_t4r.workflows.features.features`."""
    from missrec_t4r.workflows.features import features as extract

    return extract(data, text_columns=list(text_columns), progress=progress, **options)


def report(data: Path, out: Path, *, progress: Progress = quiet, **options: Any) -> dict[str, Any]:
    """Write a data report and judge it by a gate; options as in `missrec_t4r.workflows.report.report`."""
    from missrec_t4r.workflows.report import report as write

    return write(data, out, progress=progress, **options)
