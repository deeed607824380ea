"""What `missrec score`, `similar` and `vectors` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from missrec_t4r.progress import Progress, quiet


def score(
    sessions: Path, out: Path, *, bundle: Path | None = None, run: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Write recommendations for a file of sessions; options as in `missrec_t4r.serving.batch.score.score`."""
    from missrec_t4r.bundle.from_run import bundle_or_run
    from missrec_t4r.serving.batch.score import score as write

    with bundle_or_run(bundle, run, progress=options.get("progress", quiet)) as folder:
        return write(folder, sessions, out, **options)


def similar(
    items: Sequence[str | int] | None = None, *, bundle: Path | None = None, run: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Return or write items similar to items; options as in `missrec_t4r.serving.batch.similar.similar`."""
    from missrec_t4r.bundle.from_run import bundle_or_run
    from missrec_t4r.serving.batch.similar import similar as find

    with bundle_or_run(bundle, run, progress=options.get("progress", quiet)) as folder:
        return find(folder, items, **options)


def vectors(
    out: Path, *, bundle: Path | None = None, run: Path | None = None, progress: Progress = quiet, **options: Any
) -> dict[str, Any]:
    """Write item and session vectors; options as in `missrec_t4r.serving.batch.export_vectors.vectors`."""
    from missrec_t4r.bundle.from_run import bundle_or_run
    from missrec_t4r.serving.batch.export_vectors import vectors as write

    with bundle_or_run(bundle, run, progress=progress) as folder:
        return write(folder, out, progress=progress, **options)
