"""What the commands of `missrec import` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from missrec_t4r.progress import Progress, quiet


def import_amazon(
    edition: str, reviews: Path, metadata: Path, out: Path, *, progress: Progress = quiet, **options: Any
) -> dict[str, Any]:
    """Import Amazon reviews of 2018 or 2023; options as in `missrec_t4r.etl.sources.amazon.import_amazon`."""
    from missrec_t4r.etl.sources.amazon import import_amazon as read

    return read(edition, reviews, metadata, out, progress=progress, **options)


def import_movielens(archive: Path, out: Path, *, progress: Progress = quiet, **options: Any) -> dict[str, Any]:
    """Import MovieLens; options as in `missrec_t4r.etl.sources.movielens.import_movielens`."""
    from missrec_t4r.etl.sources.movielens import import_movielens as read

    return read(archive, out, progress=progress, **options)
