"""Layout of a deployment folder: a model repository that keeps several complete versions of one model.

::

    deployment.json       the folder was made by `missrec deploy`; for each version the one that it replaced
    .server.json          address and key of the server that serves the folder (`model_control`)
    missrec/              entry model; its config.pbtxt names the version that receives the traffic
    missrec_v3/           the same ensemble for version 3 alone: smoke test, shadow traffic, comparisons
    missrec_sessions_v3/  missrec_ranker_v3/      the models of version 3; the ranker's folder holds the bundle

A version is complete when its ensemble ``missrec_vN`` has a configuration: that folder is written last and removed
first.
"""

from __future__ import annotations

import re
from pathlib import Path

from missrec_t4r.errors import BundleError
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.serving.triton.model_config import CONFIG_FILE, read_config
from missrec_t4r.serving.triton.repository import BUNDLE_IN_REPOSITORY, ENSEMBLE

DEPLOYMENT_FILE = "deployment.json"
"""Marker file of a deployment folder."""
_RANKER, _, _BUNDLE = BUNDLE_IN_REPOSITORY.partition("/")


def is_deployment(repository: Path) -> bool:
    """Return whether a model repository is a folder of `missrec deploy`."""
    return (repository / DEPLOYMENT_FILE).is_file()


def ensemble_of(version: int) -> str:
    """Return the name of the ensemble that serves one version alone.

    Examples
    --------
    >>> ensemble_of(3)
    'missrec_v3'
    """
    return f"{ENSEMBLE}_v{version}"


def version_of(model: str) -> int | None:
    """Return the version of an ensemble of one version, None for every other model.

    Examples
    --------
    >>> version_of("missrec_v3"), version_of("missrec"), version_of("missrec_ranker_v3")
    (3, None, None)
    """
    match = re.fullmatch(rf"{ENSEMBLE}_v(\d+)", model)
    return int(match[1]) if match else None


def versions_of(repository: str | Path) -> list[int]:
    """Return the complete versions of a deployment folder, oldest first."""
    ensembles = [file.parent.name for file in Path(repository).glob(f"{ENSEMBLE}_v*/{CONFIG_FILE}")]
    return sorted(version for name in ensembles if (version := version_of(name)) is not None)


def current_version(repository: str | Path) -> int | None:
    """Return the version that the entry model serves, None before the first deployment."""
    entry_model = Path(repository) / ENSEMBLE
    if not (entry_model / CONFIG_FILE).is_file():
        return None
    versions = read_config(entry_model).version_policy.specific.versions
    return int(versions[0]) if versions else None


def replaced_by(repository: str | Path, version: int) -> int | None:
    """Return the version to roll back to: the one that ``version`` replaced, or where it is gone the newest before it.

    Versions between the two were tried and left, or never served. Where nothing is noted, the newest below ``version``.
    """
    replaced = min(replaced_versions(Path(repository)).get(str(version), version), version - 1)
    return max((number for number in versions_of(repository) if number <= replaced), default=None)


def left_versions(repository: Path, version: int) -> list[int]:
    """Return the versions below ``version`` to which no sequence of rollbacks returns, oldest first."""
    served, at = {version}, replaced_by(repository, version)
    while at is not None:
        served.add(at)
        at = replaced_by(repository, at)
    return [number for number in versions_of(repository) if number < version and number not in served]


def note_replaced(repository: Path, version: int, previous: int | None) -> None:
    """Note which version a newer one replaces; a step back to an older version changes nothing."""
    if previous is not None and previous < version:
        versions = {str(number) for number in versions_of(repository)}
        replaced = {number: before for number, before in replaced_versions(repository).items() if number in versions}
        write_json(repository / DEPLOYMENT_FILE, {"format": 1, "replaced": replaced | {str(version): previous}})


def replaced_versions(repository: Path) -> dict[str, int]:
    """Return version -> the version that it replaced; empty for folders of earlier versions.

    Raises
    ------
    BundleError
        ``deployment.json`` is missing or damaged.
    """
    file = repository / DEPLOYMENT_FILE
    try:
        return {str(number): int(before) for number, before in read_json(file).get("replaced", {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{file} cannot be read ({error.__cause__ or error})",
            "the versions that were replaced, as `missrec deploy` writes them",
            'write {"format": 1} into it: all versions stay, and a rollback goes to the newest below the current one',
        ) from error


def bundle_of(repository: str | Path, version: int) -> Path:
    """Return the path of a version's bundle within a deployment folder."""
    return Path(repository) / f"{_RANKER}_v{version}" / _BUNDLE


def served_bundle(folder: Path) -> Path:
    """Return the bundle that a deployment folder serves now, any other folder as it is."""
    version = current_version(folder) if is_deployment(folder) else None
    return folder if version is None else bundle_of(folder, version)


def start_arguments(repository: Path) -> list[str]:
    """Return the ``tritonserver`` arguments that load the entry model and the version behind it.

    Strict readiness is off: with it, a candidate version that fails to load would make the whole server unready
    although the current version still serves. The readiness of a deployment is that of its entry model:
    ``/v2/models/missrec/ready``.
    """
    version = current_version(repository)
    models = [ENSEMBLE] if version is None else [ENSEMBLE, ensemble_of(version)]
    loaded = [f"--load-model={model}" for model in models]
    return ["--model-control-mode=explicit", "--strict-readiness=false", *loaded]
