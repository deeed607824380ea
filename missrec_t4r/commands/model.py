"""What `missrec pretrain`, `train` and `evaluate` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    yesterday: Path | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Train with our loop (``native``) or with Transformers4Rec's Trainer (``t4r``).

    ``source`` starts from a pre-trained run (`missrec_t4r.training.transfer`), ``yesterday`` from a run on an earlier
    catalogue of the same shop (`missrec_t4r.training.continuing`). ``recipe`` is ``default`` or, with ``yesterday``,
    that run's.

    Raises
    ------
    ConfigError
        An unknown trainer, or options that contradict each other.
    """
    common: dict[str, Any] = {"settings": settings, "resume": resume, "device": device, "progress": progress}
    if trainer not in ("native", "t4r"):
        raise ConfigError(f"--trainer {trainer!r}", "native or t4r")
    if source and yesterday:
        raise ConfigError("both --from and --continue", "one run to start from")
    if (source or yesterday) and trainer == "t4r":
        raise ConfigError("--from or --continue with --trainer t4r", "the native trainer", "leave --trainer out")
    if not source and (take != "all" or (freeze and not yesterday)):
        raise ConfigError("--freeze or --take without a run to start from", "--from RUN")
    if source:
        from missrec_t4r.training.transfer import train_from

        words: dict[str, Any] = {"freeze": freeze, "take": take}  # which it checks
        return train_from(data, out, source, recipe=recipe or "default", **words, **common)
    if yesterday:
        from missrec_t4r.training.continuing import train_on

        return train_on(data, out, yesterday, freeze=freeze or "none", recipe=recipe, **common)  # type: ignore[arg-type]  # it checks the words
    if trainer == "native":
        from missrec_t4r.training.finetune import train as native

        return native(data, out, recipe=recipe or "default", **common)
    from missrec_t4r.config import Recipe
    from missrec_t4r.t4r import train_t4r

    resolved = Recipe.load(recipe or "default", settings)
    return train_t4r(data, resolved, out, resume=resume, device=device, progress=progress)


def pretrain(
    data: Sequence[str | Path],
    out: Path,
    *,
    recipe: str = "pretrain",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Pre-train on several data folders; see `missrec_t4r.training.pretrain`."""
    from missrec_t4r.training.pretrain import pretrain as run

    return run(data, out, recipe=recipe, settings=settings, resume=resume, device=device, progress=progress)


def evaluate(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    baselines: bool = True,
    out: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Rank the whole catalogue; see `missrec_t4r.evaluation.evaluate`."""
    from missrec_t4r.evaluation.evaluate import evaluate as rank

    return rank(run, split=split, data=data, baselines=baselines, out=out, progress=progress)


def metrics_table(result: Mapping[str, Any]) -> RenderableType:
    """Return the table of an evaluation result, ready to print."""
    from missrec_t4r.evaluation.report import table

    return table(result)
