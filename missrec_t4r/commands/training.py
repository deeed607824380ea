"""``missrec train`` and ``pretrain``: the choice of trainer and start, and the lookup of finished runs.

| options | function |
|---|---|
| none | `missrec_t4r.training.fit.train` |
| ``start_from`` | `missrec_t4r.training.warm_start.transfer.train_from` |
| ``warm_start`` | `missrec_t4r.training.warm_start.nightly.continue_training` |
| ``trainer="t4r"`` | `missrec_t4r.t4r.trainer.train_t4r` |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.config.recipe import AUTO
from missrec_t4r.errors import ConfigError

log = logging.getLogger(__name__)


def train(
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    trainer: Literal["native", "t4r"] = "native",
    start_from: str | Path | None = None,
    freeze: Literal["none", "encoder_decoder", "all_loaded"] | None = None,
    take: Literal["all", "adapters"] = "all",
    warm_start: str | Path | None = None,
    resume: bool = True,
    max_minutes: float | None = None,
    device: str = "auto",
    reuse: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a model, or fine-tune one from another run; an interrupted run is resumed.

    Parameters
    ----------
    data : path
        Data folder written by `missrec etl`.
    out : path
        Run folder to write.
    recipe : str or path, optional
        auto (the default) chooses for the data and the device and says why; or a shipped recipe, a YAML file, or a
        run's recipe.json. Without it --warm-start takes that run's recipe, and --from the recipe `default`.
    settings : mapping, optional
        Setting that overrides the recipe, such as model.d_model=128; repeatable.
    trainer : {"native", "t4r"}
        native: the training loop of this package. t4r: the Trainer of Transformers4Rec.
    start_from : path, optional
        Fine-tune from this run of `missrec pretrain`, or of `missrec train` on another data set.
    freeze : {"none", "encoder_decoder", "all_loaded"}, optional
        Loaded weights that are not trained: encoder_decoder (default of --from), none (default of --warm-start), or
        all_loaded, which includes the adapters.
    take : {"all", "adapters"}
        Weights that --from loads: all, or the modality adapters only.
    warm_start : path, optional
        Start from an earlier run on the same data set; items may have been added or removed since.
    resume : bool
        --restart trains from the start; by default an interrupted run is resumed and a finished one returned.
    max_minutes : float, optional
        End training within the epoch after this many minutes, with the best weights so far; short for
        --set train.max_minutes=MINUTES. No limit by default.
    device : str
        auto (a GPU if there is one), cpu or cuda.
    reuse : bool
        Return the finished run in ``out``, with ``"found": True``, if it was made from the same data, settings and
        code (`missrec_t4r.runs.run_cache`).
    dry_run : bool
        Check everything, predict time and memory from a few steps, and print what would be done; write nothing.

    Returns
    -------
    dict
        As `missrec_t4r.training.fit.train`; of the recipe auto also ``chosen``: the shipped recipe that it started
        from, what it changed, and its reasons.

    Raises
    ------
    ConfigError
        An unknown trainer, or options that contradict each other.
    """
    if trainer not in ("native", "t4r"):
        raise ConfigError(f"--trainer {trainer!r}", "native or t4r")
    if start_from and warm_start:
        raise ConfigError("both --from and --warm-start", "one run to start from")
    if (start_from or warm_start) and trainer == "t4r":
        raise ConfigError("--from or --warm-start with --trainer t4r", "the native trainer", "leave --trainer out")
    if not start_from and (take != "all" or (freeze and not warm_start)):
        raise ConfigError("--freeze or --take without a run to start from", "--from RUN")
    if recipe is None and not warm_start:
        recipe = "default" if start_from else AUTO
    require_at_least(0, max_minutes=max_minutes)
    if max_minutes is not None:
        if (settings or {}).get("train.max_minutes", max_minutes) != max_minutes:
            raise ConfigError("--max-minutes and another --set train.max_minutes", "one time limit", "leave one out")
        settings = {**(settings or {}), "train.max_minutes": max_minutes}
    own, chosen = _resolved(data, recipe, settings, device)
    start: dict[str, Any] = {"recipe": own}
    run: Callable[..., dict[str, Any]]
    if start_from:
        from missrec_t4r.training.warm_start.transfer import train_from

        run = partial(train_from, data, out, start_from, freeze=freeze, take=take, **start)
    elif warm_start:
        from missrec_t4r.training.warm_start.nightly import continue_training

        frozen = freeze or "none"
        run = partial(continue_training, data, out, warm_start, freeze=frozen, settings=settings, **start)
    elif trainer == "native":
        from missrec_t4r.training.fit import train as native

        run = partial(native, data, out, **start)
    else:
        from missrec_t4r.t4r import train_t4r

        run = partial(train_t4r, data, out=out, **start)
    run = partial(run, resume=resume, device=device, dry_run=dry_run)
    if not reuse:
        return run() | chosen
    made_from = {"settings": settings, "trainer": trainer, "freeze": freeze, "take": take, "device": device}
    key = _key([data], made_from, own, start_from or warm_start)
    return _cached(run, Path(out), key, resume, dry_run, own) | chosen


def _resolved(
    data: str | Path, recipe: str | Path | None, settings: Mapping[str, Any] | None, device: str
) -> tuple[Recipe | None, dict[str, Any]]:
    """Return the recipe with its settings, None for an earlier run's, and what the answer says about a chosen one."""
    if recipe is None:
        return None, {}
    if str(recipe) != AUTO:
        return Recipe.load(recipe, settings), {}
    from missrec_t4r.training.auto import choose

    choice = choose(data, settings, device)
    facts = {"recipe": choice.base, "changes": dict(choice.changes), "reasons": list(choice.reasons)}
    return choice.recipe, {"chosen": facts}


def pretrain(
    data: Sequence[str | Path],
    out: str | Path,
    *,
    recipe: str | Path = "pretrain",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    reuse: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Pre-train on several data sets whose modality vectors come from the same encoders; then `missrec train --from`.

    Parameters
    ----------
    data : sequence of path or ``NAME=PATH``
        Data folder of one domain, or NAME=FOLDER; repeatable.
    out : path
        Run folder to write.
    recipe : str or path
        Shipped recipe or YAML file.
    settings : mapping, optional
        Setting that overrides the recipe, such as train.epochs=10; repeatable.
    resume : bool
        --restart trains from the start; by default an interrupted run is resumed and a finished one returned.
    device : str
        auto (a GPU if there is one), cpu or cuda.
    reuse : bool
        As in `train`.
    dry_run : bool
        Check everything, predict time and memory from a few steps, and print what would be done; write nothing.

    Returns
    -------
    dict
        As `missrec_t4r.training.pretrain.pretrain`.
    """
    from missrec_t4r.data.union import named_folders
    from missrec_t4r.training.pretrain import pretrain as train_on_domains

    start: dict[str, Any] = {"recipe": recipe, "settings": settings}
    run = partial(train_on_domains, data, out, **start, resume=resume, device=device, dry_run=dry_run)
    if not reuse:
        return run()
    folders, own = named_folders(data), Recipe.load(recipe, settings)
    key = _key(list(folders.values()), {"domains": list(folders), "device": device}, own, None)
    return _cached(run, Path(out), key, resume, dry_run, own)


def _key(
    data: Sequence[str | Path], settings: Mapping[str, Any], recipe: Recipe | None, source: str | Path | None
) -> str:
    from missrec_t4r.runs.run_cache import run_key

    recorded = {**settings, "recipe": None if recipe is None else recipe.to_dict()}
    return run_key([Path(folder) for folder in data], recorded, None if source is None else Path(source))


def _cached(
    run: Callable[[], dict[str, Any]], out: Path, key: str, resume: bool, dry_run: bool, recipe: Recipe | None
) -> dict[str, Any]:
    """Return the result of the finished run in ``out``, if it has this key; else run, and store the result.

    Raises
    ------
    ConfigError
        ``out`` holds a finished run with other settings, which only ``--restart`` replaces.
    """
    from missrec_t4r.io.json_files import read_json
    from missrec_t4r.runs.run_cache import differences, lookup, store
    from missrec_t4r.runs.run_folder import RUN_FILE
    from missrec_t4r.training import distributed

    result = lookup(out, key) if resume else None
    if result is not None:
        log.info(f"{out} is a finished run of the same data and settings; --restart trains again")
        return {**result, "found": True} | ({"dry_run": True} if dry_run else {})
    if resume and recipe is not None and (out / RUN_FILE).is_file():
        changed = differences(out, recipe)
        if changed and not _goes_on(out, recipe):
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


def _goes_on(out: Path, recipe: Recipe) -> bool:
    """Whether a finished run has a checkpoint, and only its limits have grown: more epochs, patience or minutes."""
    from missrec_t4r.io.json_files import read_json
    from missrec_t4r.runs.run_cache import differences
    from missrec_t4r.runs.run_folder import RECIPE_FILE, STATE_FILE
    from missrec_t4r.training.state import LIMITS, has_grown

    limits = [f"train.{name} " for name in LIMITS]
    if not all(any(one.startswith(name) for name in limits) for one in differences(out, recipe)):
        return False
    stored = Recipe.from_stored(read_json(out / RECIPE_FILE)).train
    return (out / STATE_FILE).is_file() and has_grown(vars(stored), vars(recipe.train))
