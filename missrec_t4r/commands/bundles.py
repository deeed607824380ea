"""Commands on a bundle that combine ETL, bundle and deployment: change its catalogue, verify it, convert it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.arrays import Floats
from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.bundle.catalogue_changes import read_items
from missrec_t4r.bundle.item_table import load_items
from missrec_t4r.bundle.manifest import FEATURES_FILE, catalogue_version, verify_bundle
from missrec_t4r.bundle.update_catalogue import rollback_catalogue, update_catalogue
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import ConfigError, ModalityError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.io.lock import locked
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.batch.source import given_bundle


def catalogue_update(
    items: str | Path | pa.Table,
    *,
    bundle: str | Path | None = None,
    repository: str | Path | None = None,
    modality: Mapping[str, str | Path | Floats] | None = None,
    data: str | Path | None = None,
    item_column: str = ITEM_ID,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Add, change and retire items of a bundle or a deployment, without training or restart.

    Parameters
    ----------
    items : path or pyarrow.Table
        Parquet with ids, any other columns, and optionally retired (true or false).
    bundle : path, optional
        Bundle to replace by its new version; the previous version is kept beside it.
    repository : path, optional
        Deployment folder of `missrec deploy`: its server switches to the new version while requests run. Without
        --bundle, the bundle that is served now is changed.
    modality : mapping of str to path or ndarray [item, width], optional
        Vectors of the items, one row per item, as NAME=FILE.npy; repeatable.
    data : path, optional
        Data folder whose encoders compute the vectors from the items' texts and images. Items that are in the catalogue
        already keep their vectors where the table has no column that the encoder reads.
    item_column : str
        Column of the item id.
    dry_run : bool
        Make and check the new version and print what would change; change nothing.

    Returns
    -------
    dict
        What changed, and under ``deployed`` the result of `missrec deploy`.

    Raises
    ------
    ModalityError
        The data folder's encoders are not those of the bundle.
    """
    if (first := bundle or repository) is None:
        raise ConfigError("neither --bundle nor --repository", "one of them, or both")
    table = read_items(items, item_column)
    vectors = {name: Path(given) if isinstance(given, str) else given for name, given in (modality or {}).items()}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for target in () if dry_run else (repository, bundle):
            if target is not None:  # until the end: another update starts from the result of this one
                stack.enter_context(locked(Path(target)))
        changed = Path(first) if bundle else _served_bundle(Path(folder), Path(first))
        verify_bundle(changed, only=())
        if data is not None:
            from missrec_t4r.etl.features.pipeline import encode_items

            ids, known = (items[ITEM_ID].cast(pa.string()) for items in (table, load_items(changed)))
            has_new = not pc.all(pc.is_in(ids, known.combine_chunks())).as_py()
            served = read_json(changed / FEATURES_FILE)["modalities"]
            wanted = served.keys() - vectors.keys()
            for name, encoded in encode_items(Path(data), table, complete=has_new, wanted=wanted).items():
                _require_same_encoder(name, served[name]["encoder"], encoded.encoder, Path(data))
                vectors[name] = np.where(encoded.present[:, None], encoded.vectors, np.float32("nan"))
        result = update_catalogue(changed, table, modalities=vectors, dry_run=dry_run)
        if repository is not None:
            from missrec_t4r.serving.deploy.blue_green import deploy

            result["deployed"] = deploy(repository, bundle=changed, dry_run=dry_run)
    return result if bundle else result | {"bundle": None}


def _require_same_encoder(name: str, served: Mapping[str, Any], encoder: Mapping[str, Any], data: Path) -> None:
    """Refuse vectors of another encoder than the served ones: they have the same shape, and mean something else."""
    then, now = served.get("fingerprint"), encoder.get("fingerprint")
    if then != now:
        raise ModalityError(
            f"the {name} encoder of {data} has the fingerprint {now}",
            f"that of the bundle, {then}: its items were encoded otherwise",
            "give the data folder of the bundle's run, or vectors of that encoder with --modality; or train and export",
        )


def catalogue_rollback(*, bundle: str | Path | None = None, repository: str | Path | None = None) -> dict[str, Any]:
    """Go back to the catalogue before the last update, in a bundle, a deployment, or both.

    Parameters
    ----------
    bundle : path, optional
        Bundle that `missrec catalogue update` changed.
    repository : path, optional
        Deployment folder of `missrec deploy`, whose server goes back too.

    Returns
    -------
    dict
        The catalogue's version, and under ``deployed`` the result of `missrec rollback`.
    """
    if bundle is None and repository is None:
        raise ConfigError("neither --bundle nor --repository", "one of them, or both")
    result = rollback_catalogue(bundle) if bundle else {}
    if repository is not None:
        from missrec_t4r.serving.deploy.blue_green import rollback

        result["deployed"] = rollback(repository)
    return result


def _served_bundle(folder: Path, repository: Path) -> Path:
    """Return a copy of the bundle that is served."""
    from missrec_t4r.serving.triton.deployment import bundle_of, current_version

    version = current_version(repository)
    if version is None:
        raise ConfigError(f"{repository} serves nothing yet", "a folder of `missrec deploy`", "deploy a bundle first")
    return Path(shutil.copytree(bundle_of(repository, version), folder / "bundle"))


def verify(bundle: str | Path) -> dict[str, Any]:
    """Check a bundle as the server does before it loads it: checksums, content of every file, and consistency.

    Parameters
    ----------
    bundle : path
        Bundle written by `missrec export`, or folder of `missrec deploy`: the one that it serves.

    Returns
    -------
    dict
        Files, bytes, items, modalities and the catalogue's version; under ``recount`` the number of events and sessions
        in which `missrec export --recount` counted co-occurrences again, and the time of the newest one (``until``),
        None for the counts of training.

    Raises
    ------
    BundleError
        The bundle is damaged, truncated, oversized or manipulated; with the file and the reason.
    """
    bundle = given_bundle(bundle)
    loaded = load_bundle(bundle)
    files = loaded.manifest["files"].values()
    return {
        "bundle": str(bundle),
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files),
        "items": loaded.catalogue.n_items,
        "modalities": list(loaded.catalogue.modalities),
        "catalogue_version": catalogue_version(loaded.manifest),
        "recount": loaded.manifest.get("recount"),
    }


def merlin(bundle: str | Path, data: str | Path, out: str | Path, *, top_k: int = 10) -> dict[str, Any]:
    """Write a bundle as a classic Merlin Systems ensemble (pickles), for existing servers.

    Parameters
    ----------
    bundle : path
        Bundle written by `missrec export`.
    data : path
        Data folder written by `missrec etl`; its request workflow is part of the ensemble.
    out : path
        Triton model repository to write.
    top_k : int
        Recommendations per session.

    Returns
    -------
    dict
        As `missrec_t4r.export.merlin_systems.export_merlin`.
    """
    from missrec_t4r.etl.installed import require_nvtabular

    require_at_least(1, top_k=top_k)
    require_nvtabular("a Merlin Systems ensemble", "serve the bundle: missrec export --triton")
    from missrec_t4r.etl.nvt.serialization import load_workflow
    from missrec_t4r.export.merlin_systems import export_merlin

    return export_merlin(bundle, load_workflow(Path(data) / "request_workflow"), out, top_k=top_k)
