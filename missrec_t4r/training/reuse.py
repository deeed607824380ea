"""`alone`: one training per run folder; ``reuse``: the result of a finished run of equal data, settings and code.

A scheduler that repeats a job after a failure behind the training does not train again. The key of a run hashes the
content of the data folders, not their times: an ETL that is repeated writes the same sessions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import changed_settings
from missrec_t4r.errors import ConfigError
from missrec_t4r.io.hashing import data_digest, file_digest
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.lock import locked
from missrec_t4r.runs.run_folder import (
    RECIPE_FILE,
    RUN_FILE,
    STATE_FILE,
    UNFINISHED_FILE,
    WEIGHTS_FILE,
    complete,
    is_finished,
    versions,
)
from missrec_t4r.training import distributed
from missrec_t4r.training.state import LIMITS, has_grown

log = logging.getLogger(__name__)

_FINISHED_FILE: Final = "finished.json"
"""Key and result of a finished run, beside it."""
_CODE: Final = ("config", "data", "evaluation", "model", "ranking", "t4r", "training")
"""Subpackages whose source is part of the key: a number may depend on them."""


def recipe_key(
    data: Sequence[str | Path], settings: Mapping[str, Any], recipe: Recipe | None, source: str | Path | None
) -> str:
    """Return the key of a run: SHA-256 of its inputs and of the code, 64 hexadecimal digits.

    Parameters
    ----------
    data : sequence of path
        Data folders, in their order; their content counts, not their times.
    settings : mapping
        Everything else that a number may depend on.
    recipe : Recipe or None
        None for that of the run in ``source``.
    source : path or None
        Run folder of a warm start.
    """
    recorded = {**settings, "recipe": None if recipe is None else recipe.to_dict()}
    digest = hashlib.sha256(json.dumps([recorded, versions()], sort_keys=True, default=str).encode())
    package = Path(__file__).parents[1]
    code = sorted(file for name in _CODE for file in (package / name).rglob("*.py"))
    if source is not None:
        complete(Path(source))
    start = [] if source is None else [Path(source) / RUN_FILE, Path(source) / WEIGHTS_FILE]
    files = [*code, *(file for file in start if file.is_file())]
    for content in (*map(file_digest, files), *(data_digest(Path(folder)) for folder in data)):
        digest.update(content.encode())
    return digest.hexdigest()


def alone(run: Callable[[], dict[str, Any]], out: Path, dry_run: bool) -> Callable[[], dict[str, Any]]:
    """Return a training that is refused while another process trains into the same folder."""
    if dry_run or distributed.launched().rank:  # of the processes of one training the first one asks
        return run

    def run_alone() -> dict[str, Any]:
        with locked(out, wait=False, error=ConfigError):
            return run()

    return run_alone


def run_or_reuse(
    run: Callable[[], dict[str, Any]], out: Path, key: str, resume: bool, dry_run: bool, recipe: Recipe | None
) -> dict[str, Any]:
    """Return the result of the finished run in ``out``, if it has this key; else run, and store the result.

    Raises
    ------
    ConfigError
        ``out`` holds a finished run with other settings, which only ``--restart`` replaces.
    """
    if resume and (out / UNFINISHED_FILE).is_file() and is_finished(out):
        log.warning(
            f"a training that was to replace the finished run in {out} was killed before its first checkpoint: the run "
            "is as it was, without its checkpoint and training log"
        )
    result = _stored(out, key) if resume else None
    if result is not None:
        log.info(f"{out} is a finished run of the same data and settings; `--restart` of its own command trains again")
        return {**result, "found": True} | ({"dry_run": True} if dry_run else {})
    if resume and recipe is not None and is_finished(out):
        earlier = Recipe.from_stored(read_json(out / RECIPE_FILE))
        changed = changed_settings(earlier.to_dict(), recipe.to_dict())
        if changed and not _goes_on(out, changed, earlier, recipe):
            raise ConfigError(
                f"{out} holds a finished run with other settings: {', '.join(changed)}",
                "a new folder, or the settings of that run",
                "give another --out, or --restart to replace the run",
            )
        if not changed and read_json(out / RUN_FILE).get("stopped_by") != "interrupt":
            log.info(f"{out} holds a finished run of other data or code: it is replaced")
    result = run()
    is_whole = result.get("stopped_by") != "interrupt"  # else the same command goes on
    if not dry_run and is_whole and distributed.launched().rank == 0 and (out / RUN_FILE).is_file():
        write_json(out / _FINISHED_FILE, {"key": key, "run": file_digest(out / RUN_FILE), "result": result})
    return result


def _stored(out: Path, key: str) -> dict[str, Any] | None:
    """Return the stored result of the finished run in ``out`` if its key is the same, else None."""
    if not is_finished(out):
        return None
    try:
        entry = read_json(out / _FINISHED_FILE)
        is_same = entry["key"] == key and entry["run"] == file_digest(out / RUN_FILE)
    except (OSError, ValueError, KeyError):
        return None
    return dict(entry["result"]) if is_same and (out / WEIGHTS_FILE).is_file() else None


def _goes_on(out: Path, changed: Sequence[str], earlier: Recipe, recipe: Recipe) -> bool:
    """Whether a finished run has a checkpoint, and only its limits have grown: more epochs, patience or minutes."""
    limits = tuple(f"train.{name} " for name in LIMITS)
    only_limits = all(change.startswith(limits) for change in changed)
    return only_limits and (out / STATE_FILE).is_file() and has_grown(vars(earlier.train), vars(recipe.train))
