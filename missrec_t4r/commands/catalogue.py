"""What the commands of `missrec catalogue` do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.progress import Progress, quiet


def adopt(workflow: Path, out: Path, *, progress: Progress = quiet, **options: Any) -> dict[str, Any]:
    """Build a data folder on another workflow's rows; options as in `missrec_t4r.workflows.adopt.adopt`."""
    from missrec_t4r.workflows.adopt import adopt as build

    return build(workflow, out, progress=progress, **options)


def catalogue_update(
    bundle: Path,
    items: Path,
    *,
    modality: Mapping[str, Path] | None = None,
    data: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Add, change and retire items of a bundle; with ``data`` the catalogue's own encoders read the items' contents."""
    from missrec_t4r.export.update import read_items, update_catalogue

    table = read_items(items)
    vectors: dict[str, Any] = dict(modality or {})
    if data is not None:
        from missrec_t4r.workflows.features import encode_items

        for name, encoded in encode_items(data, table, progress=progress).items():
            absent = ~encoded.present[:, None]
            vectors.setdefault(name, np.where(absent, np.float32("nan"), encoded.vectors))
    return update_catalogue(bundle, table, modalities=vectors, progress=progress)


def catalogue_rollback(bundle: Path) -> dict[str, Any]:
    """Exchange a bundle and the version before its last update."""
    from missrec_t4r.export.update import rollback_catalogue

    return rollback_catalogue(bundle)
