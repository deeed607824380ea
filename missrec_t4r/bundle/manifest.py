"""The manifest of a bundle: SHA-256 and size of every file. Needs neither torch nor the model.

A bundle is valid only as a whole: a flipped byte in any file (the manifest included), a missing file, a file that is
not listed, and an unknown format raise `BundleError` with the file's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from missrec_t4r.bundle.validate import check_contents
from missrec_t4r.errors import BundleError
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.schema import SCHEMA_FILE, SESSION_TRANSFORM_FILE

FORMAT_VERSION = 2
"""Newest format; a bundle is written in the oldest one that has all its files."""

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
CATALOGUE_FILE = "catalogue.safetensors"
ITEMS_FILE = "items.parquet"
FEATURES_FILE = "features.json"
SEARCH_FILE = "search.safetensors"

BUNDLE_FILES = (
    MODEL_FILE,
    WEIGHTS_FILE,
    CATALOGUE_FILE,
    ITEMS_FILE,
    FEATURES_FILE,
    SESSION_TRANSFORM_FILE,
    SCHEMA_FILE,
)
"""Files of every bundle beside the manifest."""
FILES_OF_FORMAT = {1: BUNDLE_FILES, FORMAT_VERSION: (*BUNDLE_FILES, SEARCH_FILE)}
"""Files by format; format 2 adds the retrieval index of a large catalogue."""

REMEDY = "export the bundle again, or copy it again from where it was written"


def write_manifest(folder: Path, recount: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the manifest, after all other files.

    Parameters
    ----------
    folder : Path
    recount : mapping, optional
        Of ``missrec export --recount``: in which data the co-occurrences were counted again.

    Returns
    -------
    dict
        The manifest's content.
    """
    version = FORMAT_VERSION if (folder / SEARCH_FILE).is_file() else 1
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        for name in FILES_OF_FORMAT[version]
    }
    content: dict[str, Any] = {"format": version, "files": files} | ({"recount": dict(recount)} if recount else {})
    (folder / MANIFEST_FILE).write_bytes(_serialise(content))
    return content


def verify_bundle(folder: str | Path, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Check every file of a bundle against the manifest.

    Parameters
    ----------
    folder : path
        The bundle.
    only : iterable of str, optional
        Hash these files alone; presence and sizes of all files are checked.

    Returns
    -------
    dict
        Content of the manifest; its SHA-256 sums identify the bundle.

    Raises
    ------
    BundleError
        Names the first file that is damaged, missing, not listed, or no data, or the unknown format.
    """
    folder = Path(folder)
    content = _read_manifest(folder)
    present = {entry.name for entry in folder.iterdir()}  # hidden ones too
    for name in sorted(present - {MANIFEST_FILE, *content["files"]}):
        raise BundleError(f"{folder / name} is not part of a bundle", f"{MANIFEST_FILE} and what it lists", REMEDY)
    hashed = set(content["files"] if only is None else only)
    for name in FILES_OF_FORMAT[content["format"]]:
        _verify_file(folder / name, content["files"][name], hashed=name in hashed)
        if name in hashed:
            check_contents(folder / name)
    return content


def catalogue_version(manifest: Mapping[str, Any]) -> str:
    """Return the version of a bundle's catalogue: 12 hexadecimal digits of the SHA-256 of its items and vectors."""
    sums = [manifest["files"][name]["sha256"] for name in (CATALOGUE_FILE, ITEMS_FILE)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:12]


def _serialise(content: dict[str, Any]) -> bytes:
    """Return the manifest as bytes, with a SHA-256 sum over its own content; no other formatting is valid."""
    text = json.dumps(content, indent=2, sort_keys=True)
    seal = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(content | {"seal": seal}, indent=2, sort_keys=True) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise BundleError(f"{folder} holds no {MANIFEST_FILE}", "a bundle folder", "write one with `missrec export`")
    check_contents(file)
    written = file.read_bytes()
    try:
        content = json.loads(written)
        version, entries = content["format"], dict(content["files"].items())
        unsealed = {key: value for key, value in content.items() if key != "seal"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file} is damaged ({error})", "the manifest as it was written", REMEDY) from error
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(
            f"{file} has format {version}", f"format {FORMAT_VERSION} at most", "use the version that wrote it"
        )
    known = FILES_OF_FORMAT.get(version) if type(version) is int else None
    is_complete = known is not None and set(entries) == set(known) and all(map(_is_entry, entries.values()))
    if not is_complete or not isinstance(content.get("recount", {}), dict) or written != _serialise(unsealed):
        expected = f"format 1 to {FORMAT_VERSION}, unchanged"
        raise BundleError(f"{file} is damaged or of an unknown format", expected, REMEDY)
    return unsealed


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def _verify_file(file: Path, listed: dict[str, Any], *, hashed: bool) -> None:
    if not file.is_file():
        raise BundleError(f"{file} is missing", f"a file of {listed['bytes']} bytes", REMEDY)
    size = file.stat().st_size
    if size != listed["bytes"]:
        raise BundleError(f"{file} has {size} bytes", f"{listed['bytes']} bytes", REMEDY)
    if hashed and (digest := file_digest(file)) != listed["sha256"]:
        raise BundleError(
            f"{file} is damaged: its SHA-256 starts with {digest[:12]}", listed["sha256"][:12] + "…", REMEDY
        )
