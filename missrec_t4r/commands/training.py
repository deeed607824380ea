"""``missrec train``: the choice of trainer and start.

| options | trainer | start |
|---|---|---|
| none | `missrec_t4r.training.fit.train` | |
| ``start_from`` | the same | `missrec_t4r.training.warm_start.transfer.transfer_start` |
| ``warm_start`` | the same | `missrec_t4r.training.warm_start.nightly.nightly_start` |
| ``trainer="t4r"`` | `missrec_t4r.t4r.trainer.train_t4r` | |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import require_at_least, require_choices
from missrec_t4r.config.recipe import AUTO
from missrec_t4r.errors import ConfigError


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
        code (`missrec_t4r.training.reuse`).
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
    require_choices(trainer=(trainer, ("native", "t4r")))
    if start_from and warm_start:
        raise ConfigError("both --from and --warm-start", "one run to start from")
    if (start_from or warm_start) and trainer == "t4r":
        raise ConfigError("--from or --warm-start with --trainer t4r", "the native trainer", "leave --trainer out")
    if not start_from and (take != "all" or (freeze and not warm_start)):
        raise ConfigError("--freeze or --take without a run to start from", "--from RUN")
    if recipe is None and not warm_start:
        recipe = "default" if start_from else AUTO
    require_at_least(0, max_minutes=max_minutes)
    from missrec_t4r.runs.run_folder import require_run_folder

    require_run_folder(Path(out))
    if max_minutes is not None:
        if (settings or {}).get("train.max_minutes", max_minutes) != max_minutes:
            raise ConfigError("--max-minutes and another --set train.max_minutes", "one time limit", "leave one out")
        settings = {**(settings or {}), "train.max_minutes": max_minutes}
    own, chosen = _resolved(data, recipe, settings, device)
    how: dict[str, Any] = {"resume": resume, "device": device, "dry_run": dry_run}

    def run_once() -> dict[str, Any]:
        start: dict[str, Any] = {"recipe": own}
        if trainer == "t4r":
            from missrec_t4r.t4r import train_t4r

            return train_t4r(data, out=out, **start, **how)
        from missrec_t4r.training.fit import train as native

        if start_from:
            from missrec_t4r.training.warm_start.transfer import transfer_start

            start = transfer_start(start_from, out, **start, freeze=freeze, take=take)
        elif warm_start:
            from missrec_t4r.training.warm_start.nightly import nightly_start

            start = nightly_start(warm_start, data, out, **start, settings=settings, freeze=freeze or "none")
        return native(data, out, **start, **how)

    from missrec_t4r.training.reuse import alone, recipe_key, run_or_reuse

    run = alone(run_once, Path(out), dry_run)
    if not reuse:
        return run() | chosen
    made_from = {"settings": settings, "trainer": trainer, "freeze": freeze, "take": take, "device": device}
    key = recipe_key([data], made_from, own, start_from or warm_start)
    return run_or_reuse(run, Path(out), key, resume, dry_run, own) | chosen


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
