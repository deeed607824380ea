"""What the commands of `missrec catalogue` do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import Progress, quiet


def adopt(workflow: Path, out: Path, *, progress: Progress = quiet, **options: Any) -> dict[str, Any]:
    """Build a data folder on another workflow's rows; options as in `missrec_t4r.etl.nvt.adopt.adopt`."""
    from missrec_t4r.etl.nvt.adopt import adopt as build

    return build(workflow, out, progress=progress, **options)


def catalogue_update(
    items: Path,
    *,
    bundle: Path | None = None,
    repository: Path | None = None,
    modality: Mapping[str, Path] | None = None,
    data: Path | None = None,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Add, change and retire items of a bundle, of what a deployment folder serves, or of both.

    Parameters
    ----------
    items : path
        Parquet; see `missrec_t4r.bundle.update_catalogue.update_catalogue`.
    bundle : path, optional
        Replaced by the new version; the version before is kept beside it.
    repository : path, optional
        A folder of `missrec deploy`: the new version answers there next, while requests run. Without ``bundle`` the
        bundle that answers now is the one to change.
    modality : mapping of str to path, optional
        Vectors of the items, ``.npy``.
    data : path, optional
        Data folder, whose encoders read the items' texts and pictures.
    dry_run : bool
        Make and check the new version, say what would change, change nothing.
    progress : Progress

    Returns
    -------
    dict
        What changed, and under ``deployed`` what `missrec deploy` says.
    """
    from missrec_t4r.bundle.update_catalogue import read_items, update_catalogue

    if bundle is None and repository is None:
        raise ConfigError("neither --bundle nor --repository", "one of them, or both")
    table = read_items(items)
    vectors: dict[str, Any] = dict(modality or {})
    if data is not None:
        from missrec_t4r.etl.features.pipeline import encode_items

        for name, encoded in encode_items(data, table, progress=progress).items():
            vectors.setdefault(name, np.where(encoded.present[:, None], encoded.vectors, np.float32("nan")))
    with tempfile.TemporaryDirectory() as folder:
        changed = bundle or _served_bundle(Path(folder), repository)
        result = update_catalogue(changed, table, modalities=vectors, dry_run=dry_run, progress=progress)
        if repository is not None:
            from missrec_t4r.serving.deploy.blue_green import deploy

            result["deployed"] = deploy(repository, bundle=changed, dry_run=dry_run, progress=progress)
    return result if bundle else result | {"bundle": None}


def catalogue_rollback(*, bundle: Path | None = None, repository: Path | None = None) -> dict[str, Any]:
    """Go back to the catalogue before the last update, in a bundle, in what a deployment folder serves, or in both."""
    from missrec_t4r.bundle.update_catalogue import rollback_catalogue

    if bundle is None and repository is None:
        raise ConfigError("neither --bundle nor --repository", "one of them, or both")
    result = rollback_catalogue(bundle) if bundle else {}
    if repository is not None:
        from missrec_t4r.serving.deploy.blue_green import rollback

        result["deployed"] = rollback(repository)
    return result


def _served_bundle(folder: Path, repository: Path | None) -> Path:
    """Return a copy of the bundle that answers."""
    from missrec_t4r.serving.triton.model_control import bundle_of, current_version

    assert repository is not None
    version = current_version(repository)
    if version is None:
        raise ConfigError(f"{repository} serves nothing yet", "a folder of `missrec deploy`", "deploy a bundle first")
    return Path(shutil.copytree(bundle_of(repository, version), folder / "bundle"))
