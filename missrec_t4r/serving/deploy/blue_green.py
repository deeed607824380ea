"""Blue/green deployment: switch the traffic of a running Triton to another model or catalogue, and back.

A deployment folder is a model repository that keeps several complete versions (`serving.triton.deployment` has its
layout). Clients send their requests to one name, the entry model ``missrec``; its configuration names the version that
serves them.

1. The bundle is verified; the version's models are written to a temporary folder and renamed into the deployment
   folder.
2. Triton loads the version under its own name, ``missrec_v3``, and the smoke test compares it with its bundle.
3. The entry model's configuration is replaced by one rename, and Triton reloads the entry model: the traffic switch.
   Requests in flight finish on the version they started on. Nothing is polled.
4. The previous version stays loaded, so that a rollback is one reload of the entry model; older ones are unloaded.

If the process or the server is killed at any time, the entry model's configuration names the old or the new version,
both complete, and a restarted server loads that one.
"""

from __future__ import annotations

import logging
import py_compile
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from missrec_t4r.bundle.lost_updates import warn_of_lost_updates
from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.config.option_names import option
from missrec_t4r.errors import BundleError, ConfigError, ParityError, ServingError
from missrec_t4r.io.atomic import refuse_unmanaged, temporary_dir
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.io.json_files import write_json
from missrec_t4r.io.lock import locked
from missrec_t4r.serving.deploy.smoke_test import smoke_test
from missrec_t4r.serving.triton.deployment import (
    DEPLOYMENT_FILE,
    bundle_of,
    current_version,
    ensemble_of,
    is_deployment,
    left_versions,
    note_replaced,
    replaced_by,
    replaced_versions,
    version_of,
    versions_of,
)
from missrec_t4r.serving.triton.model_config import read_config, settings_of, write_config
from missrec_t4r.serving.triton.model_control import Control, SilentError
from missrec_t4r.serving.triton.repository import (
    BUNDLE_IN_REPOSITORY,
    ENSEMBLE,
    MODELS,
    RANKER,
    ServingSettings,
    fill_repository,
)

log = logging.getLogger(__name__)

_PARTS = tuple(model for model in MODELS if model != ENSEMBLE)
_CODE = Path("1") / "model.py"
LOADED = 2
"""Versions that stay loaded: the current one and the previous one."""


def deploy(
    repository: str | Path,
    *,
    bundle: str | Path | None = None,
    version: int | None = None,
    switch: bool = True,
    keep: int = 3,
    max_batch_size: int | None = None,
    threads: int | None = None,
    instances: int | None = None,
    preferred_batch_size: int | None = None,
    queue_delay_us: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Serve a new model or catalogue in place of the current one, without restart and without failed requests.

    Parameters
    ----------
    repository : path
        Deployment folder, which is created if it does not exist. A server of this folder on this machine loads the
        version; without one only files change.
    bundle : path, optional
        Bundle that becomes a new version.
    version : int, optional
        An existing version to switch to, in place of a bundle.
    switch : bool
        --no-switch loads and checks the version without switching the traffic to it, for `missrec shadow`.
    keep : int
        Versions kept on disk, including the one that is served.
    max_batch_size : int, optional
        Sessions per forward pass and per request; by default that of the served version, 64 in the first deployment.
    threads : int, optional
        Torch threads of the ranker; by default those of the served version, 1 in the first deployment.
    instances : int, optional
        Processes of the ranker; by default those of the served version, 1 in the first deployment.
    preferred_batch_size : int, optional
        Sessions for which the dynamic batcher waits; by default that of the served version, none in the first one.
    queue_delay_us : int, optional
        Microseconds that a request may wait for others; by default those of the served version, 0 in the first one.
    dry_run : bool
        Verify the bundle and print which version it would become; change nothing.

    Returns
    -------
    dict
        ``version``, ``previous``, ``switched`` (whether traffic was), ``live`` (a server runs), the result of the smoke
        test, and seconds.

    Raises
    ------
    BundleError
        The bundle is damaged, or the folder is not managed by `missrec deploy`.
    ParityError
        The smoke test failed; the traffic has not switched.
    ServingError
        The server could not load the version; the traffic has not switched.
    """
    require_at_least(1, version=version, max_batch_size=max_batch_size, threads=threads, instances=instances)
    require_at_least(0, preferred_batch_size=preferred_batch_size, queue_delay_us=queue_delay_us)
    settings = {
        "max_batch_size": max_batch_size,
        "threads": threads,
        "instances": instances,
        "preferred_batch_size": preferred_batch_size,
        "queue_delay_us": queue_delay_us,
    }
    changes: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    started, folder = time.monotonic(), Path(repository).absolute()
    _check(folder, bundle, version, changes, keep)
    if dry_run:
        versions = versions_of(folder)
        version = version or max(versions, default=0) + 1
        verify_bundle(bundle_of(folder, version) if bundle is None else bundle)
        return {
            "dry_run": True,
            "repository": str(folder),
            "version": version,
            "previous": current_version(folder),
            "switched": switch,
            "live": Control.find(folder) is not None,
            "versions": versions,
        }
    if not is_deployment(folder):
        write_json(folder / DEPLOYMENT_FILE, {"format": 1})
    with locked(folder, wait=False):
        _remove_incomplete(folder)
        previous = current_version(folder)
        if bundle is not None:
            log.info(f"verifying {bundle}")
            before = ServingSettings() if previous is None else settings_of(folder / f"{RANKER}_v{previous}")
            version = _add_version(folder, Path(bundle), previous if switch else None, before._replace(**changes))
            if previous is not None:
                warn_of_lost_updates(bundle_of(folder, previous), bundle_of(folder, version))
        assert version is not None
        verify_bundle(bundle_of(folder, version))
        if switch:
            note_replaced(folder, version, previous)  # before the switch: a kill between them is harmless
        result = _activate(folder, version, switch=switch)
        if switch:
            _remove_old(folder, version, previous, keep)
    return {
        "repository": str(folder),
        "version": version,
        "previous": previous,
        "switched": switch,
        **result,
        "seconds": round(time.monotonic() - started, 2),
    }


def rollback(repository: str | Path, *, version: int | None = None) -> dict[str, Any]:
    """Serve an earlier version again.

    Parameters
    ----------
    repository : path
        Deployment folder of `missrec deploy`.
    version : int, optional
        Version to serve; by default the one that the current version replaced.

    Returns
    -------
    dict
        As of `deploy`.

    Raises
    ------
    ServingError
        There is no such version.
    """
    folder = Path(repository).absolute()
    with locked(folder, wait=False):
        current = current_version(folder)
        if version is None and current is not None:
            version = replaced_by(folder, current)
        if version is None:
            found = "serves no version" if current is None else f"has no version before {current}"
            raise ServingError(f"{folder} {found}", "an earlier version to go back to", "deploy one with --bundle")
        return deploy(folder, version=version, keep=max(LOADED, len(versions_of(folder))))


def _check(folder: Path, bundle: str | Path | None, version: int | None, changes: dict[str, Any], keep: int) -> None:
    """Refuse what cannot be deployed, before anything is written."""
    if keep < LOADED:
        raise ConfigError(
            f"--keep {keep}", f"at least {LOADED}: the version that serves the traffic and the one to roll back to"
        )
    if (bundle is None) == (version is None):
        raise ConfigError("both --bundle and --version" if bundle else "neither --bundle nor --version", "one of them")
    if version is not None and changes:
        found = ", ".join(map(option, changes))
        raise ConfigError(f"{found} with --version", "--bundle: a version keeps its settings", f"leave out {found}")
    _refuse_unmanaged(folder)
    if bundle is not None:
        verify_bundle(bundle, only=())  # a mistyped path makes no folder
    elif version not in versions_of(folder):
        known = ", ".join(map(str, versions_of(folder))) or "none"
        raise ServingError(f"{folder} has no version {version}", f"one of {known}", "deploy one with --bundle")


def _activate(folder: Path, version: int, *, switch: bool) -> dict[str, Any]:
    """Load a version, run the smoke test, and switch the traffic to it; without a server only switch the files."""
    control = Control.find(folder)
    if control is None:
        if switch:
            _write_entry_model(folder, version)
        return {"live": False}
    was_loaded = ensemble_of(version) in control.ready()
    log.info(f"checking version {version}, which is loaded" if was_loaded else f"loading version {version}")
    try:
        control.load(ensemble_of(version))
        result = smoke_test(control.grpc_url, ensemble_of(version), bundle_of(folder, version))
    except (ServingError, ParityError) as error:
        # A loaded one serves the traffic, or is the one to roll back to; a server that is silent would not answer
        if not was_loaded and not isinstance(error, SilentError):
            _unload(control, version)
        raise
    if not switch:
        return {"live": True, **result}
    previous = current_version(folder)
    _switch_traffic(folder, control, version, previous)
    loaded = {number for model in control.ready() if (number := version_of(model)) is not None}
    for number in sorted(loaded - {version, previous}) if version != previous else ():
        _unload(control, number)
    log.info(f"version {version} serves the traffic" + (f"; version {previous} stays loaded" if previous else ""))
    return {"live": True, **result}


def _switch_traffic(folder: Path, control: Control, version: int, previous: int | None) -> None:
    """Let the entry model serve ``version``; if Triton refuses it, restore the previous configuration."""
    _write_entry_model(folder, version)
    try:
        control.load(ENSEMBLE)
    except ServingError as error:
        if previous is not None:
            _write_entry_model(folder, previous)
            if not isinstance(error, SilentError):
                control.load(ENSEMBLE)
        raise


def _unload(control: Control, version: int) -> None:
    for model in (ENSEMBLE, *_PARTS):
        control.unload(f"{model}_v{version}")


def _add_version(folder: Path, bundle: Path, current: int | None, settings: ServingSettings) -> int:
    """Write the models of a new version and return its number.

    Returns ``current`` and writes nothing if that version has the same bundle, settings and code: repeating a deploy
    adds none, unless this package writes another ``model.py``.
    """
    version = max(versions_of(folder), default=0) + 1
    with temporary_dir(_temporary(folder)) as temporary:
        fill_repository(temporary, bundle, settings)
        configs = {model: read_config(temporary / model) for model in MODELS}
        if current is not None and _is_version(folder, current, configs, temporary):
            return current
        for part in _PARTS:
            _compile(temporary / part / _CODE)
        for model in (*_PARTS, ENSEMBLE):  # the ensemble last: its folder makes the version complete
            write_config(temporary / model, _with_version(configs[model], version))
            (temporary / model).rename(folder / f"{model}_v{version}")
    return version


def _compile(code: Path) -> None:
    """Compile a model's code, as Python would when Triton first loads it.

    To Triton a file that appears in a model's folder is a change: it would start the model anew at the next load, which
    is that of the entry model, at the traffic switch. An embedded server runs this Python; another one compiles itself.
    """
    compiled = code.parent / "__pycache__" / f"{code.stem}.{sys.implementation.cache_tag}.pyc"
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH  # a copied folder has other times
    py_compile.compile(str(code), str(compiled), optimize=0, doraise=True, invalidation_mode=by_content)


def _is_version(folder: Path, version: int, configs: dict[str, ModelConfig], written: Path) -> bool:
    """Return whether a version has the bundle, the code and these configurations of a repository just ``written``."""
    pairs = [(written / BUNDLE_IN_REPOSITORY / MANIFEST_FILE, bundle_of(folder, version) / MANIFEST_FILE)]
    pairs += [(written / part / _CODE, folder / f"{part}_v{version}" / _CODE) for part in _PARTS]
    return all(there.is_file() and file_digest(new) == file_digest(there) for new, there in pairs) and all(
        _with_version(config, version) == read_config(folder / f"{model}_v{version}")
        for model, config in configs.items()
    )


def _with_version(config: ModelConfig, version: int) -> ModelConfig:
    """Return a model's configuration for one version: its name, ensemble steps and bundle path get ``_vN``."""
    versioned, suffix = ModelConfig(), f"_v{version}"
    versioned.CopyFrom(config)
    versioned.name += suffix
    for step in versioned.ensemble_scheduling.step:
        step.model_name += suffix
    if "bundle" in versioned.parameters:
        path = versioned.parameters["bundle"]  # "1/bundle", or "../missrec_ranker/1/bundle"
        path.string_value = path.string_value.replace(f"{RANKER}/", f"{RANKER}{suffix}/")
    return versioned


def _write_entry_model(folder: Path, version: int) -> None:
    """Point the entry model to a version: one atomic file write, after all files of the version exist."""
    config = read_config(folder / ensemble_of(version))
    config.name = ENSEMBLE
    config.version_policy.specific.versions.append(version)  # another version number: Triton reloads the entry model
    (folder / ENSEMBLE / str(version)).mkdir(parents=True, exist_ok=True)
    write_config(folder / ENSEMBLE, config)


def _refuse_unmanaged(folder: Path) -> None:
    cure = "choose another --repository; `missrec export --triton` writes single versions that cannot be switched"
    refuse_unmanaged(folder, DEPLOYMENT_FILE, "deployment folder", BundleError, cure)
    if is_deployment(folder):
        replaced_versions(folder)  # refuses a damaged file


def _temporary(folder: Path) -> Path:
    """Return the path beside which a deploy into ``folder`` has its temporary folders."""
    return folder.with_name(f"{folder.name}-deploy")


def _remove_incomplete(folder: Path) -> None:
    """Remove what a killed deploy left: temporary folders, and models whose ensemble was not written any more.

    The lock is held: no other deploy runs, whatever machine, container or process number a temporary folder names.
    """
    for temporary in folder.parent.glob(f".{_temporary(folder).name}-*"):
        shutil.rmtree(temporary, ignore_errors=True)
    complete = set(versions_of(folder))
    for part in _PARTS:
        for model in folder.glob(f"{part}_v*"):
            number = model.name.removeprefix(f"{part}_v")
            if number.isdecimal() and int(number) not in complete:
                shutil.rmtree(model)


def _remove_old(folder: Path, version: int, previous: int | None, keep: int) -> None:
    """Remove versions until ``keep`` are left: first those rolled back from, then the oldest; those in use stay."""
    used, left = {version, previous}, left_versions(folder, version)
    unused = [number for number in versions_of(folder) if number not in used]
    unused.sort(key=lambda number: (number not in left, number))
    for number in unused[: max(0, len(unused) + len(used - {None}) - keep)]:
        for model in (ENSEMBLE, *_PARTS):  # the ensemble first: without it the rest is no version
            shutil.rmtree(folder / f"{model}_v{number}", ignore_errors=True)
        shutil.rmtree(folder / ENSEMBLE / str(number), ignore_errors=True)
