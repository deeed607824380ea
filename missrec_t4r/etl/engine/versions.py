"""Versions of a data folder: what each added, which one the parquet files hold, what a new one takes over."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.engine.sessionize import STATE_FILE, STATE_FOLDER
from missrec_t4r.etl.event_settings import EventSettings
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.io.atomic import link_or_copy, recover

VERSIONS_FILE = "versions.json"


def known(out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what a data folder says of itself: ``etl.json``, the state's settings, ``versions.json``.

    Raises
    ------
    ConfigError, DataError
        New events cannot be added to it.
    """
    recover(out)
    state_file = out / STATE_FOLDER / STATE_FILE
    if not state_file.is_file():
        raise DataError(
            f"{out} keeps no state to update from",
            "a data folder of the fast path",
            "run missrec etl --engine disk once",
        )
    report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    settings = report["settings"]
    if settings["k_core"] or settings["min_item_count"]:
        raise ConfigError(
            "the folder was filtered by k-core or item count, which new events change for old ones",
            "a folder without these filters",
            "run missrec etl on all events",
        )
    file = out / VERSIONS_FILE
    versions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"version": 1, "changes": []}
    return report, json.loads(state_file.read_text(encoding="utf-8")), versions


def derived_of(settings: Mapping[str, Any]) -> EventSettings:
    """Return what the settings of a report derive from events."""
    return EventSettings(
        settings["event_weights"],
        settings["event_type_column"],
        session_gap=settings["session_gap"],
        time_features=settings["time_features"],
        newest=settings["newest"],
    )


def plain_version(versions: Mapping[str, Any]) -> int:
    """Return the version that the parquet files of the splits hold."""
    return int(versions.get("plain_version", versions["version"]))


def link_rest(old: Path, new: Path, rewritten: Collection[str]) -> None:
    """Hard-link (or copy, where a disk has no links) every file of the old version that the new one lacks.

    Parameters
    ----------
    rewritten : collection of str
        Folders of which nothing is taken over.
    """
    for top, _, names in os.walk(old):
        inside = os.path.relpath(top, old)
        if any(f"{inside}/".startswith(f"{folder}/") for folder in rewritten):
            continue
        place = new / inside
        place.mkdir(parents=True, exist_ok=True)
        there = set(os.listdir(place))
        for name in names:
            if name not in there:
                link_or_copy(Path(top, name), place / name)


def new_files(events: Sequence[Path], versions: Mapping[str, Any]) -> dict[Path, str]:
    """Return the files that no version has, each content once, and their digests."""
    there = {digest for change in versions["changes"] for digest in change.get("files", [])}
    found: dict[Path, str] = {}
    for file in events:
        digest = _digest(file)
        if digest not in there:
            found[file] = digest
            there.add(digest)
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _read(stream)


def _read(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
