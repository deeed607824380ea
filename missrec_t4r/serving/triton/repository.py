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
from typing import NamedTuple

from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.errors import BundleError, ConfigError
from missrec_t4r.io.atomic import atomic_write_dir

ENSEMBLE, RANKER = "missrec", "missrec_ranker"
MODELS = (ENSEMBLE, "missrec_sessions", RANKER)
BUNDLE_IN_REPOSITORY = f"{RANKER}/1/bundle"
MARKER = f"{RANKER}/config.pbtxt"
"""Marker file of a model repository written by this module."""


class ServingSettings(NamedTuple):
    """Settings of a model repository; `missrec tune serving` measures them on the machine that serves."""

    max_batch_size: int = 64
    """Most sessions in one request, and in one batch of Triton's dynamic batcher."""
    threads: int = 1
    """Torch threads of every ranker process."""
    instances: int = 1
    """Ranker processes that serve requests in parallel, on every GPU where there are some."""
    preferred_batch_size: int = 0
    """Sessions for which the dynamic batcher waits, at most so long; 0 for none."""
    queue_delay_us: int = 0
    """Microseconds that a request may wait for others to be ranked with it."""
    kind: str = "KIND_AUTO"
    """Where the rankers run: KIND_AUTO (a GPU if there is one), KIND_CPU or KIND_GPU."""


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
        fill_repository(folder, Path(bundle), ServingSettings(max_batch_size, threads, instances))
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def fill_repository(
    folder: Path, bundle: Path, settings: ServingSettings | None = None, *, linked: bool = False
) -> None:
    """Write the repository's files into an empty folder; `write_repository` and `export` put it in place.

    Parameters
    ----------
    folder : Path
    bundle : Path
        Verified before anything is written.
    settings : ServingSettings, optional
        By default as its fields say.
    linked : bool
        Link to the bundle in place of a copy, for a repository that is thrown away.
    """
    settings = check_settings(ServingSettings() if settings is None else settings)
    manifest = verify_bundle(bundle)
    id_type = load_session_transform(bundle).settings.id_type
    values = {name: str(value) for name, value in settings._asdict().items()}
    values["item_id_type"] = "TYPE_STRING" if id_type == "string" else "TYPE_INT64"
    values["preferred_batch_size"] = str(settings.preferred_batch_size or "")  # an empty list prefers none
    for model in MODELS:
        (folder / model / "1").mkdir(parents=True)
        config = string.Template(_template(model, "config.pbtxt")).substitute(values)
        (folder / model / "config.pbtxt").write_text(config, encoding="utf-8")
        if model != ENSEMBLE:
            code = _template(model, "1", "model.py")
            (folder / model / "1" / "model.py").write_text(code, encoding="utf-8")
    target = folder / BUNDLE_IN_REPOSITORY
    if linked:
        target.symlink_to(bundle.absolute(), target_is_directory=True)
        return
    target.mkdir()
    for name in manifest["files"]:
        shutil.copyfile(bundle / name, target / name)
    shutil.copy2(bundle / MANIFEST_FILE, target / MANIFEST_FILE)  # keeps its time: the catalogue's age in the metrics


def described(settings: ServingSettings) -> str:
    """Return settings as text, such as ``instances 2``, those that are not the default alone.

    Examples
    --------
    >>> described(ServingSettings(instances=2, queue_delay_us=500)), described(ServingSettings())
    ('instances 2, queue_delay_us 500', 'the defaults')
    """
    plain = ServingSettings()._asdict()
    return ", ".join(f"{name} {value}" for name, value in settings._asdict().items() if value != plain[name]) or (
        "the defaults"
    )


def check_settings(settings: ServingSettings) -> ServingSettings:
    """Return the settings if a server can have them.

    Raises
    ------
    ConfigError
        A number is too small, or the preferred batch is larger than the largest.
    """
    least = min(settings.max_batch_size, settings.threads, settings.instances)
    if least < 1 or min(settings.queue_delay_us, settings.preferred_batch_size) < 0:
        found = ", ".join(f"{name} {value}" for name, value in settings._asdict().items() if name != "kind")
        raise ConfigError(found, "at least 1 each, preferred_batch_size and queue_delay_us at least 0")
    if settings.preferred_batch_size > settings.max_batch_size:
        found = f"preferred_batch_size {settings.preferred_batch_size}, max_batch_size {settings.max_batch_size}"
        raise ConfigError(found, "a preferred batch that is not larger than the largest")
    return settings


def _template(*parts: str) -> str:
    return importlib.resources.files("missrec_t4r.triton_models").joinpath(*parts).read_text(encoding="utf-8")
