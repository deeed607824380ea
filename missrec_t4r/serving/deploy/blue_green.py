"""`missrec deploy` and `rollback`: another model behind the same door, while requests run. Nothing is ever polled.

A deployment folder is a model repository that keeps several complete versions::

    deployment.json      marks the folder
    missrec/             the door; its config.pbtxt names the version that answers, and is replaced by one rename
    missrec_v3/          the same door to version 3 alone: for its warm-up, for shadow traffic, for a comparison
    missrec_sessions_v3/ missrec_ranker_v3/                                          version 3; the bundle lies within

A version is verified, written aside, renamed into place, loaded, and asked before the door turns: its answers must be
those of its bundle. Whatever is killed, and whenever: the door's configuration is the old one or the new one, both of
complete versions, and that is what a restarted server loads. The version before stays loaded, so going back is one
reload of the door.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.errors import BundleError, ConfigError, ServingError
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.serving.deploy.warmup import warm_up
from missrec_t4r.serving.triton.model_control import DEPLOYMENT_FILE, Control, bundle_of, current_version, is_deployment
from missrec_t4r.serving.triton.repository import ENSEMBLE, MODELS, fill_repository

_PARTS = tuple(model for model in MODELS if model != ENSEMBLE)
_CONFIG = "config.pbtxt"
LOADED = 2
"""Versions that stay loaded: the one that answers, and the one to go back to."""


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
    dry_run: bool = False,
    progress: Progress = quiet,
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
        Switch the traffic to the version; --no-switch only loads and checks it, for `missrec shadow`.
    keep : int
        Versions kept on disk, including the one that is served.
    max_batch_size : int, optional
        Sessions per forward pass and per request; by default as the served version, at first 64.
    threads : int, optional
        Torch threads of the ranker; by default as the served version, at first 1.
    instances : int, optional
        Processes of the ranker; by default as the served version, at first 1.
    dry_run : bool
        Verify the bundle and print which version it would become; change nothing.

    Returns
    -------
    dict
        ``version``, ``previous``, whether it ``answers``, whether a server is ``live``, the warm-up's figures, seconds.

    Raises
    ------
    BundleError
        The bundle is damaged, or the folder is something else.
    ParityError
        The loaded version answers other than its bundle; the door has not moved.
    ServingError
        The server could not load the version; the door has not moved.
    """
    if (bundle is None) == (version is None):
        raise ConfigError("both --bundle and --version" if bundle else "neither --bundle nor --version", "one of them")
    if keep < LOADED:
        raise ConfigError(f"--keep {keep}", f"at least {LOADED}: the version that answers and the one to go back to")
    if dry_run:
        return _planned(Path(repository).absolute(), bundle, version, switch)
    started, folder = time.monotonic(), _folder(repository)
    with _locked(folder):
        _sweep(folder)
        before = current_version(folder)
        if bundle is not None:
            progress.say(f"verifying {bundle}")
            told = {"max_batch_size": max_batch_size, "threads": threads, "instances": instances}
            sizes = _sizes(folder, before) | {name: n for name, n in told.items() if n is not None}
            version = _add(folder, Path(bundle), before if switch else None, sizes)
        assert version is not None
        _require(folder, version)
        warmed = _turn(folder, version, switch=switch, progress=progress)
        if switch:
            _forget(folder, {version, before}, keep)
    return {
        "repository": str(folder),
        "version": version,
        "previous": before,
        "answers": switch,
        **warmed,
        "seconds": round(time.monotonic() - started, 2),
    }


def rollback(repository: str | Path, *, version: int | None = None, progress: Progress = quiet) -> dict[str, Any]:
    """Serve an earlier version again.

    Parameters
    ----------
    repository : path
        Deployment folder of `missrec deploy`.
    version : int, optional
        Version to serve; by default the newest below the current one.

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
    before = current_version(folder)
    earlier = [number for number in versions_of(folder) if before is not None and number < before]
    if version is None and not earlier:
        raise ServingError(
            f"{folder} has no version before {before}", "an earlier version to go back to", "deploy one with --bundle"
        )
    return deploy(folder, version=version or earlier[-1], progress=progress, keep=max(LOADED, len(versions_of(folder))))


def versions_of(repository: str | Path) -> list[int]:
    """Return the complete versions of a deployment folder, oldest first."""
    names = (re.fullmatch(rf"{ENSEMBLE}_v(\d+)", entry.name) for entry in Path(repository).glob(f"{ENSEMBLE}_v*"))
    found = (int(name[1]) for name in names if name)
    return sorted(n for n in found if (Path(repository) / f"{ENSEMBLE}_v{n}" / _CONFIG).is_file())


def _planned(folder: Path, bundle: str | Path | None, version: int | None, switch: bool) -> dict[str, Any]:
    """Return what `deploy` would do, after the checks that need no change."""
    _refuse_unmanaged(folder)
    there = versions_of(folder)
    if version is not None:
        _require(folder, version)
    elif bundle is not None:
        verify_bundle(bundle)
        version = max(there, default=0) + 1
    live = folder.is_dir() and Control.find(folder) is not None
    before = current_version(folder) if folder.is_dir() else None
    told = {"repository": str(folder), "version": version, "previous": before, "answers": switch, "live": live}
    return {"dry_run": True, **told, "versions": there}


def _turn(folder: Path, version: int, *, switch: bool, progress: Progress) -> dict[str, Any]:
    control = Control.find(folder)
    if control is None:
        if switch:
            _write_door(folder, version)
        return {"live": False}
    door = f"{ENSEMBLE}_v{version}"
    progress.say(f"loading version {version}")
    try:
        control.load(door)
        warmed = warm_up(control.http_url, door, bundle_of(folder, version))
    except ServingError:
        _unload(control, version)
        raise
    if not switch:
        return {"live": True, **warmed}
    before = current_version(folder)
    old = (folder / ENSEMBLE / _CONFIG).read_bytes() if before is not None else None
    _write_door(folder, version)
    try:
        control.load(ENSEMBLE)
    except ServingError:
        if old is not None:
            _replace(folder / ENSEMBLE / _CONFIG, old)
            control.load(ENSEMBLE)
        raise
    loaded = {int(name[1]) for model in control.ready() if (name := re.fullmatch(rf"{ENSEMBLE}_v(\d+)", model))}
    for number in sorted(loaded - {version, before}) if version != before else ():
        _unload(control, number)
    progress.say(
        f"version {version} answers; version {before} stays loaded" if before else f"version {version} answers"
    )
    return {"live": True, **warmed}


def _unload(control: Control, version: int) -> None:
    for model in (ENSEMBLE, *_PARTS):
        control.unload(f"{model}_v{version}")


def _add(folder: Path, bundle: Path, before: int | None, sizes: dict[str, int]) -> int:
    """Write a version's models aside and rename them into place; its own door, last, makes it complete.

    Where it would be the very version that answers, that one is returned: a deploy that is repeated adds none.
    """
    verify_bundle(bundle)
    version = max(versions_of(folder), default=0) + 1
    aside = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        fill_repository(aside, bundle, **sizes)
        for model in MODELS:
            config = aside / model / _CONFIG
            config.write_text(_versioned(config.read_text(encoding="utf-8"), model, version), encoding="utf-8")
        if before is not None and _same(aside, version, folder, before):
            return before
        for model in (*_PARTS, ENSEMBLE):
            (aside / model).rename(folder / f"{model}_v{version}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return version


def _sizes(folder: Path, version: int | None) -> dict[str, int]:
    """Return what a version's ranker was written with; nothing where there is no version."""
    if version is None:
        return {}
    config = (folder / f"{_PARTS[-1]}_v{version}" / _CONFIG).read_text(encoding="utf-8")
    written = {
        "max_batch_size": r"max_batch_size: (\d+)",
        "threads": r'key: "threads" value: { string_value: "(\d+)"',
        "instances": r"instance_group \[ { count: (\d+)",
    }
    found = {name: re.search(pattern, config) for name, pattern in written.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def _same(aside: Path, version: int, folder: Path, before: int) -> bool:
    """Whether the models aside are those of an earlier version: bundle and configuration, its number apart."""
    configs = [
        ((aside / model / _CONFIG).read_text(), (folder / f"{model}_v{before}" / _CONFIG).read_text())
        for model in MODELS
    ]
    bundles = aside / _PARTS[-1] / "1" / "bundle", bundle_of(folder, before)
    sums = [file_digest(one / MANIFEST_FILE) for one in bundles]
    return sums[0] == sums[1] and all(new == old.replace(f"_v{before}", f"_v{version}") for new, old in configs)


def _versioned(config: str, model: str, version: int) -> str:
    named = re.sub(rf"\b({'|'.join(_PARTS)})\b", rf"\1_v{version}", config)
    return named.replace(f'name: "{ENSEMBLE}"', f'name: "{ENSEMBLE}_v{version}"', 1) if model == ENSEMBLE else named


def _write_door(folder: Path, version: int) -> None:
    """Let the door lead to a version: one rename, after everything that it names is there."""
    text = (folder / f"{ENSEMBLE}_v{version}" / _CONFIG).read_text(encoding="utf-8")
    text = text.replace(f'name: "{ENSEMBLE}_v{version}"', f'name: "{ENSEMBLE}"', 1)
    (folder / ENSEMBLE / str(version)).mkdir(parents=True, exist_ok=True)
    _replace(
        folder / ENSEMBLE / _CONFIG,
        f"{text}version_policy {{ specific {{ versions: [ {version} ] }} }}\n".encode(),
    )


def _replace(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)


def _folder(repository: str | Path) -> Path:
    folder = Path(repository).absolute()
    _refuse_unmanaged(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEPLOYMENT_FILE).write_text(json.dumps({"format": 1}) + "\n", encoding="utf-8")
    return folder


def _refuse_unmanaged(folder: Path) -> None:
    if folder.exists() and not is_deployment(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise BundleError(
            f"{folder} exists and is no deployment folder",
            "a new folder, or one of `missrec deploy`",
            "choose another --repository; `missrec export --triton` writes single versions that cannot be swapped",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One deploy at a time; the lock is the kernel's and ends with its owner, however that ends."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServingError(
                f"{folder} is being deployed to", "one deploy at a time", "wait until it ends"
            ) from error
        yield


def _prefix(folder: Path) -> str:
    return f".{folder.name}-deploy-"


def _sweep(folder: Path) -> None:
    """Remove what a killed deploy left: folders aside, and models without the door that makes them a version."""
    for left in folder.parent.glob(f"{_prefix(folder)}*"):
        shutil.rmtree(left, ignore_errors=True)
    complete = set(versions_of(folder))
    for part in _PARTS:
        for entry in folder.glob(f"{part}_v*"):
            if int(entry.name.rpartition("_v")[2]) not in complete:
                shutil.rmtree(entry)


def _require(folder: Path, version: int) -> None:
    if version not in versions_of(folder):
        known = ", ".join(map(str, versions_of(folder))) or "none"
        raise ServingError(f"{folder} has no version {version}", f"one of {known}", "deploy one with --bundle")
    verify_bundle(bundle_of(folder, version))


def _forget(folder: Path, used: set[int | None], keep: int) -> None:
    unused = [number for number in versions_of(folder) if number not in used]
    for number in unused[: max(0, len(unused) + len(used - {None}) - keep)]:
        for model in (ENSEMBLE, *_PARTS):  # the door first: without it the rest is no version
            shutil.rmtree(folder / f"{model}_v{number}", ignore_errors=True)
        shutil.rmtree(folder / ENSEMBLE / str(number), ignore_errors=True)
