"""What `missrec pretrain`, `train` and `evaluate` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import Progress, quiet

if TYPE_CHECKING:
    from rich.console import RenderableType


def train(
    data: Path,
    out: Path,
    *,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    trainer: str = "native",
    source: Path | None = None,
    freeze: str | None = None,
    take: str = "all",
    earlier_run: Path | None = None,
    resume: bool = True,
    device: str = "auto",
    reuse: bool = False,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Train with our loop (``native``) or with Transformers4Rec's Trainer (``t4r``).

    ``source`` starts from a pre-trained run (`missrec_t4r.training.warm_start.transfer`), ``earlier_run`` from a run
    on an earlier catalogue of the same shop (`missrec_t4r.training.warm_start.nightly`). ``recipe`` is ``default`` or,
    with ``earlier_run``, that run's. ``reuse`` returns the finished run in ``out`` if it was made of the same data,
    settings and code (`missrec_t4r.runs.run_cache`), with ``"found": True``. ``dry_run`` checks everything and writes
    nothing.

    Raises
    ------
    ConfigError
        An unknown trainer, or options that contradict each other.
    """
    if trainer not in ("native", "t4r"):
        raise ConfigError(f"--trainer {trainer!r}", "native or t4r")
    if source and earlier_run:
        raise ConfigError("both --from and --continue", "one run to start from")
    if (source or earlier_run) and trainer == "t4r":
        raise ConfigError("--from or --continue with --trainer t4r", "the native trainer", "leave --trainer out")
    if not source and (take != "all" or (freeze and not earlier_run)):
        raise ConfigError("--freeze or --take without a run to start from", "--from RUN")
    start: dict[str, Any] = {"recipe": recipe, "settings": settings, "trainer": trainer, "freeze": freeze, "take": take}
    made_from = _identity([data], {**start, "device": device}, source or earlier_run) if reuse else None
    if made_from and resume and (found := _found(out, made_from, dry_run, progress)):
        return found
    run = _starting(data, out, source, earlier_run, **start)
    answer = run(resume=resume, device=device, progress=progress, dry_run=dry_run)
    if made_from and not dry_run:
        _remember(out, made_from, answer)
    return answer


def _starting(
    data: Path,
    out: Path,
    source: Path | None,
    earlier_run: Path | None,
    *,
    recipe: str | None,
    settings: Mapping[str, Any] | None,
    trainer: str,
    freeze: str | None,
    take: str,
) -> Callable[..., dict[str, Any]]:
    """Return the function that trains so; it lacks ``resume``, ``device``, ``progress`` and ``dry_run``."""
    if source:
        from missrec_t4r.training.warm_start.transfer import train_from

        words: dict[str, Any] = {"freeze": freeze, "take": take}  # which it checks
        return partial(train_from, data, out, source, recipe=recipe or "default", settings=settings, **words)
    if earlier_run:
        from missrec_t4r.training.warm_start.nightly import continue_training

        kept: Any = freeze or "none"  # it checks the word
        return partial(continue_training, data, out, earlier_run, freeze=kept, recipe=recipe, settings=settings)
    if trainer == "native":
        from missrec_t4r.training.fit import train as native

        return partial(native, data, out, recipe=recipe or "default", settings=settings)
    from missrec_t4r.config import Recipe
    from missrec_t4r.t4r import train_t4r

    return partial(train_t4r, data, Recipe.load(recipe or "default", settings), out)


def _identity(data: Sequence[Path], settings: Mapping[str, Any], source: Path | None) -> str:
    from missrec_t4r.runs.run_cache import run_key

    recipe = settings.get("recipe")
    written = Path(recipe).read_text(encoding="utf-8") if recipe and Path(recipe).is_file() else None
    return run_key([Path(folder) for folder in data], {**settings, "written": written}, source)


def _found(out: Path, made_from: str, dry_run: bool, progress: Progress) -> dict[str, Any] | None:
    from missrec_t4r.runs.run_cache import lookup

    answer = lookup(Path(out), made_from)
    if answer is None:
        return None
    progress.say(f"{out} is finished, of the same data and settings; --restart trains it anew")
    return {**answer, "found": True} | ({"dry_run": True} if dry_run else {})


def _remember(out: Path, made_from: str, answer: Mapping[str, Any]) -> None:
    from missrec_t4r.runs.run_cache import store
    from missrec_t4r.training import distributed

    if distributed.launched().rank == 0:
        store(Path(out), made_from, answer)


def pretrain(
    data: Sequence[str | Path],
    out: Path,
    *,
    recipe: str = "pretrain",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    reuse: bool = False,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Pre-train on several data folders; see `missrec_t4r.training.pretrain`. ``reuse`` as in `train`."""
    from missrec_t4r.data.union import named_folders
    from missrec_t4r.training.pretrain import pretrain as run

    start: dict[str, Any] = {"recipe": recipe, "settings": settings}
    folders = named_folders(data)
    made_from = _identity(list(folders.values()), {**start, "domains": list(folders), "device": device}, None)
    if reuse and resume and (found := _found(out, made_from, dry_run, progress)):
        return found
    answer = run(data, out, **start, resume=resume, device=device, progress=progress, dry_run=dry_run)
    if reuse and not dry_run:
        _remember(out, made_from, answer)
    return answer


def evaluate(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    baselines: bool = True,
    out: Path | None = None,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Rank the whole catalogue; see `missrec_t4r.runs.evaluate`."""
    from missrec_t4r.runs.evaluate import evaluate as rank

    return rank(run, split=split, data=data, baselines=baselines, out=out, progress=progress, dry_run=dry_run)


def metrics_table(result: Mapping[str, Any]) -> RenderableType:
    """Return the table of an evaluation result, ready to print."""
    from missrec_t4r.evaluation.report import table

    return table(result)
