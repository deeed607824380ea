"""`alone`: one training per run folder; ``reuse``: the result of a finished run of equal data, settings and code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from missrec_t4r.config import Recipe
from missrec_t4r.errors import ConfigError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.io.lock import locked
from missrec_t4r.runs.run_cache import differences, lookup, run_key, store
from missrec_t4r.runs.run_folder import RECIPE_FILE, RUN_FILE, STATE_FILE
from missrec_t4r.training import distributed
from missrec_t4r.training.state import LIMITS, has_grown

log = logging.getLogger(__name__)


def recipe_key(
    data: Sequence[str | Path], settings: Mapping[str, Any], recipe: Recipe | None, source: str | Path | None
) -> str:
    """Return the key of a run of a recipe; None for the recipe of the run in ``source``."""
    recorded = {**settings, "recipe": None if recipe is None else recipe.to_dict()}
    return run_key([Path(folder) for folder in data], recorded, None if source is None else Path(source))


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
    result = lookup(out, key) if resume else None
    if result is not None:
        log.info(f"{out} is a finished run of the same data and settings; `--restart` of its own command trains again")
        return {**result, "found": True} | ({"dry_run": True} if dry_run else {})
    if resume and recipe is not None and (out / RUN_FILE).is_file():
        changed = differences(out, recipe)
        if changed and not _goes_on(out, changed, recipe):
            raise ConfigError(
                f"{out} holds a finished run with other settings: {', '.join(changed)}",
                "a new folder, or the settings of that run",
                "give another --out, or --restart to replace the run",
            )
        if not changed and read_json(out / RUN_FILE).get("stopped_by") != "interrupt":
            log.info(f"{out} holds a finished run of other data or code: it is replaced")
    result = run()
    is_whole = result.get("stopped_by") != "interrupt"  # else the same command goes on
    if not dry_run and is_whole and distributed.launched().rank == 0:
        store(out, key, result)
    return result


def _goes_on(out: Path, changed: Sequence[str], recipe: Recipe) -> bool:
    """Whether a finished run has a checkpoint, and only its limits have grown: more epochs, patience or minutes."""
    limits = tuple(f"train.{name} " for name in LIMITS)
    if not all(change.startswith(limits) for change in changed):
        return False
    stored = Recipe.from_stored(read_json(out / RECIPE_FILE)).train
    return (out / STATE_FILE).is_file() and has_grown(vars(stored), vars(recipe.train))
