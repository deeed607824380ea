"""Write a Triton model repository from the templates in `triton_models/` and a bundle.

::

    missrec/            config.pbtxt  1/                      entry model, the ensemble: raw ids to raw ids and scores
    missrec_sessions/   config.pbtxt  1/model.py              raw ids to rows
    missrec_ranker/     config.pbtxt  1/model.py  1/bundle/   rows to items; the one copy of the bundle

The models find the bundle by a relative path, so the folder may be moved, mounted or packed into an image.
"""

from __future__ import annotations

import importlib.resources
import shutil
import string
from pathlib import Path

from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.errors import BundleError, ConfigError
from missrec_t4r.io.atomic import atomic_write_dir

ENSEMBLE = "missrec"
MODELS = (ENSEMBLE, "missrec_sessions", "missrec_ranker")
BUNDLE_IN_REPOSITORY = "missrec_ranker/1/bundle"
MARKER = "missrec_ranker/config.pbtxt"
"""Marker file of a model repository written by this module."""


def write_repository(
    bundle: str | Path, out: str | Path, *, max_batch_size: int = 64, threads: int = 1, instances: int = 1
) -> list[str]:
    """Write a model repository atomically; an older one is replaced as a whole.

    Parameters
    ----------
    bundle : path
        Verified before anything is written.
    out : path
        Folder of the model repository.
    max_batch_size : int
        Most sessions in one request, and in one batch of Triton's dynamic batcher.
    threads : int
        Torch threads of every ranker process.
    instances : int
        Ranker processes that serve requests in parallel; they share the memory pages of a large catalogue.

    Returns
    -------
    list of str
        Files written, relative to ``out``.

    Raises
    ------
    BundleError
        The bundle is damaged, or ``out`` was not written by missrec.
    """
    with atomic_write_dir(Path(out), MARKER, "model repository", BundleError) as folder:
        fill_repository(folder, Path(bundle), max_batch_size=max_batch_size, threads=threads, instances=instances)
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def fill_repository(
    folder: Path, bundle: Path, *, max_batch_size: int = 64, threads: int = 1, instances: int = 1
) -> None:
    """Write the repository's files into an empty folder; `write_repository` and `export` put it in place."""
    if min(max_batch_size, threads, instances) < 1:
        found = f"max_batch_size {max_batch_size}, threads {threads}, instances {instances}"
        raise ConfigError(found, "at least 1 each")
    manifest = verify_bundle(bundle)
    id_type = load_session_transform(bundle).settings.id_type
    values = {
        "item_id_type": "TYPE_STRING" if id_type == "string" else "TYPE_INT64",
        "max_batch_size": str(max_batch_size),
        "threads": str(threads),
        "instances": str(instances),
    }
    for model in MODELS:
        (folder / model / "1").mkdir(parents=True)
        config = fill_template(_template(model, "config.pbtxt"), values)
        (folder / model / "config.pbtxt").write_text(config, encoding="utf-8")
        if model != ENSEMBLE:
            code = _template(model, "1", "model.py")
            (folder / model / "1" / "model.py").write_text(code, encoding="utf-8")
    target = folder / BUNDLE_IN_REPOSITORY
    target.mkdir()
    for name in manifest["files"]:
        shutil.copyfile(bundle / name, target / name)
    shutil.copy2(bundle / MANIFEST_FILE, target / MANIFEST_FILE)  # keeps its time: the catalogue's age in the metrics


def fill_template(template: str, values: dict[str, str]) -> str:
    """Return a template's text with every ``${name}`` replaced.

    Raises
    ------
    BundleError
        The template has a placeholder without a value.
    """
    try:
        return string.Template(template).substitute(values)
    except (KeyError, ValueError) as error:
        raise BundleError(f"a template has the placeholder {error}", f"one of {', '.join(values)}") from error


def _template(*parts: str) -> str:
    return importlib.resources.files("missrec_t4r.triton_models").joinpath(*parts).read_text(encoding="utf-8")
