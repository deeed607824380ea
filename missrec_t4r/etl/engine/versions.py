"""Versions of a data folder that incremental updates extend: what each added, which one the parquet files hold."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.engine.user_state import STATE_FILE, STATE_FOLDER
from missrec_t4r.etl.outputs import REPORT_FILE, VERSIONS_FILE
from missrec_t4r.io.atomic import link_or_copy, recover
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import SPLITS

_INPUTS_FILE = "inputs.json"
"""In the folder of the user state: SHA-256 digests of the event files of the first run."""


class Version(NamedTuple):
    """The newest version of a data folder that can be updated."""

    folder: Path
    """Absolute."""
    report: dict[str, Any]
    """``etl.json``."""
    state: dict[str, Any]
    """``state/state.json``: types, category values, boundaries, partitions."""
    history: dict[str, Any]
    """``versions.json``."""

    @property
    def number(self) -> int:
        """Its number, from 1."""
        return int(self.history["version"])


def load_version(out: Path) -> Version:
    """Return the newest version of a data folder that can be updated.

    Raises
    ------
    ConfigError, DataError
        New events cannot be added to it.
    """
    recover(out)
    state_file = out / STATE_FOLDER / STATE_FILE
    if not state_file.is_file():
        adopted = (out / REPORT_FILE).is_file() and "adopted" in read_json(out / REPORT_FILE)
        cure = "transform the new events with the workflow that was adopted, and run missrec catalogue adopt again"
        raise DataError(
            f"{out} has no user state to update from",
            "a data folder of the out-of-core engine",
            cure if adopted else "run missrec etl --engine disk once",
        )
    report = read_json(out / REPORT_FILE)
    settings = report["settings"]
    if settings["k_core"] or settings["min_item_count"]:
        raise ConfigError(
            "the folder was filtered by k-core or item count, and new events would bring back what was left out",
            "a folder without these filters",
            "run missrec etl on all events",
        )
    file = out / VERSIONS_FILE
    versions = read_json(file) if file.is_file() else {"version": 1, "changes": []}
    versions.setdefault("plain_version", versions["version"])  # that of the splits' parquet files
    return Version(out.absolute(), report, read_json(state_file), versions)


def part_files(partitions: Iterable[int]) -> list[str]:
    """Return the parquet files that a data folder may have of some partitions."""
    return [f"{split}/part_{number:05}.parquet" for split in SPLITS for number in partitions]


def link_unchanged(old: Path, new: Path, rewritten: Collection[str]) -> None:
    """Hard-link (or copy, where a disk has no links) every file of the old version that the new one lacks.

    Parameters
    ----------
    old, new : Path
        Data folders.
    rewritten : collection of str
        Subfolders and files that are the new version's own, whether or not it has them.
    """
    for top, _, names in os.walk(old):
        subfolder = os.path.relpath(top, old)
        if any(f"{subfolder}/".startswith(f"{folder}/") for folder in rewritten):
            continue
        target = new / subfolder
        target.mkdir(parents=True, exist_ok=True)
        present = set(os.listdir(target))
        for name in names:
            if name not in present and os.path.normpath(f"{subfolder}/{name}") not in rewritten:
                link_or_copy(Path(top, name), target / name)


def write_inputs(folder: Path, events: Sequence[Path]) -> None:
    """Note the event files of a first run: an update skips them, as it skips those of the updates before it."""
    write_json(folder / STATE_FOLDER / _INPUTS_FILE, {"files": sorted({file_digest(file) for file in events})})


def new_files(events: Sequence[Path], versions: Mapping[str, Any], out: Path) -> dict[Path, str]:
    """Return the files whose content no version of ``out`` has yet, each content once, and their SHA-256 digests."""
    added = {digest for change in versions["changes"] for digest in change.get("files", [])}
    if (first := out / STATE_FOLDER / _INPUTS_FILE).is_file():  # folders of earlier releases have none
        added |= set(read_json(first)["files"])
    new: dict[Path, str] = {}
    for file in events:
        digest = file_digest(file)
        if digest not in added:
            new[file] = digest
            added.add(digest)
    return new
