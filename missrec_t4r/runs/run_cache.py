"""Run cache: a run is reused if data, settings, warm-start source and code are the same.

A scheduler that repeats a job after a failure behind the training does not train again. The key hashes the content of
the data folders, not their times: an ETL that is repeated writes the same sessions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import changed_settings
from missrec_t4r.errors import ConfigError
from missrec_t4r.io.hashing import data_digest, file_digest
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.runs.run_folder import LOG_FILE, RECIPE_FILE, RUN_FILE, STATE_FILE, WEIGHTS_FILE, versions

FINISHED_FILE = "finished.json"
_CODE = ("config", "data", "evaluation", "model", "ranking", "t4r", "training")
"""Subpackages whose source is part of the key: a number may depend on them."""
_RUN_PARTS: Final = {RUN_FILE, RECIPE_FILE, STATE_FILE, LOG_FILE, "checkpoint", "tensorboard"}
"""What shows that a folder is that of a run; a killed training may have left one of them alone."""
_NOTES: Final = {".log", ".txt", ".out", ".err", ".yaml", ".yml", ".json"}
"""Logs and settings, which scripts put into the folder of a run before it begins."""
_NOTE_FOLDERS: Final = {"logs", "lost+found"}
"""Folders of logs, and of a disk that is mounted there."""


def run_key(data: Sequence[Path], settings: Mapping[str, Any], source: Path | None = None) -> str:
    """Return the key of a run: SHA-256 of its inputs and of the code, 64 hexadecimal digits.

    Parameters
    ----------
    data : sequence of Path
        Data folders, in their order; their content counts, not their times.
    settings : mapping
        Everything else that a number may depend on.
    source : Path, optional
        Run folder of a warm start.
    """
    digest = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True, default=str).encode())
    package = Path(__file__).parents[1]
    code = sorted(file for name in _CODE for file in (package / name).rglob("*.py"))
    start = [] if source is None else [source / RUN_FILE, source / WEIGHTS_FILE]
    for content in (*map(file_digest, code), *map(data_digest, data), *(file_digest(f) for f in start if f.is_file())):
        digest.update(content.encode())
    return digest.hexdigest()


def require_run_folder(out: Path, kind: str = "run", parts: Set[str] = _RUN_PARTS) -> None:
    """Refuse to write a run below a file, or among other files than hidden ones, logs and settings.

    Parameters
    ----------
    out : Path
    kind : str
        What is written, for the error.
    parts : set of str
        Names of which any one shows that the folder is of that kind.

    Raises
    ------
    ConfigError
        Says what is there.
    """
    if file := next((part for part in (out, *out.parents) if part.is_file()), None):
        raise ConfigError(f"--out {out}, and {file} is a file", "a folder", "choose another --out")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    others = sorted(
        name for name in there - _NOTE_FOLDERS if not name.startswith(".") and Path(name).suffix not in _NOTES
    )
    if others and parts.isdisjoint(there):
        found = f"--out {out} is no folder of a {kind}: it holds {', '.join(others[:3])}{', …' if others[3:] else ''}"
        raise ConfigError(found, f"a new folder, or that of a {kind}", "choose another --out")


def lookup(out: Path, key: str) -> dict[str, Any] | None:
    """Return the stored result of the finished run in ``out`` if its key is the same, else None."""
    try:
        entry = read_json(out / FINISHED_FILE)
        is_same = entry["key"] == key and entry["run"] == file_digest(out / RUN_FILE)
    except (OSError, ValueError, KeyError):
        return None
    return dict(entry["result"]) if is_same and (out / WEIGHTS_FILE).is_file() else None


def differences(out: Path, recipe: Recipe) -> list[str]:
    """Return in which settings a finished run differs from a recipe, such as ``train.epochs 3 -> 5``."""
    return changed_settings(Recipe.from_stored(read_json(out / RECIPE_FILE)).to_dict(), recipe.to_dict())


def store(out: Path, key: str, result: Mapping[str, Any]) -> None:
    """Store the key and the command's result beside the finished run in ``out``."""
    if (out / RUN_FILE).is_file():
        entry = {"key": key, "run": file_digest(out / RUN_FILE), "result": dict(result)}
        write_json(out / FINISHED_FILE, entry)
