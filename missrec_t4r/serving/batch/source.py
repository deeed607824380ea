"""The bundle that a command reads: the one that was given, or the one that a folder of `missrec deploy` serves."""

from __future__ import annotations

from pathlib import Path

_DEPLOYMENT_FILE = "deployment.json"


def given_bundle(bundle: str | Path) -> Path:
    """Return a bundle folder as it is, and of a folder of `missrec deploy` the bundle that it serves now."""
    folder = Path(bundle)
    if not (folder / _DEPLOYMENT_FILE).is_file():
        return folder
    from missrec_t4r.serving.triton.deployment import served_bundle  # here: needs gRPC

    return served_bundle(folder)
